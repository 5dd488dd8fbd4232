package fib_test

import (
	"net/netip"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/test/routesets"
)

func TestAcceptance_Check(t *testing.T) {
	a, b, c := address("198.51.100.1"), address("198.51.100.2"), address("198.51.100.3")
	stranger, balancer := address("203.0.113.66"), address("172.16.7.7")
	table := routesets.Table(map[netip.Prefix][]fib.Route{
		netip.MustParsePrefix("10.1.0.0/16"):     {{Hops: []fib.Hop{{Gateway: a}}}},
		netip.MustParsePrefix("10.2.0.0/16"):     {{Hops: []fib.Hop{{Gateway: a}, {Gateway: b}}}},
		netip.MustParsePrefix("10.2.3.0/24"):     {{Unreachable: true}},
		netip.MustParsePrefix("10.2.4.0/24"):     {{Hops: []fib.Hop{{Unusable: true}}}},
		netip.MustParsePrefix("10.1.7.0/24"):     {{Hops: []fib.Hop{{Gateway: c}}, Metric: 5}, {Hops: []fib.Hop{{Gateway: b}}}},
		netip.MustParsePrefix("192.0.2.0/24"):    {{Hops: []fib.Hop{{}}}},
		netip.MustParsePrefix("198.18.1.128/25"): {{Hops: []fib.Hop{{Gateway: a}}}},
	})
	prefixes := func(s ...string) fib.Prefixes {
		var all []netip.Prefix
		for _, p := range s {
			all = append(all, netip.MustParsePrefix(p))
		}
		return fib.NewPrefixes(all)
	}
	strict := fib.Acceptance{}
	any := fib.Acceptance{AnyPeer: true}
	listed := fib.Acceptance{From: prefixes("172.16.0.0/12", "198.51.100.3/32")}
	real := fib.Acceptance{From: prefixes("172.16.0.0/12"), To: prefixes("203.0.113.5/32", "10.9.0.0/16")}
	here := address("10.9.0.1")
	for _, c := range []struct {
		name         string
		accept       fib.Acceptance
		outer, inner [4]byte
		destination  [4]byte
		want         drop.Reason
	}{
		{"the gateway of the route to the inner source", strict, a, address("10.1.2.3"), here, drop.None},
		{"another remote's inner source", strict, b, address("10.1.2.3"), here, drop.ReversePath},
		{"a stranger", strict, stranger, address("10.1.2.3"), here, drop.ReversePath},
		{"an inner source without a route", strict, a, address("10.77.0.1"), here, drop.ReversePath},
		{"each next hop of ECMP", strict, a, address("10.2.0.1"), here, drop.None},
		{"each next hop of ECMP, the other", strict, b, address("10.2.0.1"), here, drop.None},
		{"no next hop of ECMP", strict, c, address("10.2.0.1"), here, drop.ReversePath},
		{"a blackhole in a route", strict, a, address("10.2.3.1"), here, drop.ReversePath},
		{"a route that cannot be used", strict, a, address("10.2.4.1"), here, drop.ReversePath},
		{"the lowest metric", strict, b, address("10.1.7.1"), here, drop.None},
		{"a higher metric", strict, c, address("10.1.7.1"), here, drop.ReversePath},
		{"no gateway: from the inner source itself", strict, address("192.0.2.9"), address("192.0.2.9"), here, drop.None},
		{"no gateway: from a neighbour", strict, address("192.0.2.8"), address("192.0.2.9"), here, drop.ReversePath},
		{"no gateway, and zero addresses", strict, [4]byte{}, address("192.0.2.9"), here, drop.ReversePath},

		{"any peer: any inner source", any, b, address("10.77.0.1"), here, drop.None},
		{"any peer: the gateway of a metric not in use", any, c, address("10.77.0.1"), here, drop.NotInAcceptFrom},
		{"any peer: a stranger", any, stranger, address("10.1.2.3"), here, drop.NotInAcceptFrom},
		{"any peer: one reached without a gateway", any, address("192.0.2.9"), address("10.77.0.1"), here, drop.None},
		{"any peer: one reached by another", any, address("198.18.1.129"), address("10.77.0.1"), here, drop.NotInAcceptFrom},
		{"any peer: nothing", any, [4]byte{}, [4]byte{}, [4]byte{}, drop.NotInAcceptFrom},

		{"a list: in a prefix", listed, balancer, address("8.8.8.8"), here, drop.None},
		{"a list: an address", listed, c, address("8.8.8.8"), here, drop.None},
		{"a list: a peer with its own inner source", listed, a, address("10.1.2.3"), here, drop.None},
		{"a list: a peer with another inner source", listed, a, address("8.8.8.8"), here, drop.NotInAcceptFrom},
		{"a list: a stranger", listed, stranger, address("8.8.8.8"), here, drop.NotInAcceptFrom},

		{"accept-to: an address", real, balancer, address("8.8.8.8"), address("203.0.113.5"), drop.None},
		{"accept-to: a prefix", real, balancer, address("8.8.8.8"), here, drop.None},
		{"accept-to: the next address", real, balancer, address("8.8.8.8"), address("203.0.113.6"), drop.NotInAcceptTo},
		{"accept-to: of a peer as well", real, a, address("10.1.2.3"), address("203.0.113.6"), drop.NotInAcceptTo},
		{"accept-to: a stranger", real, stranger, address("8.8.8.8"), address("203.0.113.5"), drop.NotInAcceptFrom},
		{"accept-to: a stranger, to anything else", real, stranger, address("8.8.8.8"), address("203.0.113.6"), drop.NotInAcceptFrom},
	} {
		if got := c.accept.Check(table, c.outer, c.inner, c.destination); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if got := strict.Check(new(fib.Table), a, a, here); got != drop.ReversePath {
		t.Errorf("without routes: %v", got)
	}
}

// CheckSender refuses a source from which Check would refuse any packet.
func TestAcceptance_CheckSender(t *testing.T) {
	gateway, direct, listed, stranger := address("198.51.100.1"), address("192.0.2.9"), address("172.16.7.7"), address("203.0.113.66")
	table := routesets.Table(map[netip.Prefix][]fib.Route{
		netip.MustParsePrefix("10.1.0.0/16"):  {{Hops: []fib.Hop{{Gateway: gateway}}}},
		netip.MustParsePrefix("192.0.2.0/24"): {{Hops: []fib.Hop{{}}}},
	})
	list := fib.Acceptance{From: fib.NewPrefixes([]netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")})}
	for _, c := range []struct {
		name   string
		accept fib.Acceptance
		outer  [4]byte
		want   drop.Reason
	}{
		{"a gateway", fib.Acceptance{}, gateway, drop.None},
		{"one that is reached without a gateway", fib.Acceptance{}, direct, drop.None},
		{"a stranger", fib.Acceptance{}, stranger, drop.ReversePath},
		{"any peer: a stranger", fib.Acceptance{AnyPeer: true}, stranger, drop.NotInAcceptFrom},
		{"a list: one of it", list, listed, drop.None},
		{"a list: a gateway", list, gateway, drop.None},
		{"a list: a stranger", list, stranger, drop.NotInAcceptFrom},
	} {
		if got := c.accept.CheckSender(table, c.outer); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNewPrefixes(t *testing.T) {
	p := fib.NewPrefixes([]netip.Prefix{netip.MustParsePrefix("10.1.2.3/8"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8::/32")})
	if p.Len() != 2 || !p.Contains(address("10.255.255.255")) || p.Contains(address("11.0.0.0")) {
		t.Errorf("%d prefixes", p.Len())
	}
	everything := fib.NewPrefixes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")})
	if !everything.Contains([4]byte{}) || !everything.Contains(address("255.255.255.255")) {
		t.Error("0.0.0.0/0 lacks an address")
	}
	if none := (fib.Prefixes{}); none.Len() != 0 || none.Contains([4]byte{}) {
		t.Error("the zero value is not empty")
	}
}
