package tunnel

import (
	"encoding/binary"
	"math/bits"

	"ipipd/internal/fib"
)

// routeTable are the routes to many remotes. It is immutable. Beside the map there is a hash table for the data
// path, in which a look-up waits for one cache line; in the map it waits for two.
type routeTable struct {
	all   map[[4]byte]*route
	slots []routeSlot // a power of two, at least twice len(all); a remote's is at its hash or, if that is taken, soon after
	shift uint8       // leaves the bits of a hash that are an index in slots
	hash  fib.Hash
}

type routeSlot struct {
	remote [4]byte
	route  *route // nil: the slot is free
}

// newRouteTable keeps all, which must not change from now on.
func newRouteTable(all map[[4]byte]*route) *routeTable {
	n := bits.Len(uint(2 * len(all)))
	t := &routeTable{all: all, slots: make([]routeSlot, 1<<n), shift: uint8(64 - n), hash: fib.NewHash()}
	for remote, r := range all {
		*t.slot(remote) = routeSlot{remote, r}
	}
	return t
}

// find returns the route to a remote; nil if it has none of its own.
func (t *routeTable) find(remote [4]byte) *route { return t.slot(remote).route }

// slot returns the slot of a remote, or the free one where it would be.
func (t *routeTable) slot(remote [4]byte) *routeSlot {
	for i := t.index(remote); ; i++ {
		if s := &t.slots[i&(len(t.slots)-1)]; s.route == nil || s.remote == remote {
			return s
		}
	}
}

// index returns where the slot of a remote is looked for first.
func (t *routeTable) index(remote [4]byte) int {
	return int(t.hash.Of(uint64(binary.NativeEndian.Uint32(remote[:]))) >> t.shift)
}
