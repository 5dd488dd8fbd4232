package tunnel

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/test/netlab"
)

// Settings that must not be combined are refused, above all an open decapsulator (CVE-2020-10136).
func TestConfigValidateMany(t *testing.T) {
	for words, want := range map[string]string{
		"remote-address=any local-address=192.0.2.1":                                                "",
		"remote-address=any local-address=192.0.2.1 accept-from=any-peer":                           "",
		"remote-address=any local-address=192.0.2.1 accept-from=198.51.100.7":                       "",
		"remote-address=any accept-from=172.16.0.0/12,192.0.2.10 accept-to=203.0.113.5":             "",
		"remote-address=any local-address=192.0.2.1 accept-from=172.16.0.0/12":                      "accept-to: missing",
		"remote-address=any local-address=192.0.2.1 accept-from=198.51.100.7 accept-from=0.0.0.0/0": "accept-to: missing",
		"remote-address=any":                                                                             "",
		"remote-address=any accept-from=any-peer":                                                        "",
		"remote-address=any accept-from=172.16.0.0/12":                                                   "accept-to: missing",
		"remote-address=any ipsec-secret=mellon-mellon-mellon":                                           "local-address: missing",
		"remote-address=any local-address=192.0.2.1 keepalive=5s,3":                                      "keepalive:",
		"remote-address=any local-address=192.0.2.1 keepalive=10s,10":                                    "",
		"remote-address=any local-address=192.0.2.1 ipsec-secret=mellon-mellon-mellon":                   "",
		"remote-address=any local-address=192.0.2.1 ipsec-secret=mellon-mellon-mellon ipsec-remote-id=b": "ipsec-remote-id:",
		"remote-address=any accept-from=172.16.0.0/12 accept-to=203.0.113.5 ipsec-secret=mellon-mellon":  "local-address: missing",
		"remote-address=any local-address=192.0.2.1 keepalive-probe=echo":                                "",
		"remote-address=any local-address=192.0.2.1 keepalive-target=10.255.0.2":                         "keepalive-target:",
		"remote-address=198.51.100.1 accept-from=any-peer":                                               "accept-from:",
		"remote-address=198.51.100.1 accept-to=203.0.113.5":                                              "accept-to:",
	} {
		c, err := parseConfig(words)
		if err == nil {
			err = c.Validate()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", words, err, want)
		}
	}
}

// With many remotes there are no probes, so keepalive-probe echo needs no target.
func TestConfig_keepaliveProbe(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) {
		c.RemoteAddress, c.LocalAddress, c.Addresses, c.KeepaliveProbe = AnyRemote, outerA, nil, keepalive.FormEcho
	})
	b := start(t, sb, outerB, outerA, nil)
	a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: outerB.As4()}}}}}})
	eventually(t, "the remote is known", func() bool { return len(a.many.routes.Load().all) == 1 })
	a.send(t, b, datagram(100, nil))
	if !a.Status().Running {
		t.Error("it is not running")
	}
}

// A late change of the routes out of an interface that is gone does not enter the table of the next one.
func TestRemotes_follow(t *testing.T) {
	c := Default()
	m := newRemotes(&c)
	gateway := [4]byte{198, 51, 100, 7}
	changes := []netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: gateway}}}}}}
	before := m.reset()
	if !m.follow(before, changes) || m.table.Load().Len() != 1 {
		t.Error("a route is not followed")
	}
	if news, _ := m.take(); !news[gateway] {
		t.Errorf("its gateway is not told: %v", news)
	}
	if m.follow(before, changes) {
		t.Error("the same again is told")
	}
	now := m.reset()
	if m.follow(before, changes) || m.table.Load().Len() != 0 {
		t.Error("a route of the interface before is followed")
	}
	if !m.follow(now, changes) || !m.table.Load().HasRemote(gateway) {
		t.Error("one of the present interface is not followed")
	}
}

// eachLocal runs a test with a local-address, and without one: then the route to each remote gives the source.
func eachLocal(t *testing.T, test func(t *testing.T, local netip.Addr)) {
	t.Run("local-address", func(t *testing.T) { test(t, outerA) })
	t.Run("no local-address", func(t *testing.T) { test(t, netip.Addr{}) })
}

// One end has many remotes. The routes decide where its packets go, and which remotes it accepts packets from.
func TestRemotes_dataPath(t *testing.T) { eachLocal(t, testRemotesDataPath) }

