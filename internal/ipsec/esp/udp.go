package esp

import (
	"encoding/binary"

	"ipipd/internal/packet"
)

// UDPKind is what a UDP datagram on port 4500 carries.
type UDPKind uint8

// What is told apart on port 4500 (RFC 3948 section 2).
const (
	// UDPMalformed: too short for anything.
	UDPMalformed UDPKind = iota
	// UDPKeepalive: the one byte 0xff that keeps a NAT's mapping (section 2.3).
	UDPKeepalive
	// UDPIKE: an IKE message behind four zero bytes, the non-ESP marker.
	UDPIKE
	// UDPESP: an ESP packet; its SPI is not zero.
	UDPESP
)

// NonESPMarker is how many zero bytes stand before an IKE message on port 4500.
const NonESPMarker = 4

// ClassifyUDP tells what the payload of a datagram on port 4500 is.
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

// SPI of an ESP packet in b, a whole IPv4 packet of protocol 50, in host byte
// order; false if there is none.
func SPI(b *packet.Buffer) (spi uint32, ok bool) {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != DropNone || p[9] != ProtocolESP || len(p) < hl+headerLen {
		return 0, false
	}
	return binary.BigEndian.Uint32(p[hl:]), true
}

// StripUDP takes the UDP header off an encapsulated ESP packet in b, a whole
// IPv4 packet of protocol 17, and leaves one of protocol 50.
func StripUDP(b *packet.Buffer) Drop {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != DropNone {
		return d
	}
	if p[9] != protocolUDP || len(p) < hl+udpLen+headerLen || int(binary.BigEndian.Uint16(p[hl+4:])) != len(p)-hl {
		return DropMalformed
	}
	copy(p[udpLen:], p[:hl])
	b.Pull(udpLen)
	finishIPv4(b.Bytes(), hl, ProtocolESP)
	return DropNone
}
