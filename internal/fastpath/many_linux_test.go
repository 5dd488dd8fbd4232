package fastpath

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/test/routesets"
)

// manyTunnel is defaultTunnel with many remotes.
func manyTunnel() Tunnel {
	t := defaultTunnel()
	t.Remote, t.Many, t.Refuse = AnyRemote, true, true
	t.NextHop, t.PathMTU = [4]byte{}, 0
	return t
}

// newManyLab returns a lab with a tunnel with the routes of a table, all of whose gateways are enabled.
func newManyLab(t testing.TB, tunnel Tunnel, table *fib.Table) (*lab, *Routes) {
	t.Helper()
	l := newLab(t, tunnel)
	f := &FastPath{objects: l.objects, links: map[*Link]bool{}, owners: map[rxKey]*Link{}, routes: map[uint32]*Routes{}, local: map[[4]byte]bool{},
		underlays: map[int]*underlay{loopback: {users: 1}, loopback + 1: {users: 1}}} // so that nothing is attached
	r := f.NewRoutes(loopback)
	l.table = r.number
	l.enable(tunnel)
	if err := r.Sync(table); err != nil {
		t.Fatal(err)
	}
	for g := range table.Gateways() {
		enableRemote(t, r, g)
	}
	return l, r
}

func enableRemote(t testing.TB, r *Routes, g [4]byte) {
	t.Helper()
	if err := r.SetRemote(g, Remote{Source: local, NextHop: g, UnderlayIfindex: loopback, PathMTU: 1500, Tx: true, Rx: true}); err != nil {
		t.Fatal(err)
	}
}

func address(s string) [4]byte { return netip.MustParseAddr(s).As4() }

// checkManyEncap runs ipip_encap on a packet to a destination, and compares the result with package fib.
func checkManyEncap(t *testing.T, l *lab, r *Routes, destination string) {
	t.Helper()
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: address(destination)}, udp(8))
	parsed, err := ipv4.Parse(p)
	if err != nil {
		t.Fatal(err)
	}
	want, why := r.table.Remote(parsed)
	several := false
	for port := range uint16(50) {
		q := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: address(destination)}, append([]byte{byte(port >> 8), byte(port)}, udp(8)[2:]...))
		again, _ := ipv4.Parse(q)
		other, _ := r.table.Remote(again)
		several = several || other != want
	}
	verdict, out := l.run(l.Encap, p)
	if why != drop.None || several || !r.table.HasGateway(want) {
		if verdict != next || !bytes.Equal(out, p) {
			t.Errorf("%s: verdict %d, want it left to userspace: %v, several remotes: %v", destination, verdict, why, several)
		}
		return
	}
	outer := encap.Outer{Local: local, Remote: want, DSCP: encap.InheritDSCP, TTL: 255, Many: true}
	got, err := ipv4.Parse(out)
	if verdict != redirect || err != nil {
		t.Errorf("%s: verdict %d, %v, want it sent to %v", destination, verdict, err, want)
		return
	}
	b := buffer(p)
	in, _ := ipv4.Parse(b.Bytes())
	if d := outer.Encapsulate(b, in, got.ID()); d != drop.None || !bytes.Equal(out, b.Bytes()) {
		t.Errorf("%s: %v\n%x, want\n%x", destination, d, out, b.Bytes())
	}
}

// Packets go where package fib says, or to userspace.
func TestRoutes_routesets(t *testing.T) {
	for _, s := range routesets.Sets {
		t.Run(s.Name, func(t *testing.T) {
			l, r := newManyLab(t, manyTunnel(), routesets.Table(s.ByPrefix()))
			for _, want := range s.Want {
				checkManyEncap(t, l, r, want.Destination)
			}
		})
	}
}

