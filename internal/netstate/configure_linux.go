package netstate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// change is a request that changes an interface, its addresses or the routes into it.
type change struct {
	*nl.NetlinkRequest
	device   int
	what     string       // format of object and the interface's name, for an error; "": a failure is no error
	object   fmt.Stringer // the address, route or alternative name as the caller gave it
	route    routeKey     // of the route, zero if object is none
	harmless unix.Errno   // an errno that is no error to Configure
	program  int          // the descriptor of the eBPF program that it adds; 0 is none
}

// Configure adds the interfaces' addresses, sets them up, and adds routes into them, with few
// system calls however many there are. An existing route of the same prefix that leads
// elsewhere is an error. After an error some are configured; it is an *InterfaceError about
// the first that failed. As on the kernel's ipip, there is no IPv6 link-local address, whose
// router solicitations a tunnel would only drop.
func (h *Host) Configure(interfaces []Interface) error {
	h.readMessages()
	var changes []change
	for _, i := range interfaces {
		routes, err := h.routeChanges(unix.RTM_NEWROUTE, unix.NLM_F_EXCL, i.Index, i.Routes)
		if err != nil {
			return &InterfaceError{i.Index, err}
		}
		if i.Adopted {
			stray, err := h.strayPeers(i.Index, i.Routes)
			if err != nil {
				return &InterfaceError{i.Index, err}
			}
			changes = append(changes, stray...)
		}
		if i.AltName != "" && !(i.Adopted && h.hasName(i.Index, i.AltName)) {
			changes = append(changes, addAltName(i.Index, i.AltName))
		}
		changes = append(changes, addressChanges(unix.RTM_NEWADDR, i.Index, i.Addresses)...)
		if i.Program != (Program{}) {
			clsact, program := programChanges(i.Index, i.Program)
			clsact.what, program.what = "", ""
			changes = append(changes, clsact)
			if !i.Adopted {
				changes = append(changes, program)
			}
		} else if i.Adopted {
			changes = append(changes, removeProgram(i.Index))
		}
		changes = append(changes, noLinkLocal(i.Index), setUp(i.Index))
		changes = append(changes, routes...)
	}
	failed := h.executeAll(changes)
	through := map[routeKey]bool{} // whether the route exists through the same interface
	for i, c := range changes {
		if c.route.table != 0 && failed[i] == unix.EEXIST {
			through[c.route] = false
		}
	}
	listing := h.findRoutes(through)
	for i, c := range changes {
		err := failed[i]
		switch {
		case err == nil || c.what == "" || err == c.harmless, err == unix.EEXIST && through[c.route]:
			continue
		case err == unix.EEXIST && c.route.table != 0 && listing != nil:
			err = listing
		}
		return &InterfaceError{c.device, h.explain(&c, err)}
	}
	return nil
}

// hasName reports whether an interface has a name.
func (h *Host) hasName(device int, name string) bool {
	named, err := h.DeviceIndex(name)
	return err == nil && named == device
}

// AddAddresses adds addresses to an interface and returns those that it lacked. After a
// failure it continues; err is the first one.
func (r *requester) AddAddresses(device int, addresses []InterfaceAddress) (added []InterfaceAddress, err error) {
	done, err := r.change(addressChanges(unix.RTM_NEWADDR, device, addresses), unix.EEXIST)
	return pick(addresses, done), err
}

// RemoveAddresses removes addresses from an interface; one that is gone is no error. It sets
// promote_secondaries, without which the kernel removes the other addresses of the subnet, too. With the
// last address the kernel removes the routes. After a failure it continues; err is the first one.
func (r *requester) RemoveAddresses(device int, addresses []InterfaceAddress) error {
	if len(addresses) == 0 {
		return nil
	}
	changes := append([]change{promoteSecondaries(device)}, addressChanges(unix.RTM_DELADDR, device, addresses)...)
	_, err := r.change(changes, unix.EADDRNOTAVAIL, unix.ENODEV)
	return err
}

// SetUp sets an interface up.
func (r *requester) SetUp(device int) error {
	_, err := r.change([]change{setUp(device)})
	return err
}

// pick returns the elements of all at the indices.
func pick[T any](all []T, indices []int) (picked []T) {
	for _, i := range indices {
		picked = append(picked, all[i])
	}
	return picked
}

// change executes changes, and returns the indices of those that succeeded, and the first
// error that is not ignored.
func (r *requester) change(changes []change, ignored ...error) (done []int, err error) {
	for i, failure := range r.executeAll(changes) {
		switch c := &changes[i]; {
		case failure == nil:
			done = append(done, i)
		case err == nil && c.what != "" && !slices.Contains(ignored, failure):
			err = r.explain(c, failure)
		}
	}
	return done, err
}

// executeAll executes changes on the batch socket, and returns the error of each.
func (r *requester) executeAll(changes []change) (failed []error) {
	requests, program := make([]*nl.NetlinkRequest, len(changes)), -1
	for i, c := range changes {
		requests[i] = c.NetlinkRequest
		if c.program > 0 { // the same one in all changes
			program = c.program
		}
	}
	s := r.batch
	if s == nil {
		var err error
		if s, err = openRequestSocket(unix.NETLINK_ROUTE); err != nil {
			return slices.Repeat([]error{err}, len(changes))
		}
		defer s.close()
	}
	return s.executeAll(requests, program)
}

