package netstate

import (
	"encoding/binary"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// eventGroup is a netlink family and the multicast groups of it that the Host joins.
type eventGroup struct {
	protocol int
	groups   []uint
	optional bool // absent from some kernels
}

// From linux/xfrm.h.
const (
	xfrmGroupExpire = 2 // XFRMNLGRP_EXPIRE: SAs and policies
	xfrmGroupPolicy = 4 // XFRMNLGRP_POLICY
)

// eventGroups are the groups that tell of changes of what an Answer depends on; none tells of legacy iptables.
var eventGroups = [...]eventGroup{
	{protocol: unix.NETLINK_ROUTE, groups: []uint{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_TC,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_NEXTHOP,
	}},
	{protocol: unix.NETLINK_NETFILTER, groups: []uint{unix.NFNLGRP_NFTABLES}, optional: true},
	{protocol: unix.NETLINK_XFRM, groups: []uint{xfrmGroupExpire, xfrmGroupPolicy}, optional: true},
}

// receiveBuffer is the size of an event socket's buffer, in bytes: some thousands of
// messages.
const receiveBuffer = 4 << 20

// subscribe opens a socket in the groups, in the network namespace of the calling thread.
func (g *eventGroup) subscribe() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, g.protocol)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		// Without CAP_NET_ADMIN in the initial user namespace. It is limited by rmem_max.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	var mask uint32
	for _, group := range g.groups {
		mask |= 1 << (group - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: mask}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// readAtOnce limits the messages that readLocked takes from a socket, so that others get mu.
const readAtOnce = 4096

// readLocked handles the messages that have come. All handlers run with mu held.
func (h *Host) readLocked() error {
	h.behind = false
	for i, fd := range h.events {
		for count := 0; fd >= 0 && count < readAtOnce; count++ {
			n, err := unix.Read(fd, h.buffer)
			switch err {
			case nil:
			case unix.EINTR:
				continue
			case unix.ENOBUFS: // the kernel dropped messages since the last read
				h.lost = true
				continue
			case unix.EAGAIN:
				fd = -1
				continue
			default:
				return os.NewSyscallError("read", err)
			}
			h.seen++
			if eachMessage(h.buffer[:n], func(m message) { h.handle(eventGroups[i].protocol, m) }) != nil {
				h.lost = true
			}
		}
		h.behind = h.behind || fd >= 0
	}
	h.mirrors.replaying = h.mirrors.replaying && h.behind
	return nil
}

func (h *Host) handle(protocol int, m message) {
	switch protocol {
	case unix.NETLINK_ROUTE:
		h.routeMessage(m)
	case unix.NETLINK_NETFILTER:
		h.nftMessage(m)
	case unix.NETLINK_XFRM:
		if m.kind != nl.XFRM_MSG_EXPIRE { // which tells of SAs, not of policies
			h.stale |= partXfrm
		}
	}
}

// nftMessage handles a message of nf_tables. The most frequent ones, of the elements of
// sets, do not change what a chain is; NEWGEN ends each transaction.
func (h *Host) nftMessage(m message) {
	switch m.kind & 0xff {
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWOBJ, unix.NFT_MSG_DELOBJ, unix.NFT_MSG_NEWGEN:
	default:
		h.stale |= partNftables
	}
}

// routeMessage handles a message of rtnetlink.
func (h *Host) routeMessage(m message) {
	switch m.kind {
	case unix.RTM_NEWLINK:
		if l, ok := parseLink(m.body); ok {
			h.linkChanged(l.index, l)
		}
	case unix.RTM_DELLINK:
		if l, ok := parseLink(m.body); ok {
			h.linkChanged(l.index, link{})
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		h.addressMessage(m.body)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		h.routeChanged(m.body)
		h.mirrorMessageLocked(m)
	case unix.RTM_NEWNEIGH:
		n, s := parseNeighbour(m.body)
		h.neighbourChanged(n, s)
	case unix.RTM_DELNEIGH:
		n, _ := parseNeighbour(m.body)
		h.neighbourChanged(n, neighbourState{})
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		h.stale |= partRules
		for f := range h.followers {
			h.markLocked(f, dirtyRoute)
		}
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		// Routes by a next-hop object change or go with it, without a message about them.
		h.markAllLocked(key{kind: byNexthop}, dirtyRoute)
		h.nexthopMessage(m)
	case unix.RTM_NEWQDISC, unix.RTM_DELQDISC:
		h.qdiscMessage(m)
	case unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		h.filterMessage(m.body)
	}
}

// setLink stores a link and its names.
func (h *Host) setLink(l link) {
	h.links[l.index] = l
	for _, name := range l.names() {
		h.named[name] = l.index
	}
}

// linkChanged stores a link, or removes it if now is zero.
//
// When a link changes the kernel may remove, revive or ignore routes without a message about
// them. So a change of a link that was or is up concerns every follower, unless it is a tunnel's
// interface; a link that is down has no routes.
func (h *Host) linkChanged(device int, now link) {
	before := h.links[device]
	if before.flags != now.flags || before.master != now.master || h.mirrors.replaying { // h.links may be newer than the message
		h.markMirrorsLocked(device, [4]byte{})
	}
	if before.index != now.index || before.slaveKind != now.slaveKind || before.vrfTable != now.vrfTable {
		h.markAddressesLocked()
	}
	if now == before {
		return
	}
	for _, name := range before.names() {
		if h.named[name] == device {
			delete(h.named, name)
		}
	}
	gone := now.index == 0
	if gone {
		delete(h.links, device)
		delete(h.qdiscs, device)
		h.filtersChanged(device)
	} else {
		h.setLink(now)
	}
	only := before
	if only.promiscuous = now.promiscuous; only == now {
		h.markAllLocked(key{kind: byInterface, n: device}, dirtyMemory)
		return
	}

	if before.index == 0 && now.kind == unix.ARPHRD_NONE {
		// A TUN that was moved to another namespace may come back, with another index.
		for f := range h.index.sets[key{kind: byAbsence}] {
			f.changes++
			h.markLocked(f, dirtyMemory)
		}
	}
	for f := range h.index.sets[key{kind: byInterface, n: device}] {
		f.changes++
		if !now.up() {
			f.downs++
		}
		h.markLocked(f, dirtyMemory)
	}
	if before.name != now.name || before.altNames != now.altNames {
		for _, name := range append(before.names(), now.names()...) {
			h.markAllLocked(key{kind: byName, name: name}, dirtyRoute)
		}
	}
	h.markAllLocked(key{kind: byDevice, n: device}, dirtyRoute)
	if before.up() || now.up() {
		if h.tunnelInterfaces[device] {
			h.markAllLocked(key{kind: byAnyLink}, dirtyRoute)
		} else {
			for f := range h.followers {
				h.markLocked(f, dirtyRoute)
			}
		}
	}
	if gone {
		delete(h.tunnelInterfaces, device)
	}
}

// addressMessage handles a change of an address. The kernel removes without a message the
// routes that prefer a source that is gone, and all of an interface's with its last
// address.
func (h *Host) addressMessage(b []byte) {
	a, ok := parseAddress(b)
	if !ok {
		return
	}
	h.markRangeLocked(a.local, 32)
	h.markRangeLocked(a.prefix, a.bits)
	h.markAllLocked(key{kind: byDevice, n: a.device}, dirtyRoute)
	h.interfaceChanged(a.device)
	h.markMirrorsLocked(a.device, a.local)
	h.markAddressesLocked()
}

// interfaceAddress is what is read of an RTM_NEWADDR. prefix is IFA_ADDRESS, the peer's address on a point-to-point link.
type interfaceAddress struct {
	device, bits  int
	local, prefix [4]byte
}

// parseAddress reads an RTM_NEWADDR or RTM_DELADDR that starts at its ifaddrmsg. ok is false
// unless it is IPv4.
func parseAddress(b []byte) (a interfaceAddress, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg || b[0] != unix.AF_INET {
		return a, false
	}
	const bits, index = 1, 4
	a.device, a.bits = int(binary.NativeEndian.Uint32(b[index:])), int(b[bits])
	err := eachAttr(b[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFA_LOCAL:
			a.local = address(value)
		case unix.IFA_ADDRESS:
			a.prefix = address(value)
		}
		return nil
	})
	return a, err == nil
}

// interfaceChanged counts a change of the addresses of an interface, or of the routes out
// of it.
func (h *Host) interfaceChanged(device int) {
	for f := range h.index.sets[key{kind: byInterface, n: device}] {
		f.changes++
		h.markLocked(f, dirtyMemory)
	}
}

// routeChanged handles a message about a route. It concerns every address that the prefix
// covers, even if there is a longer prefix: that may be in another table.
func (h *Host) routeChanged(b []byte) {
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET {
		return
	}
	bits := int(b[1])
	var destination [4]byte
	device := 0
	if eachAttr(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.RTA_DST:
			destination = address(value)
		case unix.RTA_OIF:
			device = int(u32(value))
		}
		return nil
	}) != nil {
		return
	}
	h.markRangeLocked(destination, bits)
	h.interfaceChanged(device)
	for f := range h.index.sets[key{kind: byPrefix, n: bits, address: destination}] {
		if f.query.Interface != device {
			f.changes++
			h.markLocked(f, dirtyMemory)
		}
	}
}

