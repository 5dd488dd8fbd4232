package netstate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link returns an interface by name.
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

// permission adds the missing privilege to an error of EPERM or EACCES.
func permission(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: run as root, or with CAP_NET_ADMIN", err)
	}
	return err
}

// prefix converts p, host bits kept.
func prefix(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// linkAt returns an interface by index.
func linkAt(device int) (netlink.Link, error) {
	l, err := netlink.LinkByIndex(device)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, fmt.Errorf("no interface with index %d in this network namespace: %w", device, unix.ENODEV)
	}
	if err != nil {
		return nil, fmt.Errorf("look up the interface with index %d: %w", device, permission(err))
	}
	return l, nil
}

// AddAddresses adds addresses to an interface and returns those that it lacked. After a
// failure it goes on; err is the first.
func AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return add(device, addresses, "address", func(l netlink.Link, a netip.Prefix) error {
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: prefix(a)})
	})
}

// AddRoutes adds routes to the destinations through an interface, which must be up, and
// returns those that were missing. Host bits are ignored. An existing route of the same
// prefix and metric is kept, even through another interface: see CheckRoute. The table is
// main, or the VRF's of the interface. After a failure it goes on; err is the first.
func AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return add(device, destinations, "route", func(l netlink.Link, d netip.Prefix) error {
		return netlink.RouteAdd(routeTo(l, d))
	})
}

func add(device int, what []netip.Prefix, kind string, one func(netlink.Link, netip.Prefix) error) (added []netip.Prefix, err error) {
	if len(what) == 0 {
		return nil, nil
	}
	l, err := linkAt(device)
	if err != nil {
		return nil, err
	}
	for _, p := range what {
		switch failed := one(l, p); {
		case failed == nil:
			added = append(added, p)
		case err == nil && !errors.Is(failed, unix.EEXIST):
			err = fmt.Errorf("add %s %v to %s: %w", kind, p, l.Attrs().Name, permission(failed))
		}
	}
	return added, err
}

// CheckRoute is an error if the table has no route of exactly that prefix through the
// interface, AddRoutes's own or a connected one. It dumps the routing table.
func CheckRoute(device int, destination netip.Prefix) error {
	l, err := linkAt(device)
	if err != nil {
		return err
	}
	r := routeTo(l, destination)
	same, err := netlink.RouteListFiltered(netlink.FAMILY_V4, r, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err == nil && len(same) > 0 {
		return nil
	}
	return fmt.Errorf("add route %v to %s: there is one that leads elsewhere (see `ip route show %v`): remove it first: %w", r.Dst, l.Attrs().Name, r.Dst, unix.EEXIST)
}

func routeTo(l netlink.Link, destination netip.Prefix) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: l.Attrs().Index,
		Dst:       prefix(destination.Masked()),
		Scope:     netlink.SCOPE_LINK,
		Protocol:  unix.RTPROT_STATIC,
		Table:     unix.RT_TABLE_MAIN,
	}
	if master := l.Attrs().MasterIndex; master != 0 {
		if m, err := netlink.LinkByIndex(master); err == nil {
			if vrf, ok := m.(*netlink.Vrf); ok {
				r.Table = int(vrf.Table)
			}
		}
	}
	return r
}

// SetUp sets an interface up.
func SetUp(device int) error {
	l, err := linkAt(device)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", l.Attrs().Name, permission(err))
	}
	return nil
}

// DeviceIndex is the index of an interface.
func DeviceIndex(ifname string) (int, error) {
	l, err := link(ifname)
	if err != nil {
		return 0, err
	}
	return l.Attrs().Index, nil
}

// AddressIsLocal reports whether this host may send from an IPv4 address: an interface
// of any VRF has it, or there is a route of the type local to it (AnyIP).
func AddressIsLocal(address netip.Addr) (bool, error) {
	if address = address.Unmap(); !address.Is4() {
		return false, nil
	}
	// The kernel refuses to look up a route from an address that is not local. The
	// destination needs the loopback interface only.
	if _, err := getRoute([4]byte{127, 0, 0, 1}, address.As4(), 0, 0, 0); err == nil && !address.IsUnspecified() {
		return true, nil
	}
	var none *NoRouteError
	r, err := Lookup(address.As4(), [4]byte{}, 0, 0)
	if errors.As(err, &none) {
		return false, nil
	}
	return r.Local, err
}
