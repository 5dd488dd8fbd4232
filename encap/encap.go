// Package encap has the rules of IP in IP encapsulation (RFC 2003).
//
// They are functions on bytes: no socket, no clock, no goroutine, no log, no allocation.
// Outer.Encapsulate puts the outer header in front of an inner packet; ParseOuter and
// Decapsulate check a received packet and take the outer header off; Fragment fragments
// a packet; TooBig tells an inner sender that its packet does not fit; ParseError reads
// an ICMP error from the outer path; PathMTU and Reachability are what a tunnel remembers
// of that path. Whatever stops a packet is a Drop, and every Drop has a name.
//
// RFCs, and where they are kept:
//
//	 791  fragmentation (Fragment)
//	1122  what no ICMP error may be about (section 3.2.2: TooBig, HostUnreachable)
//	1191  path MTU discovery and its plateaus (PathMTU)
//	1624  incremental update of header checksums (internal/ipv4)
//	2003  IP in IP (Outer, Decapsulate, PathMTU, Reachability)
//	2983  DSCP: the uniform model at the ingress, if inherited; the inner one is kept at the egress
//	4884  ICMP extensions behind a quoted packet (ParseError)
//	6040  ECN in tunnels, normal mode (ecn.go)
//	6864  the outer identification (Outer.Encapsulate)
//
// Limits: IPv4 in IPv4 only. The outer header never has options. Fragments of
// outer packets are reassembled by the kernel, not here. By RouterOS's default,
// and against RFC 2003, section 3.1, outer packets have DF=0 even where the
// inner one has DF=1; Outer.DontFragmentInherit keeps the RFC. The inner TTL is left alone:
// whoever forwards the packet, the kernel, counts the hop.
package encap

import (
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

const (
	// Overhead is what encapsulation adds to a packet, in bytes.
	Overhead = ipv4.HeaderLen
	// MaxInner is the longest inner packet, in bytes.
	MaxInner = ipv4.MaxTotalLen - Overhead
	// InheritDSCP as Outer.DSCP copies the inner packet's.
	InheritDSCP = -1

	// maxNesting is how many headers of an inner packet the look for a loop
	// reads: enough for tunnels inside each other as anyone builds them, and a
	// bound on the work that a hostile packet can cause.
	maxNesting = 4

	// probeTTL is the outer TTL of a probe that has no inner packet to inherit
	// one from.
	probeTTL = 255
)

// Outer is how a tunnel makes its outer headers. It is built once for a tunnel
// and path, and not changed while in use.
type Outer struct {
	// Local and Remote are the outer source and destination.
	Local, Remote [4]byte
	// DSCP is 0 to 63, or InheritDSCP.
	DSCP int
	// DontFragmentInherit copies the inner packet's DF; if it is false, outer DF is 0.
	DontFragmentInherit bool
	// TTL is 1 to 255; 0 copies the inner packet's.
	TTL uint8
}

// DontFragment reports whether the outer packet of inner has DF=1, so that, if
// it is longer than the path MTU, the inner sender has to be told (TooBig).
func (o *Outer) DontFragment(inner ipv4.Packet) bool { return o.DontFragmentInherit && inner.DF() }

// Encapsulate puts the outer header in front of inner, which must be the packet
// that b holds; what b holds behind it is trimmed. The length is not compared to
// any MTU: see DontFragment. If it returns a Drop, b is as it was.
//
// id is the identification of an outer packet with DF=0; it must not repeat
// within the lifetime of a packet (RFC 6864, section 4.3) nor be 0, for which a
// raw socket puts in one of its own. With DF=1 the identification means nothing
// and is 0 (section 4.1).
func (o *Outer) Encapsulate(b *packet.Buffer, inner ipv4.Packet, id uint16) Drop {
	if inner.TTL() == 0 {
		return DropInnerTTLZero // RFC 2003, section 3.1
	}
	if inner.TotalLen() > MaxInner {
		return DropInnerTooLong
	}
	if o.loops(inner) {
		return DropLoop
	}
	b.Trim(inner.TotalLen())
	o.push(b, inner.TOS(), inner.TTL(), inner.DF(), id)
	return DropNone
}

// EncapsulateProbe is Encapsulate for what keepalive sends: without the look for
// a loop, because a reflect probe is one on purpose, and also around nothing at
// all, the empty probe, which has a TOS of 0, or o.DSCP, and DF=0.
func (o *Outer) EncapsulateProbe(b *packet.Buffer, id uint16) Drop {
	if b.Len() == 0 {
		o.push(b, 0, probeTTL, false, id)
		return DropNone
	}
	inner, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return DropInnerMalformed
	}
	if inner.TTL() == 0 {
		return DropInnerTTLZero
	}
	if inner.TotalLen() > MaxInner {
		return DropInnerTooLong
	}
	b.Trim(inner.TotalLen())
	o.push(b, inner.TOS(), inner.TTL(), inner.DF(), id)
	return DropNone
}

// push writes the outer header in front of what b holds. tos, ttl and df are the
// inner packet's.
func (o *Outer) push(b *packet.Buffer, tos, ttl uint8, df bool, id uint16) {
	if o.DSCP != InheritDSCP {
		tos = uint8(o.DSCP)<<2 | tos&3 // ECN is copied all the same: RFC 6040, section 4.1
	}
	if o.TTL != 0 {
		ttl = o.TTL
	}
	df = df && o.DontFragmentInherit
	if df {
		id = 0
	}
	total := Overhead + b.Len()
	header := ipv4.Header{
		TOS: tos, TotalLen: total, ID: id, DF: df, TTL: ttl, Protocol: ipv4.ProtocolIPIP,
		Source: o.Local, Destination: o.Remote,
	}
	header.Put(b.Push(Overhead))
}

// loops reports whether sending inner through the tunnel would go round in a
// circle (RFC 2003, section 3.2): because it comes from the address of the
// tunnel's far end; or because it is an outer packet of this tunnel, routed back
// into it, alone or inside the outer packets of other tunnels.
func (o *Outer) loops(inner ipv4.Packet) bool {
	if inner.Source() == o.Remote {
		return true
	}
	if inner.Source() == o.Local && inner.Destination() == o.Remote {
		return true
	}
	if inner.Protocol() != ipv4.ProtocolIPIP || inner.FragmentOffset() != 0 {
		return false // the common case; a later fragment has no header to read
	}
	b := inner.Payload()
	for range maxNesting - 1 {
		// The nested packet may be cut short by fragmentation: this reads the
		// header and leaves the judgement of it to whom it is addressed.
		h, headerLen, err := ipv4.ParseHeader(b)
		if err != nil {
			return false
		}
		if h.Source == o.Local && h.Destination == o.Remote {
			return true
		}
		if h.Protocol != ipv4.ProtocolIPIP || h.FragmentOffset != 0 {
			return false
		}
		b = b[headerLen:]
	}
	return false
}
