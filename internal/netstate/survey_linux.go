package netstate

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// KernelTunnels returns the kernel's own tunnels of protocol 4 in the network namespace of the calling
// thread.
func KernelTunnels() (tunnels []KernelTunnel, err error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the interfaces: %w", err)
	}
	for _, l := range links {
		if t, ok := l.(*netlink.Iptun); ok {
			local, _ := netip.AddrFromSlice(t.Local.To4())
			remote, _ := netip.AddrFromSlice(t.Remote.To4())
			tunnels = append(tunnels, KernelTunnel{t.Name, local, remote})
		}
	}
	return tunnels, nil
}

// RoutesInto returns the unicast routes into an interface, of all tables, in the network namespace of the
// calling thread.
func RoutesInto(ifindex int) (routes []RouteMetrics, err error) {
	filter := &netlink.Route{LinkIndex: ifindex, Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_UNICAST}
	list, err := netlink.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the routes: %w", err)
	}
	for _, r := range list {
		prefix := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Dst != nil {
			address, _ := netip.AddrFromSlice(r.Dst.IP.To4())
			bits, _ := r.Dst.Mask.Size()
			prefix = netip.PrefixFrom(address, bits)
		}
		routes = append(routes, RouteMetrics{prefix, r.MTU, r.AdvMSS})
	}
	return routes, nil
}
