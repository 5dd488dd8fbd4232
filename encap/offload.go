package encap

import (
	"encoding/binary"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// DeriveOffload reconstructs the offload metadata of inner, the packet in b, which a raw socket
// does not pass on: whether the TCP or UDP checksum is partial, and whether the packet is a
// superpacket. Both occur if the sender runs on the same physical host, so that no NIC completed
// the offload, or if GRO merged segments on receipt.
//
// A checksum is partial if the field equals the pseudo-header sum and the full checksum is
// wrong. A partial TCP packet longer than mtu, the tunnel's MTU in bytes, is a superpacket; its
// segment size is lost, so it gets the largest that fits the tunnel. A partial UDP packet longer
// than mtu is drop.SuperpacketSizeUnknown, since datagram boundaries must be kept.
//
// Merged datagrams that together fit mtu, and a partial SCTP CRC, go undetected. If b.Checksum
// is known already, b is unchanged. For nearly all packets the cost is adding up five words.
func DeriveOffload(b *packet.Buffer, inner ipv4.Packet, mtu int) drop.Reason {
	if b.Checksum != packet.ChecksumUnknown || inner.IsFragment() {
		return drop.None // a packet is fragmented after its checksum is complete
	}
	segment := inner.Payload()
	var field uint16
	var transportHeaderLen int
	switch inner.Protocol() {
	case ipv4.ProtocolTCP:
		if len(segment) < 20 {
			return drop.None
		}
		field = binary.BigEndian.Uint16(segment[16:])
		transportHeaderLen = int(segment[12]>>4) * 4
	case ipv4.ProtocolUDP:
		if len(segment) < 8 {
			return drop.None
		}
		length := int(binary.BigEndian.Uint16(segment[4:]))
		if length < 8 || length > len(segment) {
			return drop.None
		}
		segment = segment[:length]
		field = binary.BigEndian.Uint16(segment[6:])
	default:
		return drop.None
	}
	pseudo := ipv4.PseudoHeaderSum(inner.Source(), inner.Destination(), inner.Protocol(), len(segment))
	if field != ipv4.Fold(pseudo) {
		return drop.None
	}
	// One segment in 65,536 has a complete checksum that equals the pseudo-header sum.
	if ipv4.Sum(segment, pseudo) == 0xffff {
		b.Checksum = packet.ChecksumValid
		return drop.None
	}
	if inner.TotalLen() <= mtu {
		b.Checksum = packet.ChecksumPartial
		return drop.None
	}
	if inner.Protocol() == ipv4.ProtocolUDP {
		return drop.SuperpacketSizeUnknown
	}
	size := mtu - inner.HeaderLen() - transportHeaderLen
	if transportHeaderLen < 20 || transportHeaderLen > len(segment) || size <= 0 {
		return drop.SuperpacketSizeUnknown
	}
	b.Checksum = packet.ChecksumPartial
	b.SegmentSize = uint16(size)
	return drop.None
}
