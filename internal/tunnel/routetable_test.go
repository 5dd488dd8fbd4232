package tunnel

import (
	"encoding/binary"
	"testing"
	"unsafe"
)

func TestRouteTable_of(t *testing.T) {
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
			if table.of(at(i)) != all[at(i)] {
				t.Fatalf("of %d routes that to %v is another one", n, at(i))
			}
		}
	}
}

// What the data path reads of a route is in one cache line.
func TestRoute_cacheLine(t *testing.T) {
	const line = 64
	var r route
	if unsafe.Sizeof(r)%line != 0 || unsafe.Offsetof(r.path)+unsafe.Sizeof(r.path.Link) > line {
		t.Errorf("%d bytes, Link at %d", unsafe.Sizeof(r), unsafe.Offsetof(r.path))
	}
}
