package netstate

import (
	"net/netip"

	"ipipd/internal/fib"
)

// RouteChange is what a prefix's routes out of an interface are now, in all tables that have any: with those of the
// types unreachable, blackhole and prohibit there, which are of no interface, and without those of other types than
// unicast. Of the same table and metric the kernel prefers the first one. None: there is no route.
type RouteChange struct {
	Prefix netip.Prefix
	Routes []fib.Route
}
