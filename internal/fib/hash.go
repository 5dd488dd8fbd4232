package fib

import "math/rand/v2"

// Hash is a hash function of keys to 64 bits: two random odd multipliers, so that nobody can choose keys whose hashes are
// the same. With a single one, consecutive prefixes would crowd into few buckets for one multiplier in a hundred.
// find_route of the eBPF programs is another copy of it.
type Hash [2]uint64

// NewHash returns a Hash with random multipliers.
func NewHash() Hash { return Hash{rand.Uint64() | 1, rand.Uint64() | 1} }

// Of returns the hash of a key. Use its high bits: they are mixed best.
func (h *Hash) Of(key uint64) uint64 {
	product := key * h[0]
	return (product ^ product>>32) * h[1]
}