// The same holds after any Follow, of prefixes that are nested in each way.
func TestRoutes_Follow(t *testing.T) {
	l, r := newManyLab(t, manyTunnel(), new(fib.Table))
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		e, prefixes := r.table.Edit(), []netip.Prefix(nil)
		for range rnd.IntN(8) {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rnd.IntN(2)), byte(rnd.IntN(4)) << 6, byte(rnd.IntN(4))}), pick(rnd, 0, 8, 9, 16, 17, 18, 24, 30, 32)).Masked()
			var routes []fib.Route
			if rnd.IntN(3) != 0 {
				routes = []fib.Route{{Unreachable: rnd.IntN(8) == 0, Hops: []fib.Hop{{Gateway: pick(rnd, address(routesets.Address(1)), address(routesets.Address(2)), address(routesets.Address(3)), [4]byte{})}}}}
				if rnd.IntN(6) == 0 {
					routes[0].Hops = append(routes[0].Hops, fib.Hop{Gateway: address(routesets.Address(4))})
				}
			}
			e.Set(p, routes)
			prefixes = append(prefixes, p)
		}
		next, added, removed := e.Commit()
		if err := r.Follow(next, prefixes, added, removed); err != nil {
			t.Fatal(err)
		}
		for _, g := range added {
			enableRemote(t, r, g)
		}
		for range 10 {
			checkManyEncap(t, l, r, netip.AddrFrom4([4]byte{10, byte(rnd.IntN(3)), byte(rnd.IntN(256)), byte(rnd.IntN(5))}).String())
		}
		if t.Failed() {
			return
		}
	}
	r.Close()
	if n := entries(t, l.Numbers); l.fib.len() != 0 || l.fib.lengths[r.number] != 0 || n != 0 {
		t.Errorf("%d routes, lengths %b and %d remotes in the end", l.fib.len(), l.fib.lengths[r.number], n)
	}
}

func entries(t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	var k, v []byte
	i := m.Iterate()
	for i.Next(&k, &v) {
		n++
	}
	if err := i.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// At each moment of a change every address has its old route or its new one.
func TestRoutes_order(t *testing.T) {
	rnd := rand.New(rand.NewPCG(11, 12))
	random := func() (prefixes []netip.Prefix, by map[netip.Prefix][]fib.Route) {
		by = map[netip.Prefix][]fib.Route{}
		for range rnd.IntN(12) {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rnd.IntN(256))}), 24+rnd.IntN(9)).Masked()
			by[p] = []fib.Route{{Hops: []fib.Hop{{Gateway: [4]byte{192, 0, 2, byte(1 + rnd.IntN(4))}}}}}
			prefixes = append(prefixes, p)
		}
		return prefixes, by
	}
	longest := func(of map[netip.Prefix]fib.Next, a netip.Addr) fib.Next {
		for bits := 32; bits >= 0; bits-- {
			if n, ok := of[netip.PrefixFrom(a, bits).Masked()]; ok {
				return n
			}
		}
		return fib.Next{Kind: fib.Nowhere}
	}
	copyOf := func(t *fib.Table) map[netip.Prefix]fib.Next { return maps.Collect(t.All()) }
	for range 500 {
		before, old := random()
		after, new := random()
		was, next := routesets.Table(old), routesets.Table(new)
		state, from, to := copyOf(was), copyOf(was), copyOf(next)
		check := func(p netip.Prefix) {
			for last := range 256 {
				a := netip.AddrFrom4([4]byte{10, 0, 0, byte(last)})
				if got := longest(state, a); got != longest(from, a) && got != longest(to, a) {
					t.Fatalf("after %v is written %v has %v, before %v, in the end %v", p, a, got, longest(from, a), longest(to, a))
				}
			}
		}
		set, gone := order(next, append(before, after...))
		for _, p := range set {
			state[p] = to[p]
			check(p)
		}
		for _, p := range gone {
			delete(state, p)
			check(p)
		}
		if !maps.Equal(state, to) {
			t.Fatalf("%v in the end, want %v", state, to)
		}
	}
}

