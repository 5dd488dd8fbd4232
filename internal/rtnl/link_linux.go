package rtnl

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link finds an interface by name.
func link(ifname string) (netlink.Link, error) {
	l, err := netlink.LinkByName(ifname)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, fmt.Errorf("no interface %q: create it first, or see `ip link` for those there are: %w", ifname, unix.ENODEV)
	}
	if err != nil {
		return nil, fmt.Errorf("look up interface %q: %w", ifname, permission(err))
	}
	return l, nil
}

// permission says which privilege is missing, if that is what the error is about.
func permission(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: run as root, or with CAP_NET_ADMIN", err)
	}
	return err
}

// prefix is p as the net package has it, host bits kept.
func prefix(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// AddAddress gives an interface an address. One that it has already is no error.
func AddAddress(ifname string, address netip.Prefix) error {
	l, err := link(ifname)
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: prefix(address)}); err != nil {
		return fmt.Errorf("add address %v to %s: %w", address, ifname, permission(err))
	}
	return nil
}

// AddRoute sends what goes to destination into an interface, which must be up.
// Host bits of destination are ignored. A route of the same prefix and metric
// that leads elsewhere is left as it is, and an error.
func AddRoute(ifname string, destination netip.Prefix) error {
	l, err := link(ifname)
	if err != nil {
		return err
	}
	r := netlink.Route{
		LinkIndex: l.Attrs().Index,
		Dst:       prefix(destination.Masked()),
		Scope:     netlink.SCOPE_LINK,
		Protocol:  unix.RTPROT_STATIC,
	}
	err = netlink.RouteAdd(&r)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add route %v to %s: %w", r.Dst, ifname, permission(err))
	}
	// The route that an address brings with it is as good as ours.
	same, listErr := netlink.RouteListFiltered(netlink.FAMILY_V4, &r, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
	if listErr == nil && len(same) > 0 {
		return nil
	}
	return fmt.Errorf("add route %v to %s: there is one that leads elsewhere (see `ip route show %v`): remove it first: %w", r.Dst, ifname, r.Dst, err)
}

// SetUp brings an interface up.
func SetUp(ifname string) error {
	l, err := link(ifname)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", ifname, permission(err))
	}
	return nil
}

// LinkState says whether an interface is up (IFF_UP, what an administrator sets)
// and whether it has a carrier (IFF_LOWER_UP). An interface that is down has none.
func LinkState(ifname string) (up, carrier bool, err error) {
	l, err := link(ifname)
	if err != nil {
		return false, false, err
	}
	flags := l.Attrs().RawFlags
	return flags&unix.IFF_UP != 0, flags&unix.IFF_LOWER_UP != 0, nil
}

// DeviceIndex is the index of an interface.
func DeviceIndex(ifname string) (int, error) {
	l, err := link(ifname)
	if err != nil {
		return 0, err
	}
	return l.Attrs().Index, nil
}

// AddressIsLocal says whether packets to an IPv4 address are for this host.
func AddressIsLocal(address netip.Addr) (bool, error) {
	if address = address.Unmap(); !address.Is4() {
		return false, nil
	}
	var none *NoRouteError
	r, err := Lookup(address.As4(), [4]byte{}, 0, 0)
	if errors.As(err, &none) {
		return false, nil
	}
	return r.Local, err
}
