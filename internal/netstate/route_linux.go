package netstate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// routeKey identifies a route into an interface, its TOS aside.
type routeKey struct {
	table       uint32 // not 0
	device      int
	destination netip.Prefix
	gateway     netip.Addr // the zero Addr is none
	metric      uint32
}

// tableRoute is what is read of a route.
type tableRoute struct {
	routeKey
	ours bool // its protocol, scope, type and TOS are those that routeChanges sets
}

// AddRoutes adds routes through an interface, which must be up, and returns those that were
// missing. Host bits are ignored. An existing route of the same prefix, metric and table is
// kept, even through another interface. After a failure it continues; err is the first one.
func (h *Host) AddRoutes(device int, routes []InterfaceRoute) (added []InterfaceRoute, err error) {
	return h.newRoutes(unix.NLM_F_EXCL, device, routes, unix.EEXIST)
}

// ReplaceRoutes is AddRoutes, but it replaces an existing route of the same prefix, metric and
// table, wherever that leads. At each instant packets find the old route or the new one.
func (h *Host) ReplaceRoutes(device int, routes []InterfaceRoute) error {
	_, err := h.newRoutes(unix.NLM_F_REPLACE, device, routes)
	return err
}

func (h *Host) newRoutes(flag, device int, routes []InterfaceRoute, ignored ...error) (added []InterfaceRoute, err error) {
	if len(routes) == 0 {
		return nil, nil
	}
	h.readMessages()
	changes, err := h.routeChanges(unix.RTM_NEWROUTE, flag, device, routes)
	if err != nil {
		return nil, err
	}
	done, err := h.change(changes, ignored...)
	return pick(routes, done), err
}

// RemoveRoutes removes routes that AddRoutes added through an interface; one that is gone is no error.
// After a failure it continues; err is the first one.
func (h *Host) RemoveRoutes(device int, routes []InterfaceRoute) error {
	if len(routes) == 0 {
		return nil
	}
	h.readMessages()
	changes, err := h.routeChanges(unix.RTM_DELROUTE, 0, device, routes)
	var existing []tableRoute
	if err == nil {
		// Metric 0 is any metric for RTM_DELROUTE: where ours is gone it would remove another's.
		existing, err = h.routes(device)
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil
	case err != nil:
		return err
	}
	ours := map[routeKey]bool{}
	for _, r := range existing {
		ours[r.routeKey] = ours[r.routeKey] || r.ours
	}
	changes = slices.DeleteFunc(changes, func(c change) bool { return !ours[c.route] })
	_, err = h.change(changes, unix.ESRCH, unix.ENODEV)
	return err
}

// routeChanges returns an RTM_NEWROUTE with a flag (NLM_F_…), or an RTM_DELROUTE, for each route through an interface.
func (h *Host) routeChanges(kind, flag, device int, routes []InterfaceRoute) (changes []change, err error) {
	if len(routes) == 0 {
		return nil, nil
	}
	main, err := h.routeTable(device)
	if err != nil {
		return nil, err
	}
	what, flags := "add route %v to %v", unix.NLM_F_CREATE|flag
	if kind == unix.RTM_DELROUTE {
		what, flags = "remove route %v from %v", 0
	}
	for _, r := range routes {
		key := r.key(device, main)
		req, msg := nl.NewNetlinkRequest(kind, flags), nl.NewRtMsg()
		msg.Family, msg.Dst_len, msg.Table = unix.AF_INET, uint8(r.Prefix.Bits()), unix.RT_TABLE_UNSPEC
		msg.Scope, msg.Protocol = unix.RT_SCOPE_LINK, unix.RTPROT_STATIC
		if r.Gateway.IsValid() {
			msg.Scope, msg.Protocol, msg.Flags = unix.RT_SCOPE_UNIVERSE, RouteProtocolPeer, unix.RTNH_F_ONLINK
		}
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.RTA_DST, key.destination.Addr().AsSlice()))
		req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(key.table)))
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(device))))
		if r.Gateway.IsValid() {
			req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.Gateway.AsSlice()))
		}
		if r.Metric != 0 {
			req.AddData(nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(r.Metric)))
		}
		changes = append(changes, change{NetlinkRequest: req, device: device, what: what, object: r, route: key})
	}
	return changes, nil
}

// key returns the routeKey of r through an interface; main is the table if r names none.
func (r *InterfaceRoute) key(device int, main uint32) routeKey {
	return routeKey{cmp.Or(r.Table, main), device, r.Prefix.Masked(), r.Gateway, r.Metric}
}