// A table that does not fit is not copied in part: the interface is carried in userspace until it fits.
func TestRoutes_full(t *testing.T) {
	tunnel := manyTunnel()
	l, r := newManyLab(t, tunnel, new(fib.Table))
	link := &Link{f: r.f, tunnel: tunnel, slot: slot}
	r.f.links[link] = true
	const most = maxRoutes
	prefix := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	route := []fib.Route{{Hops: []fib.Hop{{Gateway: address(routesets.Address(1))}}}}
	e := r.table.Edit()
	for i := range most {
		e.Set(prefix(i), route)
	}
	fits, added, _ := e.Commit()
	if err := r.Sync(fits); err != nil {
		t.Fatal(err)
	}
	for _, g := range added {
		enableRemote(t, r, g)
	}
	checkManyEncap(t, l, r, "10.0.1.1")
	e = fits.Edit()
	e.Set(prefix(most), route)
	more, _, _ := e.Commit()
	err := r.Follow(more, []netip.Prefix{prefix(most)}, nil, nil)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(most)) {
		t.Fatalf("%v", err)
	}
	if n := entries(t, l.TxTunnels); n != 0 {
		t.Errorf("the tunnel is still enabled: %d", n)
	}
	if again := r.f.checkRoutes(&tunnel); again == nil {
		t.Error("it may be enabled again")
	}
	if err := r.Sync(fits); err != nil || r.f.checkRoutes(&tunnel) != nil {
		t.Errorf("%v, and it fits again", err)
	}
}

// To change a remote, or not to have set it yet, concerns no packets but its own.
func TestRoutes_SetRemote(t *testing.T) {
	a, b := address(routesets.Address(1)), address(routesets.Address(2))
	l, r := newManyLab(t, manyTunnel(), routesets.Table(map[netip.Prefix][]fib.Route{
		netip.MustParsePrefix("10.1.0.0/16"): {{Hops: []fib.Hop{{Gateway: a}}}},
		netip.MustParsePrefix("10.2.0.0/16"): {{Hops: []fib.Hop{{Gateway: b}}}},
	}))
	send := func(destination string, n int) int {
		verdict, _ := l.run(l.Encap, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: address(destination)}, udp(n)))
		return verdict
	}
	for name, x := range map[string]struct {
		to   Remote
		want int
	}{
		"disabled":        {Remote{Source: local, NextHop: a, UnderlayIfindex: loopback, PathMTU: 1500, Rx: true}, next},
		"a smaller MTU":   {Remote{Source: local, NextHop: a, UnderlayIfindex: loopback, PathMTU: 1000, Tx: true}, next},
		"as large as MTU": {Remote{Source: local, NextHop: a, UnderlayIfindex: loopback, PathMTU: 1048, Tx: true}, redirect},
	} {
		if err := r.SetRemote(a, x.to); err != nil {
			t.Fatal(err)
		}
		if got := send("10.1.0.1", 1000); got != x.want {
			t.Errorf("%s: verdict %d, want %d", name, got, x.want)
		}
		if got := send("10.2.0.1", 1000); got != redirect {
			t.Errorf("%s: another remote's verdict is %d", name, got)
		}
	}
	// An address that is no gateway gets no entry, with which it might send.
	if err := r.SetRemote(address("192.0.2.77"), Remote{Tx: true, Rx: true}); err != nil || entries(t, l.Numbers) != 2 {
		t.Errorf("%v, %d remotes", err, entries(t, l.Numbers))
	}
}

