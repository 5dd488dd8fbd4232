package netstate

import (
	"encoding/binary"
	"slices"
)

// key is something that a message may be about, and that a follower depends on.
type key struct {
	kind    keyKind
	n       int // an ifindex, or a prefix's length
	address [4]byte
	name    string
}

type keyKind uint8

const (
	byAddress   keyKind = iota // address: a route or an address whose prefix covers it
	byDevice                   // n: the device of the route, or of the route back
	byInterface                // n: Query.Interface
	byAbsence                  // Query.Interface does not exist here
	byNeighbour                // n, address
	byPrefix                   // address, n: a route of exactly that prefix
	byName                     // name: Query.UnderlayDevice
	byNexthop                  // any next-hop object
	byAnyLink                  // any link
)

// keyIndex finds the followers that a message concerns. The Host's mu guards it.
type keyIndex struct {
	sets map[key]map[*Follower]bool
	// addresses are the addresses of the keys byAddress, sorted, in the host's byte order.
	addresses []uint32
}

func (x *keyIndex) add(k key, f *Follower) {
	set := x.sets[k]
	if set == nil {
		set = map[*Follower]bool{}
		x.sets[k] = set
		if k.kind == byAddress {
			a := binary.BigEndian.Uint32(k.address[:])
			at, _ := slices.BinarySearch(x.addresses, a)
			x.addresses = slices.Insert(x.addresses, at, a)
		}
	}
	set[f] = true
}

// remove removes a follower from a key, and reports whether it was the key's last one.
func (x *keyIndex) remove(k key, f *Follower) (last bool) {
	set := x.sets[k]
	delete(set, f)
	if len(set) > 0 {
		return false
	}
	delete(x.sets, k)
	if k.kind == byAddress {
		if at, ok := slices.BinarySearch(x.addresses, binary.BigEndian.Uint32(k.address[:])); ok {
			x.addresses = slices.Delete(x.addresses, at, at+1)
		}
	}
	return true
}

// markAllLocked marks the followers of a key.
func (h *Host) markAllLocked(k key, what dirty) {
	for f := range h.index.sets[k] {
		h.markLocked(f, what)
	}
}

// markRangeLocked marks for a route look-up the followers that depend on an address of the prefix, host bits ignored.
func (h *Host) markRangeLocked(prefix [4]byte, bits int) {
	hostBits := uint32(uint64(1)<<(32-min(bits, 32)) - 1)
	first := binary.BigEndian.Uint32(prefix[:]) &^ hostBits
	last := first | hostBits
	at, _ := slices.BinarySearch(h.index.addresses, first)
	for _, a := range h.index.addresses[at:] {
		if a > last {
			return
		}
		k := key{kind: byAddress}
		binary.BigEndian.PutUint32(k.address[:], a)
		h.markAllLocked(k, dirtyRoute)
	}
}