func testRemotesDataPath(t *testing.T, local netip.Addr) {
	sa, sb := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, local })
	b := start(t, sb, outerB, outerA, nil)
	drops := func(r drop.Reason) func() bool { return func() bool { return a.Status().Drops[r.String()] > 0 } }
	out, in := datagram(100, nil), datagram(100, func(h *ipv4.Header) { h.Source, h.Destination = h.Destination, h.Source })

	a.device.Inject(out)
	eventually(t, "without a route it is dropped", drops(drop.NoRemote))
	b.device.Inject(in)
	eventually(t, "and nothing comes in", drops(drop.ReversePath))

	tell := func(prefix string, gateway [4]byte) {
		a.network.followRoutes([]netstate.RouteChange{{
			Prefix: netip.MustParsePrefix(prefix), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: gateway}}}},
		}})
	}
	tell("10.0.0.0/8", outerB.As4())
	eventually(t, "the remote has a route of its own", func() bool { return len(a.many.routes.Load().all) == 1 })
	a.send(t, b, out)
	b.send(t, a, in)
	tell("10.0.0.0/8", [4]byte{203, 0, 113, 9})
	b.device.Inject(in)
	before := a.Status().Drops[drop.ReversePath.String()]
	eventually(t, "another gateway: it may not send any more", func() bool {
		b.device.Inject(in)
		return a.Status().Drops[drop.ReversePath.String()] > before
	})
}

// Neither a packet to a gateway allocates, nor one to an inner destination.
func TestRemotes_allocations(t *testing.T) { eachLocal(t, testRemotesAllocations) }

func testRemotesAllocations(t *testing.T, local netip.Addr) {
	for name, hop := range map[string]fib.Hop{"gateway": {Gateway: outerB.As4()}, "no gateway": {}} {
		if !local.IsValid() && hop.Gateway == [4]byte{} {
			continue // there is no kernel here to fill in the source
		}
		t.Run(name, func(t *testing.T) {
			sa, sb := memory.NewSocketPair()
			a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, local })
			b := start(t, sb, outerB, outerA, nil)
			a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.PrefixFrom(outerB, 32), Routes: []fib.Route{{Hops: []fib.Hop{hop}}}}})
			eventually(t, "the remote is known", func() bool { return (len(a.many.routes.Load().all) == 1) == (hop.Gateway != [4]byte{}) })
			p := datagram(1480, func(h *ipv4.Header) { h.Destination = outerB.As4() })
			testAllocations(t, b, func(int) { a.device.Inject(p) })
		})
	}
}

// Each reason that only a tunnel with many remotes has is in print, in the metrics and in a capture.
func TestRemotes_drops(t *testing.T) {
	out, in := datagram(100, nil), datagram(100, func(h *ipv4.Header) { h.Source, h.Destination = h.Destination, h.Source })
	provoked := map[string]bool{}
	for why, c := range map[drop.Reason]struct {
		set      func(*Config)
		sent     []byte // by the host; nil if the peer sends received
		received []byte
	}{
		drop.NoRemote:        {sent: out},
		drop.RemoteNotUsable: {sent: datagram(100, func(h *ipv4.Header) { h.Destination = [4]byte{224, 0, 0, 5} })},
		drop.ReversePath:     {received: in},
		drop.NotInAcceptFrom: {received: in, set: func(c *Config) { c.AcceptAnyPeer = true }},
		drop.NotInAcceptTo: {received: in, set: func(c *Config) {
			c.AcceptFrom, c.AcceptTo = []netip.Prefix{netip.PrefixFrom(outerB, 32)}, []netip.Prefix{netip.MustParsePrefix("203.0.113.5/32")}
		}},
	} {
		provoked[why.String()] = true
		t.Run(why.String(), func(t *testing.T) {
			sa, sb := memory.NewSocketPair()
			a := start(t, sa, outerA, outerB, func(cfg *Config) {
				cfg.RemoteAddress, cfg.LocalAddress = AnyRemote, outerA
				if c.set != nil {
					c.set(cfg)
				}
			})
			b := start(t, sb, outerB, outerA, nil)
			a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.MustParsePrefix("224.0.0.0/4"), Routes: []fib.Route{{Hops: []fib.Hop{{}}}}}})
			of := startCapture(t, a.engine, "", capture.Options{Drops: true}, nil)
			if c.sent != nil {
				a.device.Inject(c.sent)
			} else {
				b.device.Inject(c.received)
			}
			eventually(t, "it is counted", func() bool { return a.Status().Drops[why.String()] > 0 })
			if a.engine.Samples().Tunnels[0].Drops[why] == 0 {
				t.Error("the metrics do not have it")
			}
			for _, p := range of.end().Packets {
				if strings.HasSuffix(p.Comment, why.Error()+"; remedy: "+why.Remedy()) {
					return
				}
			}
			t.Error("the capture does not have it")
		})
	}
	if want := netlab.DropsProvoked(netlab.ManyRemotes); !maps.Equal(provoked, want) {
		t.Errorf("provoked are %v, want %v", provoked, want)
	}
}

