package esp

import (
	"encoding/binary"

	"ipipd/internal/drop"
)

// IP protocol numbers.
const (
	ProtocolESP  = 50
	ProtocolNone = 59 // no next header; in ESP a dummy packet
	protocolUDP  = 17
)

// checkIPv4 returns the header's length in bytes, or a drop.Reason unless p is exactly one
// unfragmented IPv4 datagram.
func checkIPv4(p []byte) (headerLen int, d drop.Reason) {
	if len(p) < 20 || p[0]>>4 != 4 {
		return 0, drop.ESPMalformed
	}
	headerLen = int(p[0]&15) * 4
	if headerLen < 20 || headerLen > len(p) || int(binary.BigEndian.Uint16(p[2:])) != len(p) {
		return 0, drop.ESPMalformed
	}
	const moreAndOffset = 0x3fff
	if binary.BigEndian.Uint16(p[6:])&moreAndOffset != 0 {
		return 0, drop.ESPFragment
	}
	return headerLen, drop.None
}

// finishIPv4 sets total length, protocol and header checksum of p.
func finishIPv4(p []byte, headerLen int, protocol byte) {
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[9] = protocol
	p[10], p[11] = 0, 0
	var sum uint32
	for i := 0; i < headerLen; i += 2 {
		sum += uint32(p[i])<<8 | uint32(p[i+1])
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
}
