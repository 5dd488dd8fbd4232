package esp

import (
	"encoding/binary"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

// UDPKind is what a UDP datagram on port 4500 contains.
type UDPKind uint8

// The kinds of RFC 3948 section 2.
const (
	// UDPMalformed: shorter than an ESP header, and no keepalive.
	UDPMalformed UDPKind = iota
	// UDPKeepalive: a NAT-keepalive, the single byte 0xff (section 2.3).
	UDPKeepalive
	// UDPIKE: an IKE message after a non-ESP marker (section 2.2).
	UDPIKE
	// UDPESP: an ESP packet, whose SPI is not zero (section 2.1).
	UDPESP
)

// NonESPMarker is the length in bytes of the non-ESP marker, four zero bytes.
const NonESPMarker = 4

// ClassifyUDP returns the kind of a UDP payload on port 4500.
func ClassifyUDP(payload []byte) UDPKind {
	switch {
	case len(payload) == 1 && payload[0] == 0xff:
		return UDPKeepalive
	case len(payload) < headerLen:
		return UDPMalformed
	case binary.BigEndian.Uint32(payload) == 0:
		return UDPIKE
	}
	return UDPESP
}

// SPI returns the SPI, in host byte order, of the IPv4 packet of protocol 50 in b, or a drop.Reason if
// the packet is malformed or a fragment.
func SPI(b *packet.Buffer) (spi uint32, d drop.Reason) {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d == drop.None && (p[9] != ProtocolESP || len(p) < hl+headerLen) {
		d = drop.ESPMalformed
	}
	if d != drop.None {
		return 0, d
	}
	return binary.BigEndian.Uint32(p[hl:]), drop.None
}
