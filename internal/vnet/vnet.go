// Package vnet has struct virtio_net_hdr without num_buffers, which the kernel puts before every
// packet of a TUN device opened with IFF_VNET_HDR and of a packet socket with PACKET_VNET_HDR
// (Virtio 1.3, section 5.1.6).
package vnet

import "encoding/binary"

// HeaderLen is the size of an encoded Header in bytes.
const HeaderLen = 10

// Header describes the offload of a packet. Its fields are in host byte order, as in legacy
// virtio.
//
//	 0       1         2           4           6             8               10
//	+-------+---------+-----------+-----------+-------------+---------------+
//	| Flags | GSOType | HdrLen    | GSOSize   | CsumStart   | CsumOffset    |
//	+-------+---------+-----------+-----------+-------------+---------------+
type Header struct {
	Flags   uint8
	GSOType uint8
	// HdrLen is a hint of the headers' length. Don't read it: the kernel often sets it to the
	// length of the skb's linear part.
	HdrLen uint16
	// GSOSize is the payload in bytes of each segment but the last.
	GSOSize uint16
	// CsumStart is the offset of the first byte that the checksum covers, CsumOffset that of
	// the checksum field from there.
	CsumStart, CsumOffset uint16
}

const (
	NeedsChecksum = 1 // in Flags: partial checksum, the field holds the pseudo-header's sum
	DataValid     = 2 // in Flags: the checksum was verified

	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 5    // USO, IPv4 and IPv6 (VIRTIO_NET_HDR_GSO_UDP_L4)
	GSOECN   = 0x80 // a flag in GSOType: CWR is set, for the first segment only
)

// Decode returns the Header in b.
func Decode(b *[HeaderLen]byte) Header {
	return Header{
		Flags: b[0], GSOType: b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}

// Encode writes h to b.
func (h *Header) Encode(b *[HeaderLen]byte) {
	b[0], b[1] = h.Flags, h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
}