// explain returns the error of a change that failed with err: what failed, and the remedy.
func (r *requester) explain(c *change, err error) error {
	l, lookup := r.getLink(c.device, "")
	if errors.Is(lookup, unix.ENODEV) {
		return lookupError(c.device, lookup)
	}
	if err == unix.EEXIST && c.route.table != 0 {
		show := c.route.destination.String()
		if c.route.table != unix.RT_TABLE_MAIN {
			show += fmt.Sprintf(" table %d", c.route.table)
		}
		err = fmt.Errorf("there is one that leads elsewhere (see `ip route show %s`): remove it first: %w", show, err)
	}
	if err == unix.EINVAL && c.route.gateway.IsValid() {
		err = fmt.Errorf("%v is an address of this host, or not one of a host: give the other end's: %w", c.route.gateway, err)
	}
	name := cmp.Or(l.name, fmt.Sprintf("interface %d", c.device))
	return fmt.Errorf(c.what+": %w", c.object, name, permission(err))
}

// lookupError returns the error of looking up an interface by index.
func lookupError(device int, err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("no interface with index %d in this network namespace: %w", device, err)
	}
	return fmt.Errorf("look up the interface with index %d: %w", device, permission(err))
}

// addressChanges returns an RTM_NEWADDR or RTM_DELADDR for each address.
func addressChanges(kind, device int, addresses []InterfaceAddress) (changes []change) {
	what, flags := "add address %v to %v", unix.NLM_F_CREATE|unix.NLM_F_EXCL
	if kind == unix.RTM_DELADDR {
		what, flags = "remove address %v from %v", 0
	}
	for _, a := range addresses {
		req := nl.NewNetlinkRequest(kind, flags)
		msg := nl.NewIfAddrmsg(unix.AF_INET)
		msg.Index, msg.Prefixlen = uint32(device), uint8(a.Prefix.Bits())
		req.AddData(msg)
		local := a.Prefix.Addr().As4()
		peer := local // IFA_ADDRESS: the peer's address, without a peer the local one
		if a.Peer.IsValid() {
			peer = a.Peer.As4()
		}
		req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, local[:]))
		req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, peer[:]))
		if hostBits := uint32(1)<<(32-a.Prefix.Bits()) - 1; a.Prefix.Bits() < 31 { // RFC 3021
			broadcast := binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(local[:])|hostBits)
			req.AddData(nl.NewRtAttr(unix.IFA_BROADCAST, broadcast))
		}
		changes = append(changes, change{NetlinkRequest: req, device: device, what: what, object: a, harmless: unix.EEXIST})
	}
	return changes
}

// linkRequest returns an RTM_NEWLINK, RTM_SETLINK or RTM_DELLINK of an existing interface, or of none if device is 0.
func linkRequest(kind, device int, flags uint32, attributes ...*nl.RtAttr) *nl.NetlinkRequest {
	req, info := nl.NewNetlinkRequest(kind, 0), nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index, info.Flags, info.Change = int32(device), flags, flags
	req.AddData(info)
	for _, a := range attributes {
		req.AddData(a)
	}
	return req
}

// altName is an alternative name.
type altName string

func (n altName) String() string { return strconv.Quote(string(n)) }

// addAltName returns the change that `ip link property add altname` makes.
func addAltName(device int, name string) change {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINKPROP, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_APPEND)
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index = int32(device)
	req.AddData(info)
	list := nl.NewRtAttr(iflaPropList|unix.NLA_F_NESTED, nil)
	list.AddRtAttr(iflaAltIfname, nl.ZeroTerminated(name))
	req.AddData(list)
	const what = "add the alternative name %v, which no other interface may have, to %v"
	return change{NetlinkRequest: req, device: device, what: what, object: altName(name), harmless: unix.EOPNOTSUPP}
}

func setUp(device int) change {
	return change{NetlinkRequest: linkRequest(unix.RTM_NEWLINK, device, unix.IFF_UP), device: device, what: "bring up %[2]v"}
}

// noLinkLocal sets IPv6's addr_gen_mode to none, which fails on a kernel without IPv6.
func noLinkLocal(device int) change {
	const none = 1 // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{none})
	return change{NetlinkRequest: linkRequest(unix.RTM_SETLINK, device, 0, spec), device: device}
}

// promoteSecondaries sets net.ipv4.conf.IFNAME.promote_secondaries.
func promoteSecondaries(device int) change {
	const conf, promote = 1, 20 // IFLA_INET_CONF, IPV4_DEVCONF_PROMOTE_SECONDARIES of linux/if_link.h and linux/ip.h
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(conf, nil).AddRtAttr(promote, nl.Uint32Attr(1))
	return change{NetlinkRequest: linkRequest(unix.RTM_SETLINK, device, 0, spec), device: device}
}

// RouteTable returns the table of an interface's routes that name none, its VRF's or else main, in the calling
// thread's network namespace.
func RouteTable(device int) (table uint32, err error) {
	l, err := fresh.getLink(device, "")
	if err == nil && l.master != 0 {
		l, err = fresh.getLink(l.master, "")
		table = l.vrfTable
	}
	if err != nil {
		return 0, lookupError(device, err)
	}
	return cmp.Or(table, unix.RT_TABLE_MAIN), nil
}
