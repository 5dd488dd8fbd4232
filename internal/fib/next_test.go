package fib_test

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/test/routesets"
)

// All yields each prefix once, leading where Next and Remote say.
func TestTable_All(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	by := map[netip.Prefix][]fib.Route{netip.MustParsePrefix("0.0.0.0/0"): {{Hops: []fib.Hop{{Gateway: [4]byte{192, 0, 2, 1}}}}}}
	for range 3000 {
		a := [4]byte{byte(r.UintN(3)) + 1, byte(r.UintN(4)), byte(r.UintN(256)), byte(r.UintN(256))}
		p := netip.PrefixFrom(netip.AddrFrom4(a), r.IntN(33)).Masked()
		route := fib.Route{Unreachable: r.IntN(9) == 0}
		for range 1 + r.IntN(2) {
			g := [4]byte{192, 0, 2, byte(r.UintN(9))}
			if g[3] == 0 {
				g = [4]byte{}
			}
			route.Hops = append(route.Hops, fib.Hop{Gateway: g})
		}
		by[p] = []fib.Route{route}
	}
	table, seen := routesets.Table(by), map[netip.Prefix]bool{}
	for p, n := range table.All() {
		if seen[p] || by[p] == nil {
			t.Fatalf("%v comes again, or is none", p)
		}
		seen[p] = true
		if same, ok := table.Next(p); !ok || same != n {
			t.Errorf("%v: %+v, and %+v by itself", p, n, same)
		}
		// A longer prefix may have the prefix's first address.
		host := netip.PrefixFrom(p.Addr(), 32)
		if _, longer := table.Next(host); longer && p != host || p.Bits() < 32 {
			continue
		}
		remote, why := table.Remote(inner([4]byte{10, 0, 0, 1}, p.Addr().As4(), 1, 2))
		switch {
		case n.Kind == fib.Nowhere && why == drop.None, n.Kind == fib.Via && remote != n.Gateway, n.Kind == fib.Direct && remote != p.Addr().As4():
			t.Errorf("%v: %+v, and Remote says %v, %v", p, n, remote, why)
		}
	}
	if len(seen) != table.Len() || len(seen) != len(by) {
		t.Errorf("%d prefixes of %d", len(seen), table.Len())
	}
	for g := range table.Gateways() {
		if !table.HasGateway(g) || !table.HasRemote(g) {
			t.Errorf("%v is no gateway", g)
		}
	}
	for range table.All() { // may be left
		break
	}
}
