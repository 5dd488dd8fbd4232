package fib_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/test/routesets"
)

// inner makes a UDP packet.
func inner(source, destination [4]byte, sourcePort, destinationPort uint16) ipv4.Packet {
	b := make([]byte, ipv4.HeaderLen+8)
	h := ipv4.Header{TotalLen: len(b), TTL: 64, Protocol: ipv4.ProtocolUDP, Source: source, Destination: destination}
	h.Put(b)
	b[20], b[21], b[22], b[23] = byte(sourcePort>>8), byte(sourcePort), byte(destinationPort>>8), byte(destinationPort)
	p, err := ipv4.Parse(b)
	if err != nil {
		panic(err)
	}
	return p
}

func address(s string) [4]byte { return netip.MustParseAddr(s).As4() }

func TestTable_Remote(t *testing.T) {
	for _, s := range routesets.Sets {
		t.Run(s.Name, func(t *testing.T) {
			table := routesets.Table(s.ByPrefix())
			for _, want := range s.Want {
				seen := map[string]bool{}
				for port := range uint16(200) {
					p := inner(address("192.0.2.1"), address(want.Destination), 1000+port, 53)
					remote, why := table.Remote(p)
					if again, _ := table.Remote(p); again != remote {
						t.Fatalf("%s: a flow goes to %v and to %v", want.Destination, remote, again)
					}
					if why != want.Drop {
						t.Fatalf("%s: %v, want %v", want.Destination, why, want.Drop)
					}
					if why == drop.None {
						seen[netip.AddrFrom4(remote).String()] = true
					}
				}
				for _, r := range want.Remotes {
					if !seen[r] {
						t.Errorf("%s: nothing goes to %v, only to %v", want.Destination, r, seen)
					}
				}
				if len(seen) != len(want.Remotes) {
					t.Errorf("%s: goes to %v, want %v", want.Destination, seen, want.Remotes)
				}
			}
		})
	}
}

// A gateway that cannot be a remote drops its packets: they must not go to another remote by a
// shorter prefix. Beside usable next hops it is left out.
func TestTable_Remote_unusable(t *testing.T) {
	good := fib.Hop{Gateway: address("198.51.100.1")}
	for name, bad := range map[string]fib.Hop{
		"IPv6, or an encapsulation": {Unusable: true},
		"loopback":                  {Gateway: address("127.0.0.1")},
		"multicast":                 {Gateway: address("224.0.0.5")},
		"broadcast":                 {Gateway: address("255.255.255.255")},
		"this network":              {Gateway: address("0.1.2.3")},
	} {
		t.Run(name, func(t *testing.T) {
			table := routesets.Table(map[netip.Prefix][]fib.Route{
				netip.MustParsePrefix("10.0.0.0/8"):  {{Table: 254, Hops: []fib.Hop{good}}},
				netip.MustParsePrefix("10.1.0.0/16"): {{Table: 254, Hops: []fib.Hop{bad}}},
				netip.MustParsePrefix("10.2.0.0/16"): {{Table: 254, Hops: []fib.Hop{bad, good}}},
			})
			if _, why := table.Remote(inner(good.Gateway, address("10.1.0.1"), 1, 2)); why != drop.RemoteNotUsable {
				t.Errorf("it alone: %v", why)
			}
			for port := range uint16(100) {
				if remote, why := table.Remote(inner(good.Gateway, address("10.2.0.1"), port, 2)); why != drop.None || remote != good.Gateway {
					t.Fatalf("beside another: %v, %v", remote, why)
				}
			}
		})
	}
}

// Flows are shared out by weight, and packets of one flow stay together: of fragments only the
// addresses count, since only the first one has ports.
func TestTable_Remote_flows(t *testing.T) {
	a, b := address("198.51.100.1"), address("198.51.100.2")
	table := routesets.Table(map[netip.Prefix][]fib.Route{
		netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: a, Weight: 1}, {Gateway: b, Weight: 3}}}},
	})
	const flows = 20000
	got := 0
	for n := range flows {
		if remote, _ := table.Remote(inner(address("192.0.2.1"), address("10.0.0.1"), uint16(n), 443)); remote == b {
			got++
		}
	}
	// The standard deviation is 61.
	if got < flows*3/4-500 || got > flows*3/4+500 {
		t.Errorf("%d of %d flows take the next hop of weight 3 of 4", got, flows)
	}
	seen := map[[4]byte]bool{}
	for n := range uint16(100) {
		p := inner(address("192.0.2.1"), address("10.0.0.1"), n, 443)
		p.Bytes()[6] = 0x20 // MF
		remote, _ := table.Remote(p)
		seen[remote] = true
	}
	if len(seen) != 1 {
		t.Error("the first fragments of datagrams go to several remotes, so that others may go elsewhere")
	}
}

