package tunnel

import (
	"net/netip"
	"slices"
	"testing"

	"ipipd/internal/fib"
	"ipipd/internal/netstate"
)

// A peer whose route is gone, or leads elsewhere, is lost until the route is there again. Other routes have no effect.
func TestPeers_note(t *testing.T) {
	c, err := parseConfig("remote-address=any local-address=192.0.2.1 peers=10.1.0.0/16=198.51.100.7,10.2.0.0/16=198.51.100.8 route=10.3.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	m := newRemotes(&c)
	begun := m.reset()
	via := func(gateway byte, metric uint32) fib.Route {
		return fib.Route{Table: mainTable, Metric: metric, Protocol: netstate.RouteProtocolPeer, Hops: []fib.Hop{{Gateway: [4]byte{198, 51, 100, gateway}}}}
	}
	elsewhere := via(7, 0)
	elsewhere.Table, elsewhere.Protocol = 100, 4
	for _, step := range []struct {
		what   string
		prefix string
		routes []fib.Route
		lost   bool // what note returns
		absent int  // how many routes withoutPresent returns
	}{
		{"it is there", "10.1.0.0/16", []fib.Route{via(7, 0)}, false, 1},
		{"another's of another metric beside it", "10.1.0.0/16", []fib.Route{via(9, 20), via(7, 0)}, false, 1},
		{"only another's", "10.1.0.0/16", []fib.Route{via(9, 20)}, true, 2},
		{"another's in its place", "10.1.0.0/16", []fib.Route{via(9, 0)}, true, 2},
		{"an operator's of another table, to the same remote", "10.1.0.0/16", []fib.Route{elsewhere}, true, 2},
		{"gone", "10.2.0.0/16", nil, true, 3},
		{"a prefix that is no peer's", "10.4.0.0/16", nil, false, 3},
		{"there again", "10.1.0.0/16", []fib.Route{via(7, 0)}, false, 2},
		{"of another metric", "10.2.0.0/16", []fib.Route{via(8, 5)}, true, 2},
		{"there again", "10.2.0.0/16", []fib.Route{via(8, 0)}, false, 1},
	} {
		m.follow(begun, []netstate.RouteChange{{Prefix: netip.MustParsePrefix(step.prefix), Routes: step.routes}})
		if news := m.takeLost(); news != step.lost || m.takeLost() {
			t.Errorf("%s: news %v", step.what, news)
		}
		absent := m.withoutPresent(c.Routes)
		if len(absent) != step.absent || !slices.ContainsFunc(absent, func(r netstate.InterfaceRoute) bool { return !r.Gateway.IsValid() }) {
			t.Errorf("%s: %v is to be added", step.what, absent)
		}
	}
	// A lost route is still to be added after a change, unless the peer is gone or has another gateway.
	m.follow(begun, []netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, {Prefix: netip.MustParsePrefix("10.2.0.0/16")}})
	m.setPeers(&c)
	if absent := m.withoutPresent(c.Routes); len(absent) != 3 {
		t.Errorf("after a change only %v is to be added", absent)
	}
	if c, err = parseConfig("remote-address=any local-address=192.0.2.1 peers=10.1.0.0/16=198.51.100.9"); err != nil {
		t.Fatal(err)
	}
	if m.setPeers(&c); len(m.peers.lost) != 0 {
		t.Errorf("%v are lost", m.peers.lost)
	}
}