// A remote that could not be written keeps its number, to which routes lead: else another remote would get the number,
// and their packets. All packets go to userspace until Sync.
func TestRoutes_SetRemote_failed(t *testing.T) {
	a, b := address(routesets.Address(1)), address(routesets.Address(2))
	e := new(fib.Table).Edit()
	e.Set(netip.MustParsePrefix("10.1.0.0/16"), []fib.Route{{Hops: []fib.Hop{{Gateway: a}}}})
	table, _, _ := e.Commit()
	tunnel := manyTunnel()
	l, r := newManyLab(t, tunnel, table)
	link := &Link{f: r.f, tunnel: tunnel, slot: slot}
	r.f.links[link] = true
	remotes := l.Remotes
	closed, err := remotes.Clone()
	if err == nil {
		err = closed.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Remotes = closed
	err = r.SetRemote(a, Remote{})
	l.Remotes = remotes
	if err == nil || r.Lacking() == nil {
		t.Fatalf("it has not failed: %v, %v", err, r.Lacking())
	}
	for i := range r.f.remoteNumbers.freed { // as after reuseAfter
		r.f.remoteNumbers.freed[i].at = r.f.remoteNumbers.freed[i].at.Add(-reuseAfter)
	}
	e = table.Edit()
	e.Set(netip.MustParsePrefix("10.2.0.0/16"), []fib.Route{{Hops: []fib.Hop{{Gateway: b}}}})
	both, added, _ := e.Commit()
	if err := r.Follow(both, []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}, added, nil); err == nil {
		enableRemote(t, r, b)
	}
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: address("10.1.0.1")}, udp(8))
	if verdict, out := l.run(l.Encap, p); verdict != next {
		t.Errorf("verdict %d, % x", verdict, out)
	}
	if err := r.Sync(both); err != nil || r.Lacking() != nil || r.f.checkRoutes(&tunnel) != nil {
		t.Fatal(err)
	}
	l.enable(tunnel)
	enableRemote(t, r, a)
	enableRemote(t, r, b)
	checkManyEncap(t, l, r, "10.1.0.1")
	checkManyEncap(t, l, r, "10.2.0.1")
}

// Loops are left to userspace, which counts them.
func TestRoutes_loop(t *testing.T) {
	g := address(routesets.Address(1))
	l, _ := newManyLab(t, manyTunnel(), routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("0.0.0.0/0"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	for name, p := range map[string][]byte{
		"from the remote":          inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: g, Destination: innerB}, udp(8)),
		"an outer packet":          inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: local, Destination: innerB}, inner(ipv4.Header{Source: innerA, Destination: innerB}, nil)),
		"from local to the remote": inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: local, Destination: g}, udp(8)),
	} {
		if got, _ := l.run(l.Encap, p); got != next {
			t.Errorf("%s: verdict %d", name, got)
		}
	}
	if got, _ := l.run(l.Encap, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: local, Destination: innerB}, udp(8))); got != redirect {
		t.Errorf("from the local address to elsewhere: verdict %d", got)
	}
}

// ipip_decap decides as fib.Acceptance does, and counts a drop under the same reason, or leaves the packet to userspace.
func TestRoutes_Accept(t *testing.T) {
	rnd := rand.New(rand.NewPCG(9, 10))
	any4 := func() [4]byte {
		return pick(rnd, [4]byte{10, byte(rnd.IntN(3)), 0, byte(rnd.IntN(3))}, [4]byte{198, 51, 100, byte(rnd.IntN(6))}, [4]byte{172, 16, byte(rnd.IntN(2)), 1})
	}
	prefix := func() netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4(any4()), pick(rnd, 0, 8, 15, 16, 24, 31, 32)).Masked()
	}
	for round := range 60 {
		by := map[netip.Prefix][]fib.Route{}
		for range rnd.IntN(12) {
			route := fib.Route{Unreachable: rnd.IntN(8) == 0}
			for range pick(rnd, 1, 1, 1, 2) {
				g := [4]byte{198, 51, 100, byte(rnd.IntN(5))}
				if g[3] == 0 {
					g = [4]byte{}
				}
				route.Hops = append(route.Hops, fib.Hop{Gateway: g})
			}
			by[prefix()] = []fib.Route{route}
		}
		var from, to []netip.Prefix
		for range pick(rnd, 0, 0, 1, 3) {
			from = append(from, prefix())
		}
		for range pick(rnd, 0, 0, 1, 3) {
			to = append(to, prefix())
		}
		acceptance := fib.Acceptance{AnyPeer: rnd.IntN(3) == 0, From: fib.NewPrefixes(from), To: fib.NewPrefixes(to)}
		tunnel := manyTunnel()
		tunnel.AnyPeer, tunnel.AcceptFrom, tunnel.AcceptTo, tunnel.Refuse = acceptance.AnyPeer, len(from) > 0, len(to) > 0, round%4 != 0
		l, r := newManyLab(t, tunnel, routesets.Table(by))
		if err := r.Accept(sendersBy(loopback, from), to); err != nil {
			t.Fatal(err)
		}
		for range 200 {
			source, in := any4(), ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: any4(), Destination: any4()}
			p := inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: source, Destination: local}, inner(in, udp(8)))
			what := fmt.Sprintf("from %v, inner %v to %v, routes %v, %+v from %v to %v", source, in.Source, in.Destination, by, acceptance.AnyPeer, from, to)
			why := acceptance.Check(r.table, source, in.Source, in.Destination)
			before := l.counters()
			verdict, _ := l.run(l.Decap, p)
			after := l.counters()
			n, covered := covering(r.table, in.Source)
			m, _ := covering(r.table, source)
			switch {
			case verdict == redirect && why == drop.None, verdict == next && !tunnel.Refuse && why != drop.None:
			case verdict == next && (covered && (n.Kind == fib.Several || n.Kind == fib.Mixed || n.Kind == fib.Direct && in.Source == source) || acceptance.AnyPeer && (m.Kind == fib.Direct || m.Kind == fib.Mixed)):
			case verdict == dropped && tunnel.Refuse && why != drop.None:
				want := before
				switch why {
				case drop.ReversePath:
					want.ReversePath++
				case drop.NotInAcceptFrom:
					want.NotInAcceptFrom++
				case drop.NotInAcceptTo:
					want.NotInAcceptTo++
				}
				if after != want {
					t.Fatalf("%s: %v, counted %+v after %+v", what, why, after, before)
				}
			default:
				t.Fatalf("%s: verdict %d, want %v", what, verdict, why)
			}
		}
	}
}