func (h *Host) neighbourChanged(n neighbour, s neighbourState) {
	e := h.neighbours[n]
	if e == nil || e.known && e.neighbourState == s {
		return
	}
	what := dirtyMemory
	if e.resolved && !s.resolved {
		// No message tells of a redirect (ICMP), or of its end: there may be another next hop.
		what = dirtyRoute
	}
	e.neighbourState, e.known = s, true
	h.markAllLocked(key{kind: byNeighbour, n: n.device, address: n.address}, what)
}

func (h *Host) qdiscMessage(m message) {
	q, err := parseQdisc(m.body)
	if err != nil || !q.configured() {
		return
	}
	rest := h.qdiscs[q.device]
	if m.kind == unix.RTM_DELQDISC {
		rest = withoutQdisc(rest, q)
	} else {
		rest = append(rest[:0:0], rest...)
		for i := range rest {
			if rest[i].handle == q.handle {
				rest[i], q.handle = q, 0
			}
		}
		if q.configured() {
			rest = append(rest, q)
		}
	}
	if len(rest) > 0 {
		h.qdiscs[q.device] = rest
	} else {
		delete(h.qdiscs, q.device)
	}
	h.filtersChanged(q.device)
}

func (h *Host) filterMessage(b []byte) {
	if len(b) < nl.SizeofTcMsg {
		return
	}
	device := nl.DeserializeTcMsg(b).Ifindex
	if uint32(device) != blockMagic {
		h.filtersChanged(int(device))
		return
	}
	for k := range h.filters {
		h.filtersChanged(k.device)
	}
}

// blockMagic is TCM_IFINDEX_MAGIC_BLOCK: the filter is in a block that interfaces share.
const blockMagic = 0xffffffff

// filtersChanged forgets the tc filters of an interface, and marks the followers that depend
// on them or on its qdiscs.
func (h *Host) filtersChanged(device int) {
	delete(h.filters, filterKey{device, netlink.HANDLE_MIN_INGRESS})
	delete(h.filters, filterKey{device, netlink.HANDLE_MIN_EGRESS})
	h.markAllLocked(key{kind: byDevice, n: device}, dirtyMemory)
	h.markAllLocked(key{kind: byInterface, n: device}, dirtyMemory)
}