// A packet of a remote that may not send is dropped for that reason, however broken it is, as on the fast path.
func TestRemotes_accepts(t *testing.T) {
	gateway, listed, stranger := outerB.As4(), [4]byte{172, 16, 7, 7}, [4]byte{203, 0, 113, 66}
	strict := Config{}
	list := Config{AcceptFrom: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}}
	for _, c := range []struct {
		cfg    Config
		remote [4]byte
		kind   encap.Kind
		broken drop.Reason
		want   drop.Reason
	}{
		{strict, gateway, encap.KindEmpty, drop.None, drop.None},
		{strict, gateway, encap.KindData, drop.ReceivedChecksum, drop.ReceivedChecksum},
		{strict, stranger, encap.KindEmpty, drop.None, drop.ReversePath},
		{strict, stranger, encap.KindReflect, drop.None, drop.ReversePath},
		{strict, stranger, encap.KindData, drop.ReceivedChecksum, drop.ReversePath},
		{list, stranger, encap.KindReflect, drop.None, drop.NotInAcceptFrom},
		{list, stranger, encap.KindData, drop.ReceivedNotIPv4, drop.NotInAcceptFrom},
		{list, listed, encap.KindData, drop.ReceivedChecksum, drop.ReceivedChecksum},
		{list, listed, encap.KindReflect, drop.None, drop.ReversePath}, // only a gateway may probe
	} {
		m := newRemotes(&c.cfg)
		m.follow(m.reset(), []netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: gateway}}}}}})
		if got := m.accepts(c.remote, ipv4.Packet{}, c.kind, c.broken); got != c.want {
			t.Errorf("from %v, kind %v, %v: %v, want %v", address(c.remote), c.kind, c.broken, got, c.want)
		}
	}
}

// Routes, ICMP errors and packets of both directions come at once, for the race detector, and packets of a
// route that does not change all arrive.
func TestRemotes_concurrent(t *testing.T) { eachLocal(t, testRemotesConcurrent) }

func testRemotesConcurrent(t *testing.T, local netip.Addr) {
	sa, sb := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress, c.DontFragment = AnyRemote, local, true })
	b := start(t, sb, outerB, outerA, nil)
	route := func(prefix string, hops ...fib.Hop) netstate.RouteChange {
		c := netstate.RouteChange{Prefix: netip.MustParsePrefix(prefix)}
		if len(hops) > 0 {
			c.Routes = []fib.Route{{Hops: hops}}
		}
		return c
	}
	a.network.followRoutes([]netstate.RouteChange{route("10.0.0.0/24", fib.Hop{Gateway: outerB.As4()})})
	eventually(t, "the remote has a route", func() bool { return len(a.many.routes.Load().all) == 1 })
	const rounds = 100
	var others sync.WaitGroup
	each := func(f func(i int)) {
		others.Go(func() {
			for i := range rounds {
				f(i)
			}
		})
	}
	each(func(i int) { // routes come, go, and change their gateways
		prefix, gateway := fmt.Sprintf("10.1.%d.0/24", i%50), [4]byte{198, 18, 0, byte(i)}
		a.network.followRoutes([]netstate.RouteChange{route(prefix, fib.Hop{Gateway: gateway}), route(fmt.Sprintf("10.1.%d.0/24", (i+25)%50))})
		a.network.followRoutes([]netstate.RouteChange{route("10.2.0.0/16", fib.Hop{}, fib.Hop{Gateway: gateway})})
	})
	each(func(i int) { // ICMP errors about gateways, about inner destinations, and about other addresses
		for _, remote := range [][4]byte{{198, 18, 0, byte(i)}, {10, 2, 0, byte(i)}, {192, 88, 99, byte(i)}} {
			for _, e := range []encap.OuterError{{Code: 1}, {Code: ipv4.CodeTooBig, NextHopMTU: 600 + i%800, TotalLen: 1500, DF: true}} {
				e.Type, e.Protocol, e.Source, e.Destination = ipv4.ICMPUnreachable, ipv4.ProtocolIPIP, outerA.As4(), remote
				a.outerErrorOf(&e, time.Now())
			}
		}
		a.Status()
	})
	for i := range rounds {
		for j := range 10 { // packets to all of these prefixes
			_ = a.device.Inject(datagram(100, func(h *ipv4.Header) { h.Destination = [4]byte{10, byte(1 + j%2), byte((10*i + j) % 50), 1} }))
		}
		a.send(t, b, datagram(1400, func(h *ipv4.Header) { h.DF, h.Destination = true, [4]byte{10, 0, 0, 2} }))
	}
	others.Wait()
}