// sendersBy returns a Sender with this device for each prefix.
func sendersBy(device int, prefixes []netip.Prefix) (all []Sender) {
	for _, p := range prefixes {
		all = append(all, Sender{p, device})
	}
	return all
}

// covering returns the Next of the longest prefix that contains an address.
func covering(t *fib.Table, a [4]byte) (fib.Next, bool) {
	for bits := 32; bits >= 0; bits-- {
		if n, ok := t.Next(netip.PrefixFrom(netip.AddrFrom4(a), bits)); ok {
			return n, true
		}
	}
	return fib.Next{Kind: fib.Nowhere}, false
}

// No packet of a stranger goes to userspace, whatever is inside; broken packets of a remote do.
func TestRoutes_strangers(t *testing.T) {
	g := address(routesets.Address(1))
	l, r := newManyLab(t, manyTunnel(), routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8))
	packets := func(source [4]byte) map[string][]byte {
		h := ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: source, Destination: local}
		fragment := h
		fragment.MF = true
		broken := append([]byte(nil), in...)
		broken[10]++
		return map[string][]byte{
			"an empty probe": inner(h, nil), "a fragment": inner(fragment, in), "an inner checksum": inner(h, broken), "IPv6": inner(h, make([]byte, 40)),
			"a reflect probe": inner(h, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: local, Destination: source}, nil)),
		}
	}
	for name, p := range packets(address("203.0.113.9")) {
		if got, _ := l.run(l.Decap, p); got != dropped {
			t.Errorf("%s of a stranger: verdict %d", name, got)
		}
	}
	if n := l.counters().ReversePath; n != 5 {
		t.Errorf("%d are counted", n)
	}
	wrong := inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address("203.0.113.9"), Destination: local}, in)
	wrong[10]++ // its source may be damaged: the IP stack drops it, as without the fast path
	if got, _ := l.run(l.Decap, wrong); got != next || l.counters().ReversePath != 5 {
		t.Errorf("a wrong outer checksum: verdict %d, %+v", got, l.counters())
	}
	for name, p := range packets(g) {
		if got, _ := l.run(l.Decap, p); got != next {
			t.Errorf("%s of a remote: verdict %d", name, got)
		}
	}
	if at := r.LastReceived(g); !at.IsZero() {
		t.Errorf("heard at %v of what userspace is to judge", at)
	}
	if got, _ := l.run(l.Decap, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: g, Destination: local}, in)); got != redirect {
		t.Errorf("verdict %d", got)
	}
	at := r.LastReceived(g)
	if at.IsZero() {
		t.Error("the remote is not heard")
	}
	enableRemote(t, r, g)
	if again := r.LastReceived(g); again.Sub(at).Abs() > 1e9 || again.IsZero() {
		t.Errorf("SetRemote has it heard at %v instead of %v", again, at)
	}
}

