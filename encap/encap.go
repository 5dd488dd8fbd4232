// Package encap has the rules of IP in IP encapsulation (RFC 2003).
//
// They are functions on bytes, without sockets, clocks, goroutines, logs or allocations.
// Outer.Encapsulate adds the outer header to an inner packet; ParseOuter and Decapsulate check a
// received packet and remove the outer header; Fragment fragments a packet; TooBig makes the
// ICMP error for an inner sender; ParseError parses an ICMP error from the outer path; PathMTU
// and Reachability are a tunnel's soft state about that path. A packet is dropped for a named
// reason, a drop.Reason.
//
// RFCs, and where they are implemented:
//
//	 791  fragmentation (Fragment)
//	1122  packets that no ICMP error may be about (section 3.2.2: TooBig, HostUnreachable)
//	1191  path MTU discovery and its plateaus (PathMTU)
//	1624  incremental update of header checksums (internal/ipv4)
//	2003  IP in IP (Outer, Decapsulate, PathMTU, Reachability)
//	2983  DSCP: the uniform model at the ingress, if inherited; the inner DSCP is kept at the egress
//	4884  ICMP extensions after a quoted packet (ParseError)
//	6040  ECN in tunnels, normal mode (ecn.go)
//	6864  the outer identification (Outer.Encapsulate)
//
// Limits: IPv4 in IPv4 only. The outer header has no options. The kernel reassembles outer
// fragments. As RouterOS does by default, and against RFC 2003, section 3.1, outer packets have
// DF=0 even if the inner one has DF=1; Outer.DontFragmentInherit follows the RFC. The inner TTL
// is not decremented here: the kernel that forwards the packet does that.
package encap

import (
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

const (
	// Overhead is what encapsulation adds to a packet, in bytes.
	Overhead = ipv4.HeaderLen
	// MaxInner is the length of the longest inner packet, in bytes.
	MaxInner = ipv4.MaxTotalLen - Overhead
	// InheritDSCP, as Outer.DSCP, copies the inner packet's DSCP.
	InheritDSCP = -1

	// maxNesting is how many nested headers the loop check reads. It bounds the work that a
	// hostile packet can cause.
	maxNesting = 4

	// probeTTL is the outer TTL of an empty probe, which has no inner TTL to inherit.
	probeTTL = 255
)

// Outer has the settings of a tunnel's outer headers. It is immutable once in use.
type Outer struct {
	// Local and Remote are the outer source and destination, in network byte order.
	Local, Remote [4]byte
	// DSCP is 0 to 63, or InheritDSCP.
	DSCP int
	// DontFragmentInherit copies the inner packet's DF; otherwise the outer DF is 0.
	DontFragmentInherit bool
	// TTL is 1 to 255; 0 copies the inner packet's TTL.
	TTL uint8
	// Many: Remote is one of many, so that an outer packet of the tunnel may have any destination.
	Many bool
}

// DontFragment reports whether the outer packet of inner has DF=1. If it is also longer than the
// path MTU, the inner sender must get an ICMP error (TooBig).
func (o *Outer) DontFragment(inner ipv4.Packet) bool { return o.DontFragmentInherit && inner.DF() }

// Encapsulate adds the outer header to inner, which must be the packet in b; bytes after it are
// trimmed. It does not check the length against an MTU: see DontFragment. If it returns a drop.Reason,
// b is unchanged.
//
// id is the identification of an outer packet with DF=0. It must be unique within the lifetime
// of a packet (RFC 6864, section 4.3), and not 0, which a raw socket replaces by an ID of its
// own. With DF=1 the identification is 0 and means nothing (section 4.1).
func (o *Outer) Encapsulate(b *packet.Buffer, inner ipv4.Packet, id uint16) drop.Reason {
	if inner.TTL() == 0 {
		return drop.InnerTTLZero // RFC 2003, section 3.1
	}
	if inner.TotalLen() > MaxInner {
		return drop.InnerTooLong
	}
	if o.Loops(inner) {
		return drop.Loop
	}
	b.Trim(inner.TotalLen())
	o.pushHeader(b, inner.TOS(), inner.TTL(), inner.DF(), id)
	return drop.None
}

// EncapsulateProbe is Encapsulate for keepalive probes: without the loop check, because a
// reflect probe is a loop. If b is empty, it makes the empty probe, a bare outer header with
// DF=0 and a TOS of o.DSCP, or 0.
func (o *Outer) EncapsulateProbe(b *packet.Buffer, id uint16) drop.Reason {
	if b.Len() == 0 {
		o.pushHeader(b, 0, probeTTL, false, id)
		return drop.None
	}
	inner, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return drop.InnerMalformed
	}
	if inner.TTL() == 0 {
		return drop.InnerTTLZero
	}
	if inner.TotalLen() > MaxInner {
		return drop.InnerTooLong
	}
	b.Trim(inner.TotalLen())
	o.pushHeader(b, inner.TOS(), inner.TTL(), inner.DF(), id)
	return drop.None
}

// pushHeader writes the outer header in front of the packet in b. tos, ttl and df are the inner
// packet's.
func (o *Outer) pushHeader(b *packet.Buffer, tos, ttl uint8, df bool, id uint16) {
	if o.DSCP != InheritDSCP {
		tos = uint8(o.DSCP)<<2 | tos&3 // ECN is copied in any case: RFC 6040, section 4.1
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

// LoopsFrom is Outer.Loops for a tunnel without a local address, whose outer source depends on the remote: sources has all
// of these, remote is the outer destination that inner would get. An IPIP packet to remote around a packet to remote is a
// loop, too.
func LoopsFrom(inner ipv4.Packet, sources map[[4]byte]bool, remote [4]byte) bool {
	h, headerLen, b := inner.Header(), inner.HeaderLen(), inner.Bytes()
	for depth := range maxNesting {
		if h.Protocol != ipv4.ProtocolIPIP {
			return false
		}
		if sources[h.Source] {
			return true
		}
		if h.FragmentOffset != 0 {
			return false
		}
		to, err := h.Destination, error(nil)
		b = b[headerLen:]
		if h, headerLen, err = ipv4.ParseHeader(b); err != nil {
			return false
		}
		if depth == 0 && to == remote && h.Destination == remote {
			return true
		}
	}
	return false
}

// Loops reports whether sending inner would be a loop (RFC 2003, section 3.2): its source is the
// remote end, or it is an outer packet of this tunnel, maybe inside outer packets of other
// tunnels.
func (o *Outer) Loops(inner ipv4.Packet) bool {
	if inner.Source() == o.Remote {
		return true
	}
	if inner.Source() == o.Local && (inner.Destination() == o.Remote || o.Many && inner.Protocol() == ipv4.ProtocolIPIP) {
		return true
	}
	if inner.Protocol() != ipv4.ProtocolIPIP || inner.FragmentOffset() != 0 {
		return false // the common case; a later fragment has no inner header
	}
	b := inner.Payload()
	for range maxNesting - 1 {
		// Fragmentation may have truncated the nested packet: only its header is parsed.
		h, headerLen, err := ipv4.ParseHeader(b)
		if err != nil {
			return false
		}
		if h.Source == o.Local && (h.Destination == o.Remote || o.Many && h.Protocol == ipv4.ProtocolIPIP) {
			return true
		}
		if h.Protocol != ipv4.ProtocolIPIP || h.FragmentOffset != 0 {
			return false
		}
		b = b[headerLen:]
	}
	return false
}
