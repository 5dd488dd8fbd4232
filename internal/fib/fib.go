// Package fib is the forwarding table of an interface with many remotes, as Linux's own tunl0: the
// kernel's routes out of the interface say which remote a packet goes to, and who may send.
//
// The outer destination is the gateway of the route to the inner one, or the inner destination itself
// if that route has none. A Table has the best route of each prefix: the one with the least metric,
// of all routing tables that have one. Of several next hops a flow keeps to one. The kernel has
// already chosen a route when a packet reaches the interface, but does not tell which; so where two
// tables have different routes for a packet and a rule chooses by something else than its
// destination, the longest prefix decides here.
//
// A Table is immutable: any number of goroutines look up in it, without a lock or an allocation,
// while an Edit makes the next one, at a cost of what it changes. Acceptance says who may send.
// Functions on bytes only; IPv4 only. Routes with a TOS are left out.
package fib

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// Route is one route for a prefix, of one routing table.
type Route struct {
	Table, Metric uint32
	TOS           uint8 // not 0: the route is left out
	Protocol      uint8 // who has made it (rtm_protocol); no look-up depends on it
	// Unreachable: it leads nowhere, as of the types unreachable, blackhole and prohibit.
	Unreachable bool
	// Hops are its next hops out of the interface; one, unless the route is ECMP.
	Hops []Hop
}

// Hop is a next hop of a Route.
type Hop struct {
	// Gateway is the remote, in network byte order; if it is zero, the inner destination is the remote.
	Gateway [4]byte
	// Weight is its share of the flows; 0 means 1.
	Weight uint16
	// Unusable: its gateway is no IPv4 address, or it has an encapsulation of its own (lwtunnel).
	Unusable bool
}

// Table is an immutable forwarding table. The zero value has no routes.
type Table struct {
	routes   trie[entry]
	several  trie[*hops] // the next hops of the entries that have several
	gateways trie[references]
}

// Entry is the route that Table.Find has found, for Table.RemoteBy; nil if there is none.
type Entry entry

// entry is what a prefix's best route says. It is small, since a look-up of 10,000 prefixes waits for memory
// more than for anything else.
type entry struct {
	gateway [4]byte // zero if the hop has none, or if several
	// why is not drop.None if there is no hop to use: then packets are dropped, and not sent to another
	// remote by a shorter prefix.
	why     drop.Reason
	several bool // ECMP: the next hops are in Table.several, under the same prefix
}

type hops struct {
	total uint32 // of the weights
	hops  []Hop
}

// references counts the prefixes with a next hop that has the gateway.
type references int

// Remote returns the remote to send an inner packet to, in network byte order. Unless why is drop.None, drop the packet.
func (t *Table) Remote(inner ipv4.Packet) (remote [4]byte, why drop.Reason) {
	return t.RemoteBy(t.Find(inner), inner)
}

// Find and RemoteBy are Remote in two steps: done for a batch, the cache misses of many packets overlap.
func (t *Table) Find(inner ipv4.Packet) *Entry {
	return (*Entry)(t.routes.lookup(key(inner.Destination())))
}

// RemoteBy is Remote, given the Entry that Find has returned for the packet.
func (t *Table) RemoteBy(e *Entry, inner ipv4.Packet) (remote [4]byte, why drop.Reason) {
	switch {
	case e == nil:
		return remote, drop.NoRemote
	case e.why != drop.None:
		return remote, e.why
	}
	remote = e.gateway
	if e.several {
		remote = t.hopsFor(inner.Destination()).of(flowHash(inner))
	}
	if remote == [4]byte{} {
		if remote = inner.Destination(); !isUnicast(remote) {
			return remote, drop.RemoteNotUsable
		}
	}
	return remote, drop.None
}

// hopsFor returns the next hops for an inner destination whose entry has several: both tries have the same longest prefix.
func (t *Table) hopsFor(destination [4]byte) *hops { return *t.several.lookup(key(destination)) }

// of returns the gateway for a flow's hash: each hop has a share of all hashes, by its weight (RFC 2992).
func (h *hops) of(hash uint32) [4]byte {
	at := uint32(uint64(hash) * uint64(h.total) >> 32)
	for i := range h.hops {
		hop := &h.hops[i]
		if at < uint32(hop.Weight) {
			return hop.Gateway
		}
		at -= uint32(hop.Weight)
	}
	return h.hops[0].Gateway
}

// leadsTo reports whether packets to an inner address may be sent to a remote: a gateway of its route, or the
// address itself if the route has none.
func (t *Table) leadsTo(inner, remote [4]byte) bool {
	e := t.routes.lookup(key(inner))
	if e == nil || e.why != drop.None {
		return false
	}
	if !e.several {
		return e.gateway == remote && remote != [4]byte{} || e.gateway == [4]byte{} && inner == remote
	}
	for _, hop := range t.hopsFor(inner).hops {
		g := hop.Gateway
		if g == [4]byte{} {
			g = inner
		}
		if g == remote {
			return true
		}
	}
	return false
}

// HasRemote reports whether an address is a gateway of any route, or reached by a route without a gateway.
func (t *Table) HasRemote(a [4]byte) bool {
	return t.gateways.lookup(key(a)) != nil || t.leadsTo(a, a)
}

// Len returns the number of prefixes.
func (t *Table) Len() int { return t.routes.n }

// Edit makes a Table from another one. It is not safe for concurrent use.
type Edit struct {
	routes   edit[entry]
	several  edit[*hops]
	gateways edit[references]
	// before has, for each gateway that Set has touched, whether the Table had it.
	before map[[4]byte]bool
}