func TestEdit_Commit(t *testing.T) {
	a, b := address("198.51.100.1"), address("198.51.100.2")
	hops := func(gateways ...[4]byte) (hops []fib.Hop) {
		for _, g := range gateways {
			hops = append(hops, fib.Hop{Gateway: g})
		}
		return hops
	}
	one, two := netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.0.0/16")
	table := new(fib.Table)
	for i, step := range []struct {
		change         map[netip.Prefix][]fib.Route
		added, removed [][4]byte
		length         int
	}{
		{map[netip.Prefix][]fib.Route{one: {{Hops: hops(a)}}}, [][4]byte{a}, nil, 1},
		{map[netip.Prefix][]fib.Route{two: {{Hops: hops(a)}}}, nil, nil, 2},
		{map[netip.Prefix][]fib.Route{one: {{Hops: hops(b)}}}, [][4]byte{b}, nil, 2},
		{map[netip.Prefix][]fib.Route{two: {{Hops: hops(b)}}}, nil, [][4]byte{a}, 2},
		{map[netip.Prefix][]fib.Route{two: {{Hops: hops(b, a)}}}, [][4]byte{a}, nil, 2},
		{map[netip.Prefix][]fib.Route{two: nil, one: {{Hops: hops(b, b)}}}, nil, [][4]byte{a}, 1},
		{map[netip.Prefix][]fib.Route{one: {{Unreachable: true}}}, nil, [][4]byte{b}, 1},
		{map[netip.Prefix][]fib.Route{one: nil, two: nil}, nil, nil, 0},
		{map[netip.Prefix][]fib.Route{one: {{Hops: []fib.Hop{{}}}}}, nil, nil, 1},
		{map[netip.Prefix][]fib.Route{one: {{TOS: 4, Hops: hops(a)}}}, nil, nil, 0},
	} {
		e := table.Edit()
		for p, routes := range step.change {
			e.Set(p, routes)
		}
		next, added, removed := e.Commit()
		if !slices.Equal(added, step.added) || !slices.Equal(removed, step.removed) || next.Len() != step.length {
			t.Errorf("step %d: added %v, removed %v, %d prefixes; want %v, %v, %d", i, added, removed, next.Len(), step.added, step.removed, step.length)
		}
		table = next
	}
}

// naive is a reference for Table: a linear search.
type naive map[netip.Prefix][]fib.Route

func (n naive) best(a [4]byte) (best *fib.Route) {
	bits := -1
	for p, routes := range n {
		if !p.Contains(netip.AddrFrom4(a)) || p.Bits() < bits {
			continue
		}
		for i := range routes {
			r := &routes[i]
			if r.TOS != 0 {
				continue
			}
			switch {
			case p.Bits() > bits, r.Metric < best.Metric,
				r.Metric == best.Metric && best.Unreachable && !r.Unreachable,
				r.Metric == best.Metric && best.Unreachable == r.Unreachable && rank(r.Table) < rank(best.Table):
				best, bits = r, p.Bits()
			}
		}
	}
	return best
}

func rank(table uint32) uint64 {
	if table >= 253 && table <= 255 {
		return 1<<32 + uint64(table)
	}
	return uint64(table)
}

// check compares a Table with the reference, for one address as destination, inner source and outer source.
func (n naive) check(t *testing.T, table *fib.Table, a, source [4]byte) {
	t.Helper()
	r := n.best(a)
	var may [][4]byte
	wantWhy := drop.NoRemote
	if r != nil && !r.Unreachable {
		wantWhy = drop.RemoteNotUsable
		for _, h := range r.Hops {
			if g := h.Gateway; !h.Unusable && (g == [4]byte{} || g[0] != 127) {
				if g == [4]byte{} {
					g = a
				}
				may, wantWhy = append(may, g), drop.None
			}
		}
	}
	remote, why := table.Remote(inner(source, a, 1, 2))
	if wantWhy == drop.None && remote == a && (a[0] == 0 || a[0] == 127 || a[0]>>4 == 14 || a == [4]byte{255, 255, 255, 255}) {
		wantWhy = drop.RemoteNotUsable
	}
	if why != wantWhy || why == drop.None && !slices.Contains(may, remote) {
		t.Fatalf("to %v: %v, %v; want one of %v, %v", a, remote, why, may, wantWhy)
	}
	accepted := new(fib.Acceptance).Check(table, source, a, [4]byte{}) == drop.None
	if want := slices.Contains(may, source); accepted != want {
		t.Fatalf("from %v by %v: accepted is %v, want %v", a, source, accepted, want)
	}
	if len(may) > 0 {
		if why := new(fib.Acceptance).Check(table, may[0], a, [4]byte{}); why != drop.None {
			t.Fatalf("from %v by %v: %v", a, may[0], why)
		}
	}
}

