package fib

import "math/rand/v2"

// Hash is a hash function of keys to 64 bits: two random odd multipliers, so that nobody can choose keys whose hashes are
// the same. By one product keys of a pattern, as prefixes that follow each other, crowd with one multiplier of a hundred.
// find_route of the eBPF programs is another copy of it.
type Hash [2]uint64

// NewHash returns one of its own.
func NewHash() Hash { return Hash{rand.Uint64() | 1, rand.Uint64() | 1} }

// Of is the hash of a key. The high bits are those to use.
func (h *Hash) Of(key uint64) uint64 {
	product := key * h[0]
	return (product ^ product>>32) * h[1]
}
