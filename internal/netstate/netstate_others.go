//go:build !linux

package netstate

import (
	"net"
	"net/netip"
)

// lookup takes the source address that the kernel prefers for dst, and the MTU of its
// interface. Marks and devices are for Linux.
func lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	if mark != 0 || device != 0 {
		return Route{}, ErrUnsupported
	}
	to := netip.AddrFrom4(dst)
	// Nothing is sent: connecting a UDP socket only looks up the route.
	conn, err := net.Dial("udp4", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		return Route{}, &NoRouteError{Destination: to, Remedy: "add a route to it", Err: err}
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
	return Route{}, &NoRouteError{Destination: to, Cause: "no interface has the address that the route prefers", Remedy: "add it to one", Err: ErrUnsupported}
}

func addNone[T any](wanted []T) ([]T, error) {
	if len(wanted) == 0 {
		return nil, nil
	}
	return nil, ErrUnsupported
}

func deviceIndex(ifname string) (int, error) {
	i, err := net.InterfaceByName(ifname)
	if err != nil {
		return 0, err
	}
	return i.Index, nil
}

// isLocal reports whether an interface of this host has the address.
func isLocal(address netip.Addr) (bool, error) {
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

// MinPMTU returns 0: unknown.
func MinPMTU() int { return 0 }

// InterfaceAddresses returns ErrUnsupported.
func InterfaceAddresses() ([]AddressedInterface, error) { return nil, ErrUnsupported }

// FindReplyRoute returns ErrUnsupported.
func FindReplyRoute(source netip.Addr) (ReplyRoute, error) { return ReplyRoute{}, ErrUnsupported }
