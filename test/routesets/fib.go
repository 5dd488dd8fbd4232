package routesets

import (
	"net/netip"

	"ipipd/internal/fib"
)

// ByPrefix returns the routes of a Set as package fib takes them. It leaves out those that only the kernel applies: of
// type throw, and those that lead nowhere in a table without other routes.
func (s *Set) ByPrefix() map[netip.Prefix][]fib.Route {
	by, concerned := map[netip.Prefix][]fib.Route{}, map[uint32]bool{}
	for _, r := range s.Routes {
		concerned[r.Table] = concerned[r.Table] || r.Type == ""
	}
	for _, r := range s.Routes {
		if r.Type == "throw" || !concerned[r.Table] {
			continue
		}
		next := fib.Route{Table: r.Table, Metric: r.Metric, Unreachable: r.Type != ""}
		if next.Table == 0 {
			next.Table = 254
		}
		for _, h := range r.Hops {
			hop := fib.Hop{Weight: uint16(h.Weight)}
			if h.Via != "" {
				hop.Gateway = netip.MustParseAddr(h.Via).As4()
			}
			next.Hops = append(next.Hops, hop)
		}
		p := netip.MustParsePrefix(r.Prefix)
		by[p] = append(by[p], next)
	}
	return by
}

// Table returns the fib.Table of these routes.
func Table(by map[netip.Prefix][]fib.Route) *fib.Table {
	e := new(fib.Table).Edit()
	for p, routes := range by {
		e.Set(p, routes)
	}
	t, _, _ := e.Commit()
	return t
}
