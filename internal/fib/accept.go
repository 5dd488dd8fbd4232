package fib

import (
	"net/netip"

	"ipipd/internal/drop"
)

// Acceptance says who may send to an interface with many remotes, and what. The zero value is the strict
// reverse path: only a remote that the route to the inner source leads to. It is immutable once
// in use. It keeps no state of packets, so that spoofed outer sources fill nothing.
type Acceptance struct {
	// AnyPeer accepts any inner source from a gateway of any route of the interface.
	AnyPeer bool
	// From are outer sources that may send any inner source, beside those whom the routes allow.
	From Prefixes
	// To are the inner destinations that packets may have; empty is any.
	To Prefixes
}

// Check returns drop.None if a packet is accepted. Addresses are in network byte order.
func (a *Acceptance) Check(t *Table, outerSource, innerSource, innerDestination [4]byte) drop.Reason {
	switch {
	case !a.From.Contains(outerSource) && !t.leadsTo(innerSource, outerSource) && !(a.AnyPeer && t.HasRemote(outerSource)):
		return a.refusal()
	case a.To.Len() > 0 && !a.To.Contains(innerDestination):
		return drop.NotInAcceptTo
	}
	return drop.None
}

// CheckSender returns drop.None if some packet from an outer source can be accepted, otherwise the reason to drop them all.
func (a *Acceptance) CheckSender(t *Table, outerSource [4]byte) drop.Reason {
	if a.From.Contains(outerSource) || t.HasRemote(outerSource) {
		return drop.None
	}
	return a.refusal()
}

// refusal returns the reason to drop a packet that its outer source may not send.
func (a *Acceptance) refusal() drop.Reason {
	if a.AnyPeer || a.From.Len() > 0 {
		return drop.NotInAcceptFrom
	}
	return drop.ReversePath
}

// Prefixes is an immutable set of addresses. The zero value is empty.
type Prefixes struct{ set trie[struct{}] }

// NewPrefixes makes the set of all addresses of these prefixes.
func NewPrefixes(prefixes []netip.Prefix) Prefixes {
	e := new(trie[struct{}]).edit()
	for _, p := range prefixes {
		if p = p.Masked(); p.Addr().Is4() {
			e.set(key(p.Addr().As4()), p.Bits(), struct{}{})
		}
	}
	return Prefixes{e.commit()}
}

// Len returns the number of prefixes.
func (p *Prefixes) Len() int { return p.set.n }

// Contains reports whether an address, in network byte order, is in any of the prefixes.
func (p *Prefixes) Contains(a [4]byte) bool { return p.set.lookup(key(a)) != nil }
