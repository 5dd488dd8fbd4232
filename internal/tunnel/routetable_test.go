package tunnel

import (
	"encoding/binary"
	"testing"
	"unsafe"
)

func TestRouteTable_find(t *testing.T) {
	for _, n := range []int{0, 1, 2, 3, 1000, maxRemotes} {
		all := map[[4]byte]*route{}
		at := func(i int) (g [4]byte) {
			binary.BigEndian.PutUint32(g[:], uint32(i)<<8)
			return g
		}
		for i := range n {
			all[at(i)] = new(route)
		}
		table := newRouteTable(all)
		for i := range 2*n + 10 {
			if table.find(at(i)) != all[at(i)] {
				t.Fatalf("of %d routes that to %v is another one", n, at(i))
			}
		}
	}
}

// Addresses with a pattern do not collide much, whatever the multipliers of the hash are.
func TestRouteTable_slot(t *testing.T) {
	for name, at := range map[string]func(i int) [4]byte{
		"each":              func(i int) [4]byte { return [4]byte{10, 0, byte(i >> 8), byte(i)} },
		"every fourth":      func(i int) [4]byte { return [4]byte{10, 0, byte(i >> 6), byte(i << 2)} },
		"one of each /24":   func(i int) [4]byte { return [4]byte{10, byte(i >> 8), byte(i), 1} },
		"four of each /24":  func(i int) [4]byte { return [4]byte{10, 0, byte(i >> 2), byte(i&3 + 1)} },
		"one of each /16":   func(i int) [4]byte { return [4]byte{100 + byte(i>>8), byte(i), 0, 1} },
		"other byte orders": func(i int) [4]byte { return [4]byte{byte(i), byte(i >> 8), 0, 10} },
	} {
		all := map[[4]byte]*route{}
		for i := range 1000 {
			all[at(i)] = new(route)
		}
		for range 200 { // multipliers
			table, looked := newRouteTable(all), 0
			for remote := range all {
				at := (uintptr(unsafe.Pointer(table.slot(remote))) - uintptr(unsafe.Pointer(&table.slots[0]))) / unsafe.Sizeof(routeSlot{})
				looked += (int(at)-table.index(remote))&(len(table.slots)-1) + 1
			}
			if average := float64(looked) / float64(len(all)); average > 2.5 {
				t.Fatalf("%s: a look-up looks at %.1f slots: %x", name, average, table.hash)
			}
		}
	}
}

// The fields of a route that the data path reads for each packet are in one cache line.
func TestRoute_cacheLine(t *testing.T) {
	const line = 64
	var r route
	if unsafe.Sizeof(r)%line != 0 || unsafe.Offsetof(r.path)+unsafe.Sizeof(r.path.Link) > line {
		t.Errorf("%d bytes, Link at %d", unsafe.Sizeof(r), unsafe.Offsetof(r.path))
	}
}
