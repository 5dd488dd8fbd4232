package encap

import (
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Kind is the kind of a received packet.
type Kind uint8

const (
	// KindData: an inner packet for the host.
	KindData Kind = iota
	// KindReflect: the remote end's reflect probe. It is sent back (ReflectAnswer), never to the
	// host.
	KindReflect
	// KindEmpty: no inner packet: the answer to our reflect probe, or an empty probe. It shows
	// only that the remote end is alive.
	KindEmpty
)

// ParseOuter checks the outer header of the packet in b and trims b to its total length, since
// an Ethernet frame may be padded. The caller finds the tunnel by the addresses of outer.
// Fragments and protocols other than 4 are dropped. If it returns a drop.Reason, b is unchanged.
func ParseOuter(b *packet.Buffer) (outer ipv4.Packet, d drop.Reason) {
	outer, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return ipv4.Packet{}, drop.OuterMalformed
	}
	if outer.Protocol() != ipv4.ProtocolIPIP {
		return ipv4.Packet{}, drop.OuterNotIPIP
	}
	if outer.IsFragment() {
		return ipv4.Packet{}, drop.OuterFragment
	}
	if !outer.HeaderChecksumValid() {
		return ipv4.Packet{}, drop.OuterChecksum
	}
	b.Trim(outer.TotalLen())
	return outer, drop.None
}

// Decapsulate removes the outer header, which ParseOuter returned, from b. local and remote are
// the tunnel's outer addresses; a packet with others is dropped (RFC 2003, section 6.2).
//
// On KindData and KindReflect b holds exactly the inner packet, of which inner is the view: version,
// lengths and header checksum are valid, TTL is not 0, ECN is merged from both headers (RFC 6040,
// section 4.2), and DSCP is the inner one. On KindEmpty b is empty, and inner the zero Packet. If
// Decapsulate returns a drop.Reason, inner and the contents of b are undefined.
func Decapsulate(b *packet.Buffer, outer ipv4.Packet, local, remote [4]byte) (inner ipv4.Packet, kind Kind, d drop.Reason) {
	if outer.Source() != remote || outer.Destination() != local {
		return inner, KindData, drop.UnknownPeer
	}
	outerECN := outer.ECN()
	b.Pull(outer.HeaderLen())
	if b.Len() == 0 {
		return inner, KindEmpty, drop.None
	}
	inner, err := ipv4.Parse(b.Bytes())
	switch err {
	case nil:
	case ipv4.ErrVersion:
		return inner, KindData, drop.ReceivedNotIPv4
	case ipv4.ErrShort, ipv4.ErrTruncated:
		return inner, KindData, drop.ReceivedTruncated
	default:
		return inner, KindData, drop.ReceivedMalformed
	}
	b.Trim(inner.TotalLen())
	if !inner.HeaderChecksumValid() {
		return inner, KindData, drop.ReceivedChecksum
	}
	if inner.TTL() == 0 {
		return inner, KindData, drop.ReceivedTTLZero // RFC 2003, section 3.1
	}
	innerECN := inner.ECN()
	ecn, ok := DecapsulatedECN(innerECN, outerECN)
	if !ok {
		return inner, KindData, drop.ECNCEOnNotECT
	}
	if ecn != innerECN {
		inner.SetECN(ecn)
	}
	switch source, destination := inner.Source(), inner.Destination(); {
	case (source == local || destination == remote) && isReflect(inner):
		return inner, KindReflect, drop.None
	case source == local && destination == remote:
		return inner, KindData, drop.ReceivedLoop
	case source == remote && destination == local && inner.Protocol() == ipv4.ProtocolIPIP:
		// A packet of this tunnel nested in itself, or a fragment of one: the kernel would
		// deliver it to the socket again, and so on for each level in it.
		return inner, KindData, drop.ReceivedLoop
	}
	return inner, KindData, drop.None
}

// isReflect reports whether inner is a reflect probe, a bare header of protocol 4, given that it is
// from our local address or to the remote's. A NAT translates the outer header only: with one at the
// remote the destination is its private address, with one here the source is our public one. Both
// at once cannot be told from the answer to a probe of a tunnel inside this one. Options are refused,
// since we would send a source route of the peer's choice.
func isReflect(inner ipv4.Packet) bool {
	return inner.Protocol() == ipv4.ProtocolIPIP && inner.TotalLen() == ipv4.HeaderLen && !inner.IsFragment()
}

// ReflectAnswer turns the reflect probe in b, as Decapsulate returned it with KindReflect, into
// its answer, to be sent through the raw socket unencapsulated: the probe with its TTL
// decremented, as if forwarded, from local to remote, the tunnel's, whatever a NAT has left in it.
func ReflectAnswer(b *packet.Buffer, local, remote [4]byte) drop.Reason {
	probe, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return drop.ReceivedMalformed
	}
	if probe.TTL() <= 1 {
		return drop.ReflectTTLExpired // else two ends could reflect one probe for ever
	}
	probe.SetTTL(probe.TTL() - 1)
	probe.SetAddresses(local, remote)
	return drop.None
}
