package tun

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
)

// vnetHeaderLen is the size of a vnetHeader in bytes.
const vnetHeaderLen = 10

func (h *vnetHeader) decode(b *[vnetHeaderLen]byte) {
	h.flags, h.gsoType = b[0], b[1]
	h.hdrLen = binary.NativeEndian.Uint16(b[2:])
	h.gsoSize = binary.NativeEndian.Uint16(b[4:])
	h.csumStart = binary.NativeEndian.Uint16(b[6:])
	h.csumOffset = binary.NativeEndian.Uint16(b[8:])
}

func (h *vnetHeader) encode(b *[vnetHeaderLen]byte) {
	b[0], b[1] = h.flags, h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}

// finishChecksum completes a partial checksum, as vnetNeedsChecksum asks: the field at
// start+offset becomes the complement of the sum of p[start:], the field included. It
// returns false and leaves p unchanged if the field is outside p.
func finishChecksum(p []byte, start, offset int) bool {
	if start+offset+2 > len(p) {
		return false
	}
	sum := ipv4.Checksum(p[start:], 0)
	if sum == 0 {
		sum = 0xffff // equal in one's complement; zero means no UDP checksum (RFC 768)
	}
	binary.BigEndian.PutUint16(p[start+offset:], sum)
	return true
}
