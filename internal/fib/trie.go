package fib

import "math/bits"

// stride is how many bits of an address a node of a trie looks at: as many as let each of its bitmaps be
// one word, and a node one cache line.
const stride = 6

// lead is how many zero bits the root looks at before an address, so that prefixes of 24 bits, the most common ones,
// are the longest of a node, 32 in one, and need no node of their own.
const lead = 5

// start returns lead zero bits and an address, from the most significant bit on: what a trie looks at.
func start(address uint32) uint64 { return uint64(address) << (64 - 32 - lead) }

// trie maps IPv4 prefixes to values: a multibit trie whose nodes store only the values and children that
// exist, found by counting bits ("tree bitmap", Eatherton and others, 2004). What is reachable from a
// trie never changes, so that lookup needs no lock.
type trie[V any] struct {
	root node[V]
	n    int // prefixes
}

// node has the prefixes that begin with the bits that lead to it, up to the next stride.
type node[V any] struct {
	// prefixes has bit 1<<length | bits for each prefix of length further bits, fewer than stride.
	prefixes uint64
	longer   uint64    // has bit x for the child that the next stride bits x lead to
	values   []V       // of each prefix, in the order of prefixes
	children []node[V] // in the order of longer
}

// shorter has, for each value of stride bits, the bits of node.prefixes of the prefixes that contain it: the
// longest one is the highest bit.
var shorter = func() (masks [1 << stride]uint64) {
	for x := range masks {
		for i := (1<<stride | x) >> 1; i > 0; i >>= 1 {
			masks[x] |= 1 << i
		}
	}
	return masks
}()

// rank returns how many bits of a word are set below bit i: the index in a slice of the item of bit i.
func rank(word uint64, i int) int { return bits.OnesCount64(word & (1<<(i&63) - 1)) }

// lookup returns the value of the longest prefix that contains an address, which is not to be changed; nil if none does.
func (t *trie[V]) lookup(address uint32) *V {
	var best *node[V]
	var matches uint64 // of best
	n, rest := &t.root, start(address)
	for {
		x := int(rest >> (64 - stride))
		if m := n.prefixes & shorter[x]; m != 0 {
			best, matches = n, m
		}
		if n.longer>>x&1 == 0 {
			break
		}
		n = &n.children[rank(n.longer, x)]
		rest <<= stride
	}
	if best == nil {
		return nil
	}
	return &best.values[rank(best.prefixes, bits.Len64(matches)-1)]
}

// get returns the value of exactly one prefix; nil if there is none.
func (t *trie[V]) get(address uint32, length int) *V {
	n, rest := &t.root, start(address)
	for length += lead; length >= stride; length -= stride {
		x := int(rest >> (64 - stride))
		if n.longer>>x&1 == 0 {
			return nil
		}
		n = &n.children[rank(n.longer, x)]
		rest <<= stride
	}
	if i := index(rest, length); n.prefixes>>i&1 != 0 {
		return &n.values[rank(n.prefixes, i)]
	}
	return nil
}

// index returns the bit of node.prefixes for the prefix in the first length bits of rest, fewer than stride.
func index(rest uint64, length int) int { return 1<<length | int(rest>>(64-stride))>>(stride-length) }

// edit is a trie that is being changed. The trie that it began from stays as it is: slices on the way to a
// change are copied, once each.
type edit[V any] struct {
	trie[V]
	own map[*node[V]]bool // the first element of each slice of children that this edit has made
}

func (t *trie[V]) edit() edit[V] { return edit[V]{*t, map[*node[V]]bool{}} }

// commit returns the changed trie, no part of which the edit may change from now on.
func (e *edit[V]) commit() trie[V] {
	clear(e.own)
	return e.trie
}

// set gives a prefix a value. The bits of the address after the length must be 0.
func (e *edit[V]) set(address uint32, length int, value V) {
	n, rest := &e.root, start(address)
	for length += lead; length >= stride; length -= stride {
		x := int(rest >> (64 - stride))
		at := rank(n.longer, x)
		if n.longer>>x&1 == 0 {
			n.children = insert(n.children, at, node[V]{})
			n.longer |= 1 << x
			e.own[&n.children[0]] = true
		} else {
			e.copyChildren(n)
		}
		n = &n.children[at]
		rest <<= stride
	}
	i := index(rest, length)
	at := rank(n.prefixes, i)
	if n.prefixes>>i&1 != 0 {
		n.values = append([]V(nil), n.values...)
		n.values[at] = value
		return
	}
	n.values = insert(n.values, at, value)
	n.prefixes |= 1 << i
	e.n++
}

// remove removes a prefix, if it is there.
func (e *edit[V]) remove(address uint32, length int) {
	if e.get(address, length) == nil {
		return
	}
	e.n--
	e.removeFrom(&e.root, start(address), lead+length)
}

func (e *edit[V]) removeFrom(n *node[V], rest uint64, length int) {
	if length < stride {
		i := index(rest, length)
		n.values = without(n.values, rank(n.prefixes, i))
		n.prefixes &^= 1 << i
		return
	}
	x := int(rest >> (64 - stride))
	at := rank(n.longer, x)
	e.copyChildren(n)
	child := &n.children[at]
	if e.removeFrom(child, rest<<stride, length-stride); child.prefixes|child.longer != 0 {
		return
	}
	n.children = without(n.children, at)
	if n.longer &^= 1 << x; n.longer != 0 {
		e.own[&n.children[0]] = true
	}
}

// copyChildren makes the children of a node the edit's own.
func (e *edit[V]) copyChildren(n *node[V]) {
	if !e.own[&n.children[0]] {
		n.children = append([]node[V](nil), n.children...)
		e.own[&n.children[0]] = true
	}
}

// insert and without return a changed copy of s without spare capacity.
func insert[T any](s []T, at int, item T) []T {
	next := make([]T, len(s)+1)
	copy(next, s[:at])
	next[at] = item
	copy(next[at+1:], s[at:])
	return next
}

func without[T any](s []T, at int) []T {
	if len(s) == 1 {
		return nil
	}
	next := make([]T, len(s)-1)
	copy(next, s[:at])
	copy(next[at:], s[at+1:])
	return next
}
