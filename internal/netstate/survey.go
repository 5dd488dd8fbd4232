package netstate

import "net/netip"

// KernelTunnel is a tunnel of the kernel's ipip module. An address that is not set is unspecified.
type KernelTunnel struct {
	Name          string
	Local, Remote netip.Addr
}

// RouteMetrics is a route with its MTU and MSS in bytes, 0 if they are not set.
type RouteMetrics struct {
	Prefix netip.Prefix
	// Gateway is the next hop; the zero Addr is none. Unusable: the next hop is not an IPv4 unicast address,
	// or the route has an encapsulation of its own (lwtunnel).
	Gateway     netip.Addr
	Unusable    bool
	MTU, AdvMSS int
	// Source is the preferred source address; the zero Addr is none. Multipath: the route has other next hops too.
	Source        netip.Addr
	Table, Metric int
	Multipath     bool
}