// program changes a Table and a naive one by bytes, and compares them. Addresses are few, so that
// prefixes nest and are hit.
func program(t *testing.T, next func() byte) {
	want, table := naive{}, new(fib.Table)
	few := []byte{0, 1, 2, 127, 128, 129, 192, 224, 254, 255}
	octet := func() byte { return few[int(next())%len(few)] }
	somewhere := func() [4]byte { return [4]byte{octet(), octet(), octet(), octet()} }
	old := table
	var oldWant naive
	for range 1 + int(next())%4 {
		e := table.Edit()
		for range 1 + int(next())%40 {
			p := netip.PrefixFrom(netip.AddrFrom4(somewhere()), int(next())%33).Masked()
			var routes []fib.Route
			for range int(next()) % 3 {
				r := fib.Route{Metric: uint32(next()) % 3, Table: []uint32{254, 255, 44, 70000}[next()%4], Unreachable: next()%8 == 0, TOS: next() % 8 / 7}
				for range 1 + int(next())%3 {
					h := fib.Hop{Weight: uint16(next() % 4), Unusable: next()%8 == 0}
					if next()%4 != 0 {
						h.Gateway = [4]byte{198, 51, 100, next() % 8}
					}
					if next()%16 == 0 {
						h.Gateway = [4]byte{127, 0, 0, 1}
					}
					r.Hops = append(r.Hops, h)
				}
				if slices.ContainsFunc(routes, func(o fib.Route) bool { return o.Metric == r.Metric && o.Table == r.Table }) {
					continue // the first one counts, which naive does not know
				}
				routes = append(routes, r)
			}
			e.Set(p, routes)
			delete(want, p)
			if len(routes) > 0 {
				want[p] = routes
			}
		}
		for range 20 {
			if a := somewhere(); oldWant != nil {
				oldWant.check(t, old, a, [4]byte{198, 51, 100, next() % 8})
			}
		}
		before := map[[4]byte]bool{}
		for _, g := range gateways(old, oldWant) {
			before[g] = true
		}
		var added, removed [][4]byte
		table, added, removed = e.Commit()
		for _, g := range added {
			if before[g] {
				t.Fatalf("%v is added again", g)
			}
			before[g] = true
		}
		for _, g := range removed {
			if !before[g] {
				t.Fatalf("%v is removed, but was not there", g)
			}
			delete(before, g)
		}
		old, oldWant = table, naive{}
		for p, routes := range want {
			oldWant[p] = routes
		}
		if now := gateways(table, want); len(now) != len(before) {
			t.Fatalf("gateways are %v, by what was added and removed %v", now, before)
		}
		for range 20 {
			want.check(t, table, somewhere(), [4]byte{198, 51, 100, next() % 8})
		}
		for p := range want {
			want.check(t, table, p.Addr().As4(), [4]byte{198, 51, 100, next() % 8})
		}
	}
}

// gateways returns the gateways of the best routes, which AnyPeer accepts.
func gateways(table *fib.Table, n naive) (all [][4]byte) {
	for p := range n {
		best := (naive{p: n[p]}).best(p.Addr().As4())
		if best == nil || best.Unreachable {
			continue
		}
		for _, h := range best.Hops {
			if g := h.Gateway; !h.Unusable && g != [4]byte{} && g[0] != 127 && !slices.Contains(all, g) {
				all = append(all, g)
			}
		}
	}
	return all
}

func TestTable_likeNaive(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			program(t, func() byte { return byte(r.Uint32()) })
		})
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte("10.0.0.0/8 via 198.51.100.1 dev ipip1 onlink"))
	f.Fuzz(func(t *testing.T, data []byte) {
		at := 0
		program(t, func() byte {
			at++
			if len(data) == 0 {
				return 0
			}
			return data[at%len(data)] + byte(at/len(data)*7)
		})
	})
}
