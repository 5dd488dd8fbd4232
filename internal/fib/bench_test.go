package fib_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
)

// prefixesOf returns n prefixes, the default route and others, most of 20 to 28 bits as of a routing protocol.
func prefixesOf(n int) (all []netip.Prefix) {
	r := rand.New(rand.NewPCG(uint64(n), 2))
	seen := map[netip.Prefix]bool{}
	all = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	for len(all) < n {
		a := [4]byte{byte(1 + r.IntN(120)), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())}
		if p := netip.PrefixFrom(netip.AddrFrom4(a), 20+r.IntN(9)).Masked(); !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	return all
}

// remoteOf returns a route to one of 1,000 remotes.
func remoteOf(i int) []fib.Route {
	i %= 1000
	return []fib.Route{{Table: 254, Hops: []fib.Hop{{Gateway: [4]byte{198, 18, byte(i >> 8), byte(i)}}}}}
}

func filled(prefixes []netip.Prefix) *fib.Table {
	e := new(fib.Table).Edit()
	for i, p := range prefixes {
		e.Set(p, remoteOf(i))
	}
	t, _, _ := e.Commit()
	return t
}

func BenchmarkTable_Remote(b *testing.B) {
	for _, n := range []int{1, 1000, 10000, 100000} {
		prefixes := prefixesOf(n)
		table := filled(prefixes)
		r := rand.New(rand.NewPCG(1, 3))
		packets := make([]ipv4.Packet, 4096) // of as many destinations
		for i := range packets {
			packets[i] = inner([4]byte{192, 0, 2, 1}, prefixes[r.IntN(n)].Addr().As4(), uint16(i), 53)
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				if _, why := table.Remote(packets[i%len(packets)]); why != drop.None && n > 1 {
					b.Fatal(why)
				}
			}
		})
	}
}

// A change of one prefix among n, committed.
func BenchmarkEdit(b *testing.B) {
	for _, n := range []int{1, 1000, 10000, 100000} {
		prefixes := prefixesOf(n)
		table := filled(prefixes)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				e := table.Edit()
				e.Set(prefixes[i*7919%n], remoteOf(i))
				table, _, _ = e.Commit()
			}
		})
	}
}

// All prefixes in one Edit, and what they take.
func BenchmarkEdit_all(b *testing.B) {
	prefixes := prefixesOf(100000)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	table := filled(prefixes)
	runtime.GC()
	runtime.ReadMemStats(&after)
	for b.Loop() {
		table = filled(prefixes)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(table.Len()), "B/prefix")
}

func TestTable_noAllocations(t *testing.T) {
	table := filled(prefixesOf(1000))
	accept := fib.Acceptance{AnyPeer: true, From: fib.NewPrefixes([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})}
	p := inner([4]byte{192, 0, 2, 1}, [4]byte{10, 1, 2, 3}, 1, 2)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = table.Remote(p)
		_ = accept.Check(table, [4]byte{198, 18, 0, 1}, p.Source(), p.Destination())
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A change among 100,000 prefixes costs what one among few does: a prefix takes little memory, and a
// change copies the nodes above it only.
func TestEdit_cost(t *testing.T) {
	prefixes := prefixesOf(100000)
	table := filled(prefixes)
	i := 0
	n := testing.AllocsPerRun(1000, func() {
		i++
		e := table.Edit()
		e.Set(prefixes[i*7919%len(prefixes)], remoteOf(i))
		table, _, _ = e.Commit()
	})
	if n > 40 { // the six levels of each of the two tries, of the second one twice
		t.Errorf("%v allocations for a change", n)
	}
}
