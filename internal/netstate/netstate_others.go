//go:build !linux

package netstate

import (
	"context"
	"net"
	"net/netip"
)

// Lookup asks the kernel which source address it would take, and takes the MTU of
// the interface that has it. Marks and devices are Linux's.
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

// Resolve has nothing to do where a Route is never Ethernet.
func Resolve(r Route, dst [4]byte) error { return nil }

// Watch is Linux's. Elsewhere whoever asks has to look again from time to time.
func Watch(ctx context.Context, changed func(wentDown map[int]bool)) error { return ErrUnsupported }

// SafeToBypass is Linux's: elsewhere there is no way around the kernel.
func SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return "the system is not Linux"
}

// IngressFilters is Linux's, as is what it is about.
func IngressFilters(device int) (reason string) { return "the system is not Linux" }

// EgressHooks is Linux's, as is what it is about.
func EgressHooks(device int) (reason string) { return "the system is not Linux" }

// EgressTaps is Linux's, as is what it is about.
func EgressTaps(device int) (reason string) { return "the system is not Linux" }

// AddAddresses is Linux's.
func AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return addNone(addresses)
}

// AddRoutes is Linux's.
func AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return addNone(destinations)
}

func addNone(what []netip.Prefix) ([]netip.Prefix, error) {
	if len(what) == 0 {
		return nil, nil
	}
	return nil, ErrUnsupported
}

// CheckRoute is Linux's.
func CheckRoute(device int, destination netip.Prefix) error { return ErrUnsupported }

// SetRPS is Linux's.
func SetRPS(ifname, mask string) error { return ErrUnsupported }

// SetUp leaves the interface as it was opened.
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

// Reassembly is Linux's.
func Reassembly() (done, failed uint64, err error) { return 0, 0, ErrUnsupported }

// MinPMTU is Linux's: 0.
func MinPMTU() int { return 0 }
