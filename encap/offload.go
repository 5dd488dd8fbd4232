package encap

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// DeriveOffload finds out what a raw socket does not say about the inner packet
// that b holds: whether its TCP or UDP checksum is yet to be finished, and
// whether it is a superpacket. Both occur if the sender sits on the same physical
// host, where segments pass as the sending stack left them for hardware that never
// came, or if the kernel's GRO merged segments on receipt.
//
// A checksum is partial if the field equals the sum of the pseudo-header and the
// real checksum is wrong. A partial TCP packet longer than mtu, the tunnel's MTU
// in bytes, is a superpacket; the size of its segments is lost, so it gets the
// largest that the tunnel can carry on. Datagram boundaries are not ours to
// choose: a partial UDP packet longer than mtu is DropSuperpacketSizeUnknown.
//
// Not seen are merged datagrams that together fit mtu, and the unfinished CRC of
// SCTP. A Buffer whose Checksum is known already is left as it is. For all but
// the few packets concerned the cost is that of adding up five words.
func DeriveOffload(b *packet.Buffer, mtu int) Drop {
	if b.Checksum != packet.ChecksumUnknown {
		return DropNone
	}
	p, err := ipv4.Parse(b.Bytes())
	if err != nil || p.IsFragment() {
		return DropNone // fragments are made after checksums
	}
	segment := p.Payload()
	var field uint16
	var transportHeaderLen int
	switch p.Protocol() {
	case ipv4.ProtocolTCP:
		if len(segment) < 20 {
			return DropNone
		}
		field = binary.BigEndian.Uint16(segment[16:])
		transportHeaderLen = int(segment[12]>>4) * 4
	case ipv4.ProtocolUDP:
		if len(segment) < 8 {
			return DropNone
		}
		length := int(binary.BigEndian.Uint16(segment[4:]))
		if length < 8 || length > len(segment) {
			return DropNone
		}
		segment = segment[:length]
		field = binary.BigEndian.Uint16(segment[6:])
	default:
		return DropNone
	}
	pseudo := ipv4.PseudoHeaderSum(p.Source(), p.Destination(), p.Protocol(), len(segment))
	if field != ipv4.Fold(pseudo) {
		return DropNone
	}
	// One segment in 65,536 has a finished checksum that looks like this.
	if ipv4.Sum(segment, pseudo) == 0xffff {
		b.Checksum = packet.ChecksumValid
		return DropNone
	}
	if p.TotalLen() <= mtu {
		b.Checksum = packet.ChecksumPartial
		return DropNone
	}
	if p.Protocol() == ipv4.ProtocolUDP {
		return DropSuperpacketSizeUnknown
	}
	size := mtu - p.HeaderLen() - transportHeaderLen
	if transportHeaderLen < 20 || transportHeaderLen > len(segment) || size <= 0 {
		return DropSuperpacketSizeUnknown
	}
	b.Checksum = packet.ChecksumPartial
	b.SegmentSize = uint16(size)
	return DropNone
}