// With accept-from, packets of strangers are counted as not in it, whatever they are, and whatever accept-to has.
func TestRoutes_strangers_acceptFrom(t *testing.T) {
	tunnel := manyTunnel()
	tunnel.AcceptFrom, tunnel.AcceptTo = true, true
	l, r := newManyLab(t, tunnel, new(fib.Table))
	if err := r.Accept(sendersBy(loopback, []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}), []netip.Prefix{netip.MustParsePrefix("203.0.113.5/32")}); err != nil {
		t.Fatal(err)
	}
	h := ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address("203.0.113.9"), Destination: local}
	for name, p := range map[string][]byte{
		"an empty probe": inner(h, nil), "a reflect probe": inner(h, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: local, Destination: h.Source}, nil)),
		"data for nobody": inner(h, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8))),
	} {
		before := l.counters()
		want := before
		want.NotInAcceptFrom++
		if got, _ := l.run(l.Decap, p); got != dropped || l.counters() != want {
			t.Errorf("%s: verdict %d, %+v after %+v", name, got, l.counters(), before)
		}
	}
}

// Packets to a remote have the outer source of that remote, by which loops are found, too.
func TestRoutes_source(t *testing.T) {
	a, b := address(routesets.Address(1)), address(routesets.Address(2))
	tunnel := manyTunnel()
	tunnel.Local = [4]byte{}
	l, r := newManyLab(t, tunnel, routesets.Table(map[netip.Prefix][]fib.Route{
		netip.MustParsePrefix("10.1.0.0/16"): {{Hops: []fib.Hop{{Gateway: a}}}},
		netip.MustParsePrefix("10.2.0.0/16"): {{Hops: []fib.Hop{{Gateway: b}}}},
	}))
	sources := map[[4]byte][4]byte{a: address("192.0.2.1"), b: address("192.0.2.2")}
	for g, source := range sources {
		if err := r.SetRemote(g, Remote{Source: source, NextHop: g, UnderlayIfindex: loopback, PathMTU: 1500, Tx: true}); err != nil {
			t.Fatal(err)
		}
	}
	for destination, g := range map[string][4]byte{"10.1.0.1": a, "10.2.0.1": b} {
		verdict, out := l.run(l.Encap, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: address(destination)}, udp(8)))
		got, err := ipv4.Parse(out)
		if verdict != redirect || err != nil || got.Source() != sources[g] || got.Destination() != g {
			t.Errorf("%s: verdict %d, %v, %x", destination, verdict, err, out)
		}
	}
	// By a default route to the remote its own address is an inner destination, too.
	if err := r.Sync(routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("0.0.0.0/0"): {{Hops: []fib.Hop{{Gateway: a}}}}})); err != nil {
		t.Fatal(err)
	}
	for source, want := range map[[4]byte]int{sources[a]: next, sources[b]: redirect} {
		if got, _ := l.run(l.Encap, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: source, Destination: a}, udp(8))); got != want {
			t.Errorf("from %v to the remote: verdict %d, want %d", source, got, want)
		}
	}
}

