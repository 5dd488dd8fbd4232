package netstate

import (
	"net/netip"

	"ipipd/internal/fib"
)

// RouteChange has the routes of a prefix out of an interface as they are now: the unicast routes of all tables and,
// of the tables that have routes out of the interface, the unreachable, blackhole and prohibit routes.
// Of the same table and metric the kernel prefers the first route. No Routes: the prefix has none any more.
type RouteChange struct {
	Prefix netip.Prefix
	Routes []fib.Route
}
