package tunnel

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/test/memory"
)

// The local address and the MTU follow the route to the remote.
func TestControlUpdateRoute(t *testing.T) {
	a, b := pair(t, nil)
	a.network.set(func(w *fakeNetwork) { w.route = netstate.Route{Source: [4]byte{192, 0, 2, 99}, MTU: 1400} })
	eventually(t, "the address and the MTU are the route's", func() bool {
		s := a.Status()
		return s.CurrentLocalAddress == "192.0.2.99" && s.ActualMTU == 1380
	})
	if s, _ := a.device.State(); s.MTU != 1380 {
		t.Errorf("the device has an MTU of %d", s.MTU)
	}
	if err := a.device.Inject(datagram(100, nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b does not know who that is", func() bool { return b.Status().ProcessDrops["unknown-peer"] == 1 })

	a.network.set(func(w *fakeNetwork) { w.err = errors.New("no route") })
	a.network.set(func(w *fakeNetwork) { w.route, w.err = netstate.Route{Source: outerA.As4(), MTU: 1500}, nil })
	eventually(t, "it has come back", func() bool { return a.Status().CurrentLocalAddress == outerA.String() })
	a.send(t, b, datagram(1480, nil))
}

// Without a route nothing is sent, and the inner sender gets ICMP host unreachable (3/1).
func TestControlUpdateRoute_noRoute(t *testing.T) {
	a, b := pair(t, nil)
	a.network.set(func(w *fakeNetwork) {
		w.err = &netstate.NoRouteError{Destination: outerB, Remedy: "add one", Err: syscall.ENETUNREACH}
	})
	eventually(t, "the route has gone", func() bool { return a.route.Load().txDrop == drop.NoPath })
	p := datagram(100, nil)
	if err := a.device.Inject(p); err != nil {
		t.Fatal(err)
	}
	a.awaitHostUnreachable(t)
	if n := a.Status().Drops["no-path"]; n != 1 {
		t.Errorf("counted %d times", n)
	}
	a.network.set(func(w *fakeNetwork) { w.err = nil })
	eventually(t, "it is back", func() bool { return a.route.Load().txDrop == drop.None })
	a.send(t, b, p)
}

// The preferred source of a route into the tunnel itself is an inner address. It must not become the
// local address, or the peer's packets would be dropped as unknown-peer while the loop lasts.
func TestControlNewRoute_loop(t *testing.T) {
	a, b := pair(t, nil)
	a.network.set(func(w *fakeNetwork) { w.err = errors.New("no route") })
	eventually(t, "there is no way", func() bool { return a.warned(warning.NoPath) })
	a.network.set(func(w *fakeNetwork) {
		w.err = nil
		w.route.Device, w.route.Source = 77, [4]byte{10, 0, 0, 1}
	})
	eventually(t, "there is one again", func() bool { return !a.warned(warning.NoPath) })
	a.awaitRound(t)
	if local := address(a.route.Load().path.Local); local != outerA {
		t.Errorf("the local address is %v", local)
	}
	if p := datagram(60, nil); !bytes.Equal(b.send(t, a, p), p) {
		t.Error("the peer's packets do not arrive")
	}
}

// The MSS is clamped to what the first hop to a remote takes only with dont-fragment inherit, and never to a path MTU
// that was learnt: anybody may have forged it.
func TestRoute_largest(t *testing.T) {
	whole := encap.Outer{DontFragmentInherit: true}
	fragmented, learnt := &route{remote: new(remote), maxInner: 532}, &route{remote: new(remote), maxInner: 532, outer: whole}
	one, unknown := &route{maxInner: 532, outer: whole}, &route{remote: new(remote), maxInner: 532, outer: whole}
	fragmented.remote.largest.Store(1280)
	learnt.remote.largest.Store(1280)
	for _, c := range []struct {
		r         *route
		mtu, want int
	}{{nil, 1480, 1480}, {one, 1480, 1480}, {unknown, 1480, 1480}, {fragmented, 1480, 1480}, {learnt, 1480, 1280}, {learnt, 1200, 1200}} {
		if got := c.r.largest(c.mtu); got != c.want {
			t.Errorf("%+v: %d, want %d", c.r, got, c.want)
		}
	}
}

// Two tunnels routed into each other would lower each other's MTU by 20 again and again.
func TestControlMTUFeedback(t *testing.T) {
	a, _ := pair(t, nil)
	for mtu := 1480; mtu >= 1200; mtu -= 40 {
		a.network.set(func(w *fakeNetwork) { w.route.MTU = mtu })
		if want := max(mtu, 1400) - 20; mtu >= 1400 {
			eventually(t, "it follows", func() bool { return a.Status().ActualMTU == want })
		}
	}
	eventually(t, "it says that it stops", func() bool { return a.warned(warning.MTUFeedback) })
	if mtu := a.Status().ActualMTU; mtu != 1380 {
		t.Errorf("the MTU is %d", mtu)
	}
	a.network.set(func(w *fakeNetwork) { w.route.MTU = 1500 })
	eventually(t, "it goes up again", func() bool { return a.Status().ActualMTU == 1480 && !a.warned(warning.MTUFeedback) })
	a.network.set(func(w *fakeNetwork) { w.route.MTU = 1200 })
	eventually(t, "and down", func() bool { return a.Status().ActualMTU == 1180 })
}

// With many remotes each new one may have a smaller MTU than those before. Only repeated decreases by one remote
// are an MTU feedback.
func TestControlMTUFeedback_many(t *testing.T) {
	sa, _ := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, outerA })
	g := outerB
	mtu := func(mtu int) {
		a.network.set(func(w *fakeNetwork) {
			if w.routes == nil {
				w.routes = map[[4]byte]netstate.Route{}
			}
			w.routes[g.As4()] = netstate.Route{Device: 2, MTU: mtu}
		})
	}
	for n := range 8 {
		g = g.Next()
		mtu(1500 - 20*n)
		a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.PrefixFrom(g, 32), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: g.As4()}}}}}})
		eventually(t, "it follows each", func() bool { return a.Status().ActualMTU == 1480-20*n })
	}
	if a.warned(warning.MTUFeedback) {
		t.Error("it warns")
	}
	for n := range 8 {
		mtu(1300 - 20*n)
		a.awaitRound(t)
	}
	eventually(t, "it says that it stops, and by whom", func() bool {
		at := a.warning(warning.MTUFeedback)
		return at >= 0 && strings.HasSuffix(a.activeWarnings()[at].Detail, "by "+g.String())
	})
}