// A tunnel without a local address receives packets to any address of this host that are no other tunnel's.
func TestFastPath_SetLocalAddresses(t *testing.T) {
	g := address(routesets.Address(1))
	tunnel := manyTunnel()
	tunnel.Local = [4]byte{}
	l, r := newManyLab(t, tunnel, routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8))
	check := func(when string, want map[string]int) {
		t.Helper()
		for to, want := range want {
			if got, _ := l.run(l.Decap, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: g, Destination: address(to)}, in)); got != want {
				t.Errorf("%s, to %s: verdict %d, want %d", when, to, got, want)
			}
		}
	}
	check("without addresses", map[string]int{"192.0.2.1": next, "0.0.0.0": next})
	set := func(addresses ...string) error {
		var all [][4]byte
		for _, a := range addresses {
			all = append(all, address(a))
		}
		return r.f.SetLocalAddresses(all)
	}
	if err := set("192.0.2.1", "198.51.100.9"); err != nil {
		t.Fatal(err)
	}
	check("with two", map[string]int{"192.0.2.1": redirect, "198.51.100.9": redirect, "192.0.2.3": next, "192.0.2.255": next, "224.0.0.1": next, "255.255.255.255": next})
	stranger := inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address("203.0.113.9"), Destination: address("192.0.2.1")}, in)
	if got, _ := l.run(l.Decap, stranger); got != dropped || l.counters().ReversePath != 1 {
		t.Errorf("a stranger: verdict %d, %+v", got, l.counters())
	}
	if err := set("192.0.2.3", "192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	check("one removed and one added", map[string]int{"192.0.2.1": redirect, "198.51.100.9": next, "192.0.2.3": redirect})

	// Other tunnels keep their packets, those with many remotes that are carried in userspace among them.
	r.f.Reserve([]Pair{{Local: address("192.0.2.1"), Remote: g}, {Local: address("192.0.2.3"), Remote: AnyRemote}})
	check("reserved", map[string]int{"192.0.2.1": next, "192.0.2.3": next})
	r.f.Reserve(nil)
	check("released", map[string]int{"192.0.2.1": redirect, "192.0.2.3": redirect})

	// Packets of a remote on another device go to userspace: they have to pass rp_filter.
	if err := r.SetRemote(g, Remote{Source: local, NextHop: g, UnderlayIfindex: loopback + 1, PathMTU: 1500, Tx: true, Rx: true}); err != nil {
		t.Fatal(err)
	}
	check("another device", map[string]int{"192.0.2.1": next})
	enableRemote(t, r, g)

	var many [][4]byte
	for i := range int(l.LocalAddresses.MaxEntries()) + 1 {
		many = append(many, [4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	}
	if err := r.f.SetLocalAddresses(many); err == nil || !strings.Contains(err.Error(), "this host has 16385 addresses") {
		t.Errorf("more than the map takes: %v", err)
	}
	if err := set("192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	check("few again", map[string]int{"192.0.2.1": redirect, "10.0.0.1": next})
	if n := entries(t, l.LocalAddresses); n != 1 {
		t.Errorf("%d entries are left", n)
	}
}

// A source in accept-from is accepted on the device of its Sender, and a remote on its own device.
func TestRoutes_Accept_device(t *testing.T) {
	g := address(routesets.Address(1))
	tunnel := manyTunnel()
	tunnel.AcceptFrom = true
	l, r := newManyLab(t, tunnel, routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	var senders []Sender
	for p, device := range map[string]int{"172.16.0.0/12": loopback, "172.17.0.0/16": loopback + 1, "172.18.0.0/16": 0, routesets.Address(1) + "/32": loopback + 1} {
		senders = append(senders, Sender{netip.MustParsePrefix(p), device})
	}
	if err := r.Accept(senders, nil); err != nil {
		t.Fatal(err)
	}
	in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: address("8.8.8.8"), Destination: innerA}, udp(8))
	for source, want := range map[string]int{"172.16.1.1": redirect, "172.17.1.1": next, "172.18.1.1": next, "172.15.1.1": dropped, routesets.Address(1): redirect} {
		if got, _ := l.run(l.Decap, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address(source), Destination: local}, in)); got != want {
			t.Errorf("from %s: verdict %d, want %d", source, got, want)
		}
	}
	if n := l.counters().NotInAcceptFrom; n != 1 {
		t.Errorf("%d are counted", n)
	}
	// A new list replaces the old one.
	if err := r.Accept(sendersBy(loopback, []netip.Prefix{netip.MustParsePrefix("172.18.0.0/16")}), nil); err != nil {
		t.Fatal(err)
	}
	for source, want := range map[string]int{"172.16.1.1": dropped, "172.18.1.1": redirect} {
		if got, _ := l.run(l.Decap, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address(source), Destination: local}, in)); got != want {
			t.Errorf("later from %s: verdict %d, want %d", source, got, want)
		}
	}
}
