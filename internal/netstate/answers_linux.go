package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// InterfaceAddresses returns the interfaces that are up and have IPv4 addresses, in the network namespace
// of the calling thread.
func InterfaceAddresses() (all []AddressedInterface, err error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the interfaces: %w", err)
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list the addresses: %w", err)
	}
	of := map[int][]netip.Prefix{}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			bits, _ := a.Mask.Size()
			of[a.LinkIndex] = append(of[a.LinkIndex], netip.PrefixFrom(ip, bits))
		}
	}
	for _, l := range links {
		attrs := l.Attrs()
		if attrs.RawFlags&unix.IFF_UP != 0 && of[attrs.Index] != nil {
			arp := attrs.RawFlags&(unix.IFF_LOOPBACK|unix.IFF_POINTOPOINT|unix.IFF_NOARP) == 0
			all = append(all, AddressedInterface{attrs.Name, attrs.Index, arp, of[attrs.Index]})
		}
	}
	return all, nil
}

// elsewhere is an address of the Internet: its route is taken for that of answers to clients.
var elsewhere = netip.MustParseAddr("8.8.8.8")

// FindReplyRoute returns the route that packets from an address of this host, or any, take to the Internet, in the
// network namespace of the calling thread.
func FindReplyRoute(source netip.Addr) (a ReplyRoute, err error) {
	routes, err := netlink.RouteGetWithOptions(elsewhere.AsSlice(), &netlink.RouteGetOptions{SrcAddr: source.AsSlice(), FIBMatch: true})
	if err != nil {
		return a, fmt.Errorf("look up the route from %v to %v: %w", source, elsewhere, err)
	}
	if len(routes) == 0 {
		return a, errNotARoute
	}
	r := &routes[0]
	a.Device, a.MTU, a.AdvMSS = r.LinkIndex, r.MTU, r.AdvMSS
	hops := []string{hop(r.Gw, r.LinkIndex)}
	if len(r.MultiPath) > 0 {
		a.Device, hops = r.MultiPath[0].LinkIndex, nil
		for _, h := range r.MultiPath {
			hops = append(hops, "nexthop"+hop(h.Gw, h.LinkIndex)+fmt.Sprintf(" weight %d", h.Hops+1))
		}
	}
	link, err := netlink.LinkByIndex(a.Device)
	if err != nil {
		return a, fmt.Errorf("read interface %d: %w", a.Device, err)
	}
	if mtu := link.Attrs().MTU; a.MTU == 0 || mtu < a.MTU {
		a.MTU = mtu
	}
	// What identifies the route, and its other properties, which ip route change would reset.
	words := []string{"default"}
	if r.Dst != nil && r.Dst.String() != "0.0.0.0/0" {
		words[0] = r.Dst.String()
	}
	word := func(is bool, format string, value any) {
		if is {
			words = append(words, fmt.Sprintf(format, value))
		}
	}
	if len(r.MultiPath) == 0 {
		words = append(words, strings.TrimSpace(hops[0]))
	}
	word(r.Flags&int(netlink.FLAG_ONLINK) != 0, "%s", "onlink")
	word(r.Table != unix.RT_TABLE_MAIN && r.Table != 0, "table %d", r.Table)
	word(r.Priority != 0, "metric %d", r.Priority)
	word(r.Protocol != unix.RTPROT_BOOT, "proto %d", int(r.Protocol))
	word(r.Src != nil, "src %v", r.Src)
	word(r.MTU != 0, "mtu %d", r.MTU)
	a.Words = strings.Join(words, " ")
	if len(r.MultiPath) > 0 {
		a.NextHops = strings.Join(hops, " ")
	}
	return a, nil
}

// hop returns a next hop in the syntax of ip route, with a space in front.
func hop(gateway []byte, device int) (text string) {
	if g, ok := netip.AddrFromSlice(gateway); ok {
		text = " via " + g.Unmap().String()
	}
	if link, err := netlink.LinkByIndex(device); err == nil {
		text += " dev " + link.Attrs().Name
	}
	return text
}
