package netstate

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
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

// RoutesByInterface returns the unicast routes of all tables in the network namespace of the calling thread,
// by the index of the interface that they lead into; a multipath route is there once for each next hop.
func RoutesByInterface() (routes map[int][]RouteMetrics, err error) {
	filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_UNICAST}
	list, err := netlink.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the routes: %w", err)
	}
	routes = map[int][]RouteMetrics{}
	for _, r := range list {
		prefix := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Dst != nil {
			address, _ := netip.AddrFromSlice(r.Dst.IP.To4())
			bits, _ := r.Dst.Mask.Size()
			prefix = netip.PrefixFrom(address, bits)
		}
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via, Encap: r.Encap}}
		}
		source, _ := netip.AddrFromSlice(r.Src.To4())
		for _, h := range hops {
			gateway, _ := netip.AddrFromSlice(h.Gw.To4())
			unusable := h.Via != nil || h.Encap != nil || h.Gw != nil && !ipv4.IsUnicast(gateway)
			routes[h.LinkIndex] = append(routes[h.LinkIndex], RouteMetrics{
				Prefix: prefix, Gateway: gateway, Unusable: unusable, MTU: r.MTU, AdvMSS: r.AdvMSS,
				Source: source, Table: r.Table, Metric: r.Priority, Multipath: len(hops) > 1,
			})
		}
	}
	return routes, nil
}
