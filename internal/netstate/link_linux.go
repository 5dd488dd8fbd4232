package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// link is what is read of an interface. Two are equal if nothing that matters has changed.
type link struct {
	index     int
	name      string
	altNames  string // each with a space in front
	kind      uint16 // ARPHRD_ETHER, …
	flags     uint32 // IFF_UP, …, without volatileFlags
	operstate uint8
	mtu       int
	master    int // index
	slaveKind string
	mac       [6]byte
	hasMAC    bool // the address has six octets
	// promiscuous: a capture, for instance, wants all packets.
	promiscuous bool
}

// volatileFlags do not change how the kernel routes.
const volatileFlags = unix.IFF_PROMISC | unix.IFF_ALLMULTI

func (l *link) up() bool { return l.flags&unix.IFF_UP != 0 }

// names are those that the interface is found by.
func (l *link) names() []string { return append(strings.Fields(l.altNames), l.name) }

// Of linux/if_link.h.
const (
	iflaPropList     = 52 // IFLA_PROP_LIST
	iflaAltIfname    = 53 // IFLA_ALT_IFNAME
	iflaSlaveKind    = 4  // IFLA_INFO_SLAVE_KIND
	filterSkipStats  = 1 << 3
	iflaExtendedMask = 29 // IFLA_EXT_MASK
)

// parseLink reads an RTM_NEWLINK or RTM_DELLINK that starts at its ifinfomsg. It is not ok
// for one that says only a part: of a bridge's port, or of wireless extensions.
func parseLink(b []byte) (l link, ok bool) {
	if len(b) < unix.SizeofIfInfomsg || b[0] != unix.AF_UNSPEC {
		return link{}, false
	}
	const kind, index, flags = 2, 4, 8
	l = link{
		kind:  binary.NativeEndian.Uint16(b[kind:]),
		index: int(binary.NativeEndian.Uint32(b[index:])),
		flags: binary.NativeEndian.Uint32(b[flags:]) &^ volatileFlags,
	}
	err := eachAttr(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(value)
		case unix.IFLA_MTU:
			l.mtu, ok = int(u32(value)), true
		case unix.IFLA_OPERSTATE:
			if len(value) > 0 {
				l.operstate = value[0]
			}
		case unix.IFLA_MASTER:
			l.master = int(u32(value))
		case unix.IFLA_ADDRESS:
			if l.hasMAC = len(value) == len(l.mac); l.hasMAC {
				l.mac = [6]byte(value)
			}
		case unix.IFLA_PROMISCUITY:
			l.promiscuous = u32(value) != 0
		case unix.IFLA_LINKINFO:
			return eachAttr(value, func(kind uint16, value []byte) error {
				if kind == iflaSlaveKind {
					l.slaveKind = unix.ByteSliceToString(value)
				}
				return nil
			})
		case iflaPropList:
			return eachAttr(value, func(kind uint16, value []byte) error {
				if kind == iflaAltIfname {
					l.altNames += " " + unix.ByteSliceToString(value)
				}
				return nil
			})
		}
		return nil
	})
	return l, ok && err == nil
}

// getLinks returns all interfaces, or the one that has the index, or the name if it is
// not "".
func (r *requester) getLinks(index int, name string) (all []link, err error) {
	messages, err := r.getLinkMessages(index, name)
	for _, m := range messages {
		if l, ok := parseLink(m); ok {
			all = append(all, l)
		}
	}
	return all, err
}

// getLinkMessages is getLinks before parseLink.
func (r *requester) getLinkMessages(index int, name string) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index = int32(index)
	req.AddData(info)
	req.AddData(nl.NewRtAttr(iflaExtendedMask, nl.Uint32Attr(filterSkipStats)))
	execute := r.dump
	if index != 0 || name != "" {
		execute = r.execute
	}
	if attribute := unix.IFLA_IFNAME; name != "" { // of either kind, if it is short
		if len(name) >= unix.IFNAMSIZ {
			attribute = iflaAltIfname
		}
		req.AddData(nl.NewRtAttr(attribute, nl.ZeroTerminated(name)))
	}
	return execute(req, unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
}

