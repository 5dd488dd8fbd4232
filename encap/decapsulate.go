package encap

import (
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Kind is what a received packet is to the tunnel.
type Kind uint8

const (
	// KindData: an inner packet for the host.
	KindData Kind = iota
	// KindReflect: the remote end's reflect probe. It goes back (ReflectAnswer)
	// and never to the host.
	KindReflect
	// KindEmpty: nothing inside: the answer to our own reflect probe, or an
	// empty probe. It says that the remote end is there, and no more.
	KindEmpty
)

// ParseOuter checks the outer header of the packet in b, and trims b to its
// total length: an Ethernet frame may be padded. The addresses of outer then
// select the tunnel. Fragments and protocols other than 4 are not for tunnels.
// If it returns a Drop, b is as it was.
func ParseOuter(b *packet.Buffer) (outer ipv4.Packet, d Drop) {
	outer, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return ipv4.Packet{}, DropOuterMalformed
	}
	if outer.Protocol() != ipv4.ProtocolIPIP {
		return ipv4.Packet{}, DropOuterNotIPIP
	}
	if outer.IsFragment() {
		return ipv4.Packet{}, DropOuterFragment
	}
	if !outer.HeaderChecksumValid() {
		return ipv4.Packet{}, DropOuterChecksum
	}
	b.Trim(outer.TotalLen())
	return outer, DropNone
}

// Decapsulate takes the outer header, which ParseOuter found in b, off the
// packet. local and remote are the tunnel's own outer addresses: anything else
// is dropped, as RFC 2003, section 6.2 advises.
//
// On KindData and KindReflect b holds the inner packet and nothing behind it:
// version, lengths and header checksum are right, the TTL is not 0, ECN is
// merged from both headers by RFC 6040, section 4.2, DSCP is the inner one's. On
// KindEmpty b holds nothing. If Decapsulate returns a Drop, what b holds is
// undefined.
func Decapsulate(b *packet.Buffer, outer ipv4.Packet, local, remote [4]byte) (Kind, Drop) {
	if outer.Source() != remote || outer.Destination() != local {
		return KindData, DropUnknownPeer
	}
	outerECN := outer.ECN()
	b.Pull(outer.HeaderLen())
	if b.Len() == 0 {
		return KindEmpty, DropNone
	}
	inner, err := ipv4.Parse(b.Bytes())
	switch err {
	case nil:
	case ipv4.ErrVersion:
		return KindData, DropReceivedNotIPv4
	case ipv4.ErrShort, ipv4.ErrTruncated:
		return KindData, DropReceivedTruncated
	default:
		return KindData, DropReceivedMalformed
	}
	b.Trim(inner.TotalLen())
	if !inner.HeaderChecksumValid() {
		return KindData, DropReceivedChecksum
	}
	if inner.TTL() == 0 {
		return KindData, DropReceivedTTLZero // RFC 2003, section 3.1
	}
	innerECN := inner.ECN()
	ecn, ok := DecapsulatedECN(innerECN, outerECN)
	if !ok {
		return KindData, DropECNCEOnNotECT
	}
	if ecn != innerECN {
		inner.SetECN(ecn)
	}
	switch source, destination := inner.Source(), inner.Destination(); {
	case source == local && isReflect(inner):
		return KindReflect, DropNone
	case source == local && destination == remote:
		return KindData, DropReceivedLoop
	case source == remote && destination == local && inner.Protocol() == ipv4.ProtocolIPIP:
		// A packet of this tunnel inside one, or a fragment of it: the host would
		// hand it to us again, and so each level that it holds.
		return KindData, DropReceivedLoop
	}
	return KindData, DropNone
}

// isReflect reports whether inner, whose source is our own address, is a probe: a
// bare header of protocol 4. Its destination should be the remote, and is the
// remote's private address where that is behind a 1:1 NAT, which translates the
// outer header only. One with options is no probe: we would send a source route of
// someone else's choice.
func isReflect(inner ipv4.Packet) bool {
	return inner.Protocol() == ipv4.ProtocolIPIP && inner.TotalLen() == ipv4.HeaderLen && !inner.IsFragment()
}

// ReflectAnswer turns the reflect probe in b, as Decapsulate left it with
// KindReflect, into its answer, which is to be sent through the raw socket as it
// is: the probe itself with its TTL decremented, as if it had been forwarded, to
// remote, the tunnel's, whatever the probe's own destination.
func ReflectAnswer(b *packet.Buffer, remote [4]byte) Drop {
	probe, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return DropReceivedMalformed
	}
	if probe.TTL() <= 1 {
		return DropReflectTTLExpired // without it two ends could toss one probe for ever
	}
	probe.SetTTL(probe.TTL() - 1)
	probe.SetDestination(remote)
	return DropNone
}
