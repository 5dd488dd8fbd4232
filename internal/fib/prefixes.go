package fib

import "ipipd/internal/drop"

// Prefixes returns the number of prefixes that a gateway is a next hop of.
func (t *Table) Prefixes(gateway [4]byte) int {
	if n := t.gateways.get(key(gateway), 32); n != nil {
		return int(*n)
	}
	return 0
}

// Routed returns the number of prefixes that lead to a remote, without those whose packets are dropped.
func (t *Table) Routed() (n int) {
	t.routes.root.each(func(e *entry) {
		if e.why == drop.None {
			n++
		}
	})
	return n
}

// each calls f for each value of a node and those below it.
func (n *node[V]) each(f func(*V)) {
	for i := range n.values {
		f(&n.values[i])
	}
	for i := range n.children {
		n.children[i].each(f)
	}
}
