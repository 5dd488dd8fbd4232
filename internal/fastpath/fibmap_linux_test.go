package fastpath

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"ipipd/internal/fib"
)

func newFIBMap() *fibMap {
	return &fibMap{routes: make([]uint64, 2*maxRoutes), lengths: make([]uint64, maxTables), hash: fib.NewHash()}
}

// len returns the number of routes.
func (f *fibMap) len() (n int) {
	for _, route := range f.routes {
		if route != 0 {
			n++
		}
	}
	return n
}

// to returns where the route of a prefix leads; not ok if there is none.
func (f *fibMap) to(table uint32, p netip.Prefix) (to uint32, ok bool) {
	if at := f.find(routeKey(table, p)); at != nil {
		return uint32(*at & (1<<toBits - 1)), true
	}
	return 0, false
}

// Each prefix of each table leads where it was last set to lead, whatever was set or removed beside it.
func TestFIBMap_set(t *testing.T) {
	type key struct {
		table  uint32
		prefix netip.Prefix
	}
	f, want, rnd := newFIBMap(), map[key]uint32{}, rand.New(rand.NewPCG(1, 2))
	for range 200000 {
		k := key{pick(rnd, uint32(1), 2, maxTables-1), netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(rnd.IntN(3)) * 127, 0, byte(rnd.IntN(256)), byte(rnd.IntN(4)) << 6}), rnd.IntN(33)).Masked()}
		if rnd.IntN(3) == 0 {
			f.remove(k.table, k.prefix)
			delete(want, k)
			continue
		}
		to := pick(rnd, rnd.Uint32N(maxRemotes), toSeveral, toMixed)
		if !f.set(k.table, k.prefix, to) {
			t.Fatalf("no place for %v with %d routes", k, len(want))
		}
		want[k] = to
	}
	if f.len() != len(want) {
		t.Errorf("%d routes, want %d", f.len(), len(want))
	}
	for k, to := range want {
		if got, ok := f.to(k.table, k.prefix); !ok || got != to {
			t.Fatalf("%v leads to %d (%v), want %d", k, got, ok, to)
		}
	}
	for k := range want {
		f.remove(k.table, k.prefix)
	}
	if f.len() != 0 {
		t.Errorf("%d routes in the end", f.len())
	}
}

// maxRoutes prefixes find a place, be they consecutive or random.
func TestFIBMap_full(t *testing.T) {
	for name, prefix := range map[string]func(i int) netip.Prefix{
		"/32": func(i int) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		},
		"/24": func(i int) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(i >> 16), byte(i >> 8), byte(i), 0}), 24)
		},
		"random": func(int) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(rand.Uint32()), byte(rand.Uint32()), byte(rand.Uint32()), byte(rand.Uint32())}), 32)
		},
	} {
		for range 5 { // multipliers
			f := newFIBMap()
			for i := range maxRoutes {
				if !f.set(1, prefix(i), toDirect) {
					t.Fatalf("%s: no place for the %dth by %x", name, i, f.hash)
				}
			}
		}
	}
	f := newFIBMap()
	for i := range f.routes {
		f.routes[i] = ^uint64(0)
	}
	if f.set(1, netip.MustParsePrefix("10.0.0.0/8"), 1) {
		t.Error("a place where all are taken")
	}
}

// A number that was freed is not given to another remote at once.
func TestRemoteNumbers_take(t *testing.T) {
	var n remoteNumbers
	a, _ := n.take()
	n.free(a)
	if b, ok := n.take(); !ok || b == a {
		t.Errorf("%d after %d, %v", b, a, ok)
	}
	n.freed[0].at = n.freed[0].at.Add(-reuseAfter)
	if b, ok := n.take(); !ok || b != a {
		t.Errorf("%d, %v, want %d", b, ok, a)
	}
	for ok := true; ok; {
		if _, ok = n.take(); ok && n.next > maxRemotes {
			t.Fatalf("number %d", n.next)
		}
	}
}