// strayPeers returns an RTM_DELROUTE for each route with a Gateway through an interface that is not among wanted: a
// former process has left it.
func (h *Host) strayPeers(device int, wanted []InterfaceRoute) (changes []change, err error) {
	main, err := h.routeTable(device)
	if err != nil {
		return nil, err
	}
	keep := map[routeKey]bool{}
	for i := range wanted {
		keep[wanted[i].key(device, main)] = true
	}
	existing, err := h.routes(device)
	var stray []InterfaceRoute
	for _, r := range existing {
		if r.ours && r.device == device && r.gateway.IsValid() && !keep[r.routeKey] {
			stray = append(stray, InterfaceRoute{Prefix: r.destination, Gateway: r.gateway, Metric: r.metric, Table: r.table})
		}
	}
	if err != nil {
		return nil, err
	}
	changes, err = h.routeChanges(unix.RTM_DELROUTE, 0, device, stray)
	for i := range changes {
		changes[i].what = "" // no error: the route may be gone meanwhile
	}
	return changes, err
}

// routeTable returns the table of an interface's routes that name none: its VRF's, else main.
func (h *Host) routeTable(device int) (table uint32, err error) {
	l, err := h.link(device)
	if err == nil && l.master != 0 {
		l, err = h.link(l.master)
		table = l.vrfTable
	}
	if err != nil {
		return 0, lookupError(device, err)
	}
	return cmp.Or(table, unix.RT_TABLE_MAIN), nil
}

// ExistingRoutes returns those Routes of interfaces that the kernel has, as AddRoutes makes them. An
// interface that is gone has none.
func (h *Host) ExistingRoutes(interfaces []Interface) (existing map[InterfaceRoute]bool, err error) {
	h.readMessages()
	through, asked := map[routeKey]bool{}, map[routeKey]InterfaceRoute{}
	for _, i := range interfaces {
		main, err := h.routeTable(i.Index)
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, err
		}
		for _, r := range i.Routes {
			key := r.key(i.Index, main)
			through[key], asked[key] = false, r
		}
	}
	err = h.findRoutes(through)
	existing = map[InterfaceRoute]bool{}
	for key, found := range through {
		if found {
			existing[asked[key]] = true
		}
	}
	return existing, err
}

// findRoutes sets through to true for the routes that exist, by a dump of all routing tables.
func (h *Host) findRoutes(through map[routeKey]bool) error {
	if len(through) == 0 {
		return nil
	}
	routes, err := h.routes(0)
	for _, r := range routes {
		if _, wanted := through[r.routeKey]; wanted {
			through[r.routeKey] = true
		}
	}
	return err
}

// routes returns the routes through an interface; 0 is any, as is every device to a kernel before 4.20.
func (h *Host) routes(device int) (routes []tableRoute, err error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET}})
	if device != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(device))))
	}
	messages, err := h.batch.execute(req, unix.RTM_NEWROUTE)
	if err != nil {
		return nil, fmt.Errorf("list the routes: %w", err)
	}
	for _, m := range messages {
		if r, ok := parseTableRoute(m); ok {
			routes = append(routes, r)
		}
	}
	return routes, nil
}

// parseTableRoute reads an RTM_NEWROUTE that starts at its rtmsg. It is not ok for an
// exception, such as a learnt path MTU.
func parseTableRoute(b []byte) (r tableRoute, ok bool) {
	const bits, tos, table, protocol, scope, kind, flags = 1, 3, 4, 5, 6, 7, 8
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET || binary.NativeEndian.Uint32(b[flags:])&unix.RTM_F_CLONED != 0 {
		return r, false
	}
	r.table = uint32(b[table])
	var destination [4]byte
	err := eachAttr(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.RTA_DST:
			destination = address(value)
		case unix.RTA_OIF:
			r.device = int(u32(value))
		case unix.RTA_GATEWAY:
			r.gateway = netip.AddrFrom4(address(value))
		case unix.RTA_TABLE:
			r.table = u32(value)
		case unix.RTA_PRIORITY:
			r.metric = u32(value)
		}
		return nil
	})
	r.destination = netip.PrefixFrom(netip.AddrFrom4(destination), int(b[bits]))
	made := [2]byte{unix.RTPROT_STATIC, unix.RT_SCOPE_LINK}
	if r.gateway.IsValid() {
		made = [2]byte{RouteProtocolPeer, unix.RT_SCOPE_UNIVERSE}
	}
	r.ours = b[tos] == 0 && b[kind] == unix.RTN_UNICAST && made == [2]byte{b[protocol], b[scope]}
	return r, err == nil
}