// getLink is getLinks for one; ENODEV says that there is none.
func (r *requester) getLink(index int, name string) (link, error) {
	all, err := r.getLinks(index, name)
	if err == nil && len(all) != 1 {
		err = unix.ENODEV
	}
	if err != nil {
		return link{}, err
	}
	return all[0], nil
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
func (r *requester) linkAt(device int) (netlink.Link, error) {
	l, err := r.library.LinkByIndex(device)
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
func (r *requester) AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	if len(addresses) == 0 {
		return nil, nil
	}
	l, err := r.linkAt(device)
	if err != nil {
		return nil, err
	}
	return r.addAddresses(l, addresses)
}

func (r *requester) addAddresses(l netlink.Link, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return addEach(l, addresses, "address", func(a netip.Prefix) error {
		return r.library.AddrAdd(l, &netlink.Addr{IPNet: prefix(a)})
	})
}

// AddRoutes adds routes to the destinations through an interface, which must be up, and
// returns those that were missing. Host bits are ignored. An existing route of the same
// prefix and metric is kept, even through another interface: see CheckRoute. The table is
// main, or the VRF's of the interface. After a failure it goes on; err is the first.
func (r *requester) AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	if len(destinations) == 0 {
		return nil, nil
	}
	l, err := r.linkAt(device)
	if err != nil {
		return nil, err
	}
	return r.addRoutes(l, destinations)
}

func (r *requester) addRoutes(l netlink.Link, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return addEach(l, destinations, "route", func(d netip.Prefix) error { return r.library.RouteAdd(r.routeTo(l, d)) })
}

func addEach(l netlink.Link, what []netip.Prefix, kind string, one func(netip.Prefix) error) (added []netip.Prefix, err error) {
	for _, p := range what {
		switch failed := one(p); {
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
func (r *requester) CheckRoute(device int, destination netip.Prefix) error {
	l, err := r.linkAt(device)
	if err != nil {
		return err
	}
	want := r.routeTo(l, destination)
	same, err := r.library.RouteListFiltered(netlink.FAMILY_V4, want, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err == nil && len(same) > 0 {
		return nil
	}
	return fmt.Errorf("add route %v to %s: there is one that leads elsewhere (see `ip route show %v`): remove it first: %w", want.Dst, l.Attrs().Name, want.Dst, unix.EEXIST)
}

func (r *requester) routeTo(l netlink.Link, destination netip.Prefix) *netlink.Route {
	route := &netlink.Route{
		LinkIndex: l.Attrs().Index,
		Dst:       prefix(destination.Masked()),
		Scope:     netlink.SCOPE_LINK,
		Protocol:  unix.RTPROT_STATIC,
		Table:     unix.RT_TABLE_MAIN,
	}
	if master := l.Attrs().MasterIndex; master != 0 {
		if m, err := r.library.LinkByIndex(master); err == nil {
			if vrf, ok := m.(*netlink.Vrf); ok {
				route.Table = int(vrf.Table)
			}
		}
	}
	return route
}

// SetUp sets an interface up.
func (r *requester) SetUp(device int) error {
	l, err := r.linkAt(device)
	if err != nil {
		return err
	}
	return r.setUp(l)
}

func (r *requester) setUp(l netlink.Link) error {
	if err := r.library.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", l.Attrs().Name, permission(err))
	}
	return nil
}

// DeviceIndex is the index of an interface.
func (r *requester) DeviceIndex(ifname string) (int, error) {
	l, err := r.getLink(0, ifname)
	if errors.Is(err, unix.ENODEV) {
		return 0, &NoDeviceError{ifname}
	}
	if err != nil {
		return 0, fmt.Errorf("look up interface %q: %w", ifname, permission(err))
	}
	return l.index, nil
}

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

// Configure adds an interface's addresses, sets it up, and adds routes into it. An existing
// route of the same prefix that leads elsewhere is an error. As on the kernel's ipip, there is
// no IPv6 link-local address, whose router solicitations a tunnel would only drop.
func (r *requester) Configure(device int, addresses, routes []netip.Prefix) error {
	l, err := r.linkAt(device)
	if err != nil {
		return err
	}
	if _, err := r.addAddresses(l, addresses); err != nil {
		return err
	}
	_ = r.library.LinkSetIP6AddrGenMode(l, addrGenModeNone) // fails on a kernel without IPv6
	if err := r.setUp(l); err != nil {
		return err
	}
	added, err := r.addRoutes(l, routes)
	for _, route := range routes {
		if err == nil && !slices.Contains(added, route) {
			err = r.CheckRoute(device, route)
		}
	}
	return err
}

// AddAddresses is Host.AddAddresses in the calling thread's network namespace.
func AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return fresh.AddAddresses(device, addresses)
}

// SetUp is Host.SetUp in the calling thread's network namespace.
func SetUp(device int) error { return fresh.SetUp(device) }

// DeviceIndex is Host.DeviceIndex in the calling thread's network namespace.
func DeviceIndex(ifname string) (int, error) { return fresh.DeviceIndex(ifname) }
