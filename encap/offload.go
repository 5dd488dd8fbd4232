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
	t, ok := ipv4.ParseTransport(inner)
	if !ok {
		return drop.None
	}
	segment := inner.Payload()
	if t.Protocol == ipv4.ProtocolUDP {
		length := int(binary.BigEndian.Uint16(segment[ipv4.OffUDPLength:]))
		if length < ipv4.UDPHeaderLen || length > len(segment) {
			return drop.None
		}
		segment = segment[:length]
	}
	pseudo := ipv4.PseudoHeaderSum(inner.Source(), inner.Destination(), t.Protocol, len(segment))
	if binary.BigEndian.Uint16(inner.Bytes()[t.Checksum:]) != ipv4.Fold(pseudo) {
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
	if t.Protocol == ipv4.ProtocolUDP {
		return drop.SuperpacketSizeUnknown
	}
	size := mtu - t.Payload
	if t.Payload < t.Start+ipv4.TCPHeaderLen || t.Payload > inner.TotalLen() || size <= 0 {
		return drop.SuperpacketSizeUnknown
	}
	b.Checksum = packet.ChecksumPartial
	b.SegmentSize = uint16(size)
	return drop.None
}