// A tunnel with that local-address has precedence over one without. Multicast is no local address.
func TestTable_findMany(t *testing.T) {
	every, local := new(Tunnel), new(Tunnel)
	table := table{pairOf([4]byte{}, anyRemote): every, pairOf(outerA.As4(), anyRemote): local}
	for to, want := range map[[4]byte]*Tunnel{
		outerA.As4(): local, outerB.As4(): every, {224, 0, 0, 1}: nil, {255, 255, 255, 255}: nil,
	} {
		if got := table.findMany(to); got != want {
			t.Errorf("%v: %p, want %p of %p and %p", to, got, want, every, local)
		}
	}
}

// An ICMP error is not believed if it quotes another source than the route to the remote has.
func TestRoute_quotesOtherSource(t *testing.T) {
	r := &route{outer: encap.Outer{Local: outerA.As4()}}
	own, other := &encap.OuterError{Source: outerA.As4()}, &encap.OuterError{Source: outerB.As4()}
	if r.quotesOtherSource(own) || !r.quotesOtherSource(other) || (*route)(nil).quotesOtherSource(other) || new(route).quotesOtherSource(other) {
		t.Error("the source that is quoted is not compared with the route's")
	}
}

// The warning of a loop names the remotes that are routed into the interface.
func TestControlLoopDetail(t *testing.T) {
	sa, _ := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, outerA })
	looping, other := netip.MustParseAddr("10.11.0.9").As4(), outerB.As4()
	own := a.iface.Load().Index
	a.network.set(func(n *fakeNetwork) { n.routes = map[[4]byte]netstate.Route{looping: {Device: own, MTU: 1480}} })
	a.network.followRoutes([]netstate.RouteChange{
		{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: other}}}}},
		{Prefix: netip.MustParsePrefix("10.51.0.0/16"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: looping}}}}},
	})
	eventually(t, "both remotes are known", func() bool { return len(a.many.routes.Load().all) == 2 })
	inner := datagram(100, func(h *ipv4.Header) { h.Source, h.Destination, h.Protocol = outerA.As4(), looping, ipv4.ProtocolIPIP })
	a.device.Inject(inner) // the outer packet, which the kernel routes into the interface
	eventually(t, "the warning names it", func() bool {
		at := a.warning(warning.RouteLoop)
		return at >= 0 && a.activeWarnings()[at].Detail == "those to 10.11.0.9"
	})
}

// A gateway for which there was no room in remotes gets its state when another one goes.
func TestMaxRemotes(t *testing.T) {
	sa, _ := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, outerA })
	change := func(i int, routes ...fib.Route) netstate.RouteChange {
		return netstate.RouteChange{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), Routes: routes}
	}
	via := func(i int) fib.Route {
		return fib.Route{Hops: []fib.Hop{{Gateway: [4]byte{198, 18, byte(i >> 8), byte(i)}}}}
	}
	const more = 3
	var all []netstate.RouteChange
	for i := range maxRemotes + more {
		all = append(all, change(i, via(i)))
	}
	a.network.followRoutes(all)
	eventually(t, "as many as there is room for have a state", func() bool { return len(a.many.routes.Load().all) == maxRemotes })
	var gone []netstate.RouteChange
	for i := range 2 * more {
		gone = append(gone, change(i), change(maxRemotes+more+i, via(maxRemotes+more+i)))
	}
	a.network.followRoutes(gone[:2])
	eventually(t, "one is replaced", func() bool {
		routes := a.many.routes.Load().all
		return len(routes) == maxRemotes && routes[via(0).Hops[0].Gateway] == nil
	})
	a.network.followRoutes(gone[2:])
	for i := range maxRemotes / 2 {
		gone = append(gone, change(100+i))
	}
	a.network.followRoutes(gone[4*more:])
	eventually(t, "all that are left have one", func() bool {
		routes := a.many.routes.Load().all
		for g := range a.many.table.Load().Gateways() {
			if routes[g] == nil {
				return false
			}
		}
		return true
	})
}
