package fib

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"net/netip"

	"ipipd/internal/drop"
)

// Next is where the best route of a prefix leads, for a copy of the Table such as the fast path's.
type Next struct {
	Kind    NextKind
	Gateway [4]byte // if Kind is Via, in network byte order
}

// NextKind is how many next hops there are, and of which kind.
type NextKind uint8

const (
	// Several is ECMP, each next hop with a gateway: a flow keeps to one.
	Several NextKind = iota
	// Via is one gateway.
	Via
	// Direct is without a gateway: the inner destination is the remote.
	Direct
	// Nowhere: packets are dropped.
	Nowhere
	// Mixed is ECMP with a next hop that has no gateway.
	Mixed
)

// next returns where the entry of a prefix leads.
func (t *Table) next(prefix netip.Prefix, e *entry) Next {
	switch {
	case e.why != drop.None:
		return Next{Kind: Nowhere}
	case e.several:
		for _, hop := range (*t.several.get(key(prefix.Addr().As4()), prefix.Bits())).hops {
			if hop.Gateway == [4]byte{} {
				return Next{Kind: Mixed}
			}
		}
		return Next{Kind: Several}
	case e.gateway == [4]byte{}:
		return Next{Kind: Direct}
	}
	return Next{Via, e.gateway}
}

// Next returns where exactly this prefix leads; not ok if there is no route for it.
func (t *Table) Next(prefix netip.Prefix) (n Next, ok bool) {
	prefix = prefix.Masked()
	if !prefix.Addr().Is4() {
		return n, false
	}
	e := t.routes.get(key(prefix.Addr().As4()), prefix.Bits())
	if e == nil {
		return n, false
	}
	return t.next(prefix, e), true
}

// All goes through all prefixes, in no order.
func (t *Table) All() iter.Seq2[netip.Prefix, Next] {
	return func(yield func(netip.Prefix, Next) bool) {
		t.routes.all(func(p netip.Prefix, e *entry) bool { return yield(p, t.next(p, e)) })
	}
}

// Gateways goes through all gateways, in no order.
func (t *Table) Gateways() iter.Seq[[4]byte] {
	return func(yield func([4]byte) bool) {
		t.gateways.all(func(p netip.Prefix, _ *references) bool { return yield(p.Addr().As4()) })
	}
}

// HasGateway reports whether an address is the gateway of a route.
func (t *Table) HasGateway(a [4]byte) bool { return t.gateways.lookup(key(a)) != nil }

// all calls yield for each prefix until it returns false.
func (t *trie[V]) all(yield func(netip.Prefix, *V) bool) { t.root.all(0, 0, yield) }

// all calls yield for each prefix of a node and those below it. address has the depth bits that lead to the node,
// laid out as by start.
func (n *node[V]) all(address uint64, depth int, yield func(netip.Prefix, *V) bool) bool {
	at := 0
	for i := 1; i < 1<<stride; i++ {
		if n.prefixes>>i&1 == 0 {
			continue
		}
		length := bits.Len(uint(i)) - 1
		if !yield(prefixOf(address|uint64(i&^(1<<length))<<(64-depth-length), depth+length), &n.values[at]) {
			return false
		}
		at++
	}
	for x, at := 0, 0; x < 1<<stride; x++ {
		if n.longer>>x&1 == 0 {
			continue
		}
		if !n.children[at].all(address|uint64(x)<<(64-depth-stride), depth+stride, yield) {
			return false
		}
		at++
	}
	return true
}

// prefixOf returns the prefix in the first length bits of a word that is laid out as by start.
func prefixOf(word uint64, length int) netip.Prefix {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], uint32(word>>(64-32-lead)))
	return netip.PrefixFrom(netip.AddrFrom4(a), length-lead)
}
