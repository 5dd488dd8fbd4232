//go:build !linux

package netstate

import (
	"context"
	"net"
	"net/netip"
)

// Lookup takes the source address that the kernel prefers for dst, and the MTU of its
// interface. Marks and devices are for Linux.
func Lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	if mark != 0 || device != 0 {
		return Route{}, ErrUnsupported
	}
	to := netip.AddrFrom4(dst)
	// Nothing is sent: connecting a UDP socket only looks up the route.
	conn, err := net.Dial("udp4", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		return Route{}, &NoRouteError{Destination: to, Why: "add a route to it", Err: err}
	}
	defer conn.Close()
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	r := Route{Source: src, Local: local == to}
	if src == [4]byte{} {
		r.Source = local.As4()
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return Route{}, err
	}
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == local {
				r.Device, r.DeviceName, r.MTU = i.Index, i.Name, i.MTU
				return r, nil
			}
		}
	}
	return Route{}, &NoRouteError{Destination: to, Why: "no interface has the address that the route prefers", Err: ErrUnsupported}
}

// Resolve does nothing: a Route is never Ethernet here.
func Resolve(r Route, dst [4]byte) error { return nil }

// Watch is for Linux. Elsewhere the caller polls.
func Watch(ctx context.Context, changed func(wentDown map[int]bool)) error { return ErrUnsupported }

// SafeToBypass is for Linux.
func SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return "the system is not Linux"
}

// IngressFilters is for Linux.
func IngressFilters(device int) (reason string) { return "the system is not Linux" }

// EgressHooks is for Linux.
func EgressHooks(device int) (reason string) { return "the system is not Linux" }

// EgressTaps is for Linux.
func EgressTaps(device int) (reason string) { return "the system is not Linux" }

// AddAddresses is for Linux.
func AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return addNone(addresses)
}

// AddRoutes is for Linux.
func AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return addNone(destinations)
}

func addNone(prefixes []netip.Prefix) ([]netip.Prefix, error) {
	if len(prefixes) == 0 {
		return nil, nil
	}
	return nil, ErrUnsupported
}

// CheckRoute is for Linux.
func CheckRoute(device int, destination netip.Prefix) error { return ErrUnsupported }

// SetRPS is for Linux.
func SetRPS(ifname, mask string) error { return ErrUnsupported }

// SetUp does nothing.
func SetUp(device int) error { return nil }

// DeviceIndex is the index of an interface.
func DeviceIndex(ifname string) (int, error) {
	i, err := net.InterfaceByName(ifname)
	if err != nil {
		return 0, err
	}
	return i.Index, nil
}

// AddressIsLocal reports whether an interface of this host has the address.
func AddressIsLocal(address netip.Addr) (bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == address {
			return true, nil
		}
	}
	return false, nil
}

// Reassembly is for Linux.
func Reassembly() (done, failed uint64, err error) { return 0, 0, ErrUnsupported }

// MinPMTU is for Linux: 0.
func MinPMTU() int { return 0 }