// Edit begins a change of t, which stays as it is.
func (t *Table) Edit() *Edit {
	return &Edit{routes: t.routes.edit(), several: t.several.edit(), gateways: t.gateways.edit(), before: map[[4]byte]bool{}}
}

// Set replaces all routes of a prefix, those of every routing table, by these. Of routes with the same table
// and metric the first one counts. The slice is not kept.
func (e *Edit) Set(prefix netip.Prefix, routes []Route) {
	prefix = prefix.Masked()
	if !prefix.Addr().Is4() {
		return
	}
	at, length := key(prefix.Addr().As4()), prefix.Bits()
	next, several, ok := best(routes)
	old := e.routes.get(at, length)
	switch {
	case ok:
		e.count(next, several, +1)
	case old == nil:
		return
	}
	if old != nil {
		var before *hops
		if old.several {
			before = *e.several.get(at, length)
		}
		e.count(*old, before, -1)
	}
	if ok {
		e.routes.set(at, length, next)
	} else {
		e.routes.remove(at, length)
	}
	if several != nil {
		e.several.set(at, length, several)
	} else {
		e.several.remove(at, length)
	}
}

// count adds n to the references of each gateway of an entry.
func (e *Edit) count(of entry, several *hops, n references) {
	if several == nil {
		e.countGateway(of.gateway, n)
		return
	}
	for i := range several.hops {
		g := several.hops[i].Gateway
		if !slices.ContainsFunc(several.hops[:i], func(h Hop) bool { return h.Gateway == g }) {
			e.countGateway(g, n)
		}
	}
}

func (e *Edit) countGateway(g [4]byte, n references) {
	if g == [4]byte{} {
		return
	}
	at, before := key(g), references(0)
	if old := e.gateways.get(at, 32); old != nil {
		before = *old
	}
	if _, ok := e.before[g]; !ok {
		e.before[g] = before > 0
	}
	if before+n > 0 {
		e.gateways.set(at, 32, before+n)
	} else {
		e.gateways.remove(at, 32)
	}
}

// Commit ends the Edit. added and removed are the gateways that only t, or only the Table before, has.
func (e *Edit) Commit() (t *Table, added, removed [][4]byte) {
	t = &Table{routes: e.routes.commit(), several: e.several.commit(), gateways: e.gateways.commit()}
	for g, before := range e.before {
		switch now := t.gateways.lookup(key(g)) != nil; {
		case now && !before:
			added = append(added, g)
		case before && !now:
			removed = append(removed, g)
		}
	}
	return t, added, removed
}

// best returns the entry for a prefix's routes, with its next hops if there are several; not ok if there is no route.
func best(routes []Route) (e entry, several *hops, ok bool) {
	var best *Route
	for i := range routes {
		if r := &routes[i]; r.TOS == 0 && (best == nil || compare(r, best) < 0) {
			best = r
		}
	}
	switch {
	case best == nil:
		return e, nil, false
	case best.Unreachable:
		return entry{why: drop.NoRemote}, nil, true
	}
	var usable hops
	for _, h := range best.Hops {
		if h.Unusable || h.Gateway != [4]byte{} && !isUnicast(h.Gateway) {
			continue
		}
		h.Weight = max(h.Weight, 1)
		usable.hops, usable.total = append(usable.hops, h), usable.total+uint32(h.Weight)
	}
	switch len(usable.hops) {
	case 0:
		return entry{why: drop.RemoteNotUsable}, nil, true
	case 1:
		return entry{gateway: usable.hops[0].Gateway}, nil, true
	}
	usable.hops = slices.Clip(usable.hops)
	return entry{several: true}, &usable, true
}

// compare orders the routes for one prefix: by metric, then those that lead nowhere last, then by table.
func compare(a, b *Route) int {
	if n := cmp.Compare(a.Metric, b.Metric); n != 0 {
		return n
	}
	if a.Unreachable != b.Unreachable {
		if a.Unreachable {
			return 1
		}
		return -1
	}
	return cmp.Or(cmp.Compare(late(a.Table), late(b.Table)), cmp.Compare(a.Table, b.Table))
}

// late returns 1 for the kernel's own tables: the rules for other tables come before those for main and default.
func late(table uint32) int {
	if table >= 253 && table <= 255 {
		return 1
	}
	return 0
}

// isUnicast reports whether an address may be a host's (RFC 1122, section 3.2.1.3).
func isUnicast(a [4]byte) bool {
	return a[0] != 0 && a[0] != 127 && a[0]&0xf0 != 224 && a != [4]byte{255, 255, 255, 255}
}

// flowHash returns a hash of the inner addresses and protocol and, unless the packet is a fragment, of the
// ports of TCP and UDP.
func flowHash(p ipv4.Packet) uint32 {
	source, destination := p.Source(), p.Destination()
	a := uint64(key(source))<<32 | uint64(key(destination))
	b := uint64(p.Protocol())
	if ports := p.Payload(); !p.IsFragment() && len(ports) >= 4 {
		switch p.Protocol() {
		case ipv4.ProtocolTCP, ipv4.ProtocolUDP:
			b |= uint64(binary.BigEndian.Uint32(ports)) << 32
		}
	}
	// Two odd constants of wyhash; the product mixes every bit into the upper half.
	high, low := bits.Mul64(a^0xa0761d6478bd642f, b^0xe7037ed1a0b428db)
	high, low = bits.Mul64(high^low, 0x8ebc6af09c88c6e3)
	return uint32((high ^ low) >> 32)
}

func key(a [4]byte) uint32 { return binary.BigEndian.Uint32(a[:]) }
