package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
)

// found is the result of a route look-up.
type found struct {
	Route // without the neighbour
	// What the kernel may change without a message about the destination:
	prefsrc [4]byte        // the FIB entry's preferred source: the route is removed with that address
	multi   bool           // route.multiHop of the FIB entry: links may revive some of its next hops
	nexthop bool           // the FIB entry's next hop is a next-hop object
	entry   InterfaceRoute // the FIB entry; its Prefix is the zero value if that is unknown
}

// lookup does `ip route get dst from src mark mark oif device`: a zero src is the route's
// preferred one, a mark of 0 is none, a device index of 0 is any.
//
// A src that is not an address of this host is looked up as if it was zero: it may be
// added later, and a raw socket may send from it even so; asked is what was looked up.
//
// It does not read the next hop's neighbour entry. links returns an interface by index.
func (r *requester) lookup(dst, src [4]byte, mark uint32, device int, links func(int) (link, error)) (f found, asked [4]byte, err error) {
	answer, asked, err := r.packetRoute(dst, src, mark, device)
	if err != nil {
		return found{}, asked, noRoute(dst, device, err)
	}
	f.Route = Route{Source: src, Device: answer.device, Gateway: answer.gateway, Local: answer.kind == unix.RTN_LOCAL}
	if src == [4]byte{} {
		f.Source = answer.source
	}
	l, err := links(f.Device)
	if err != nil {
		return found{}, asked, noRoute(dst, device, unix.ENODEV) // removed since
	}
	f.DeviceName = l.name
	f.MTU = min(l.mtu, 65535)
	f.VRF = l.slaveKind == "vrf"

	// The answer's MTU may be a learnt one. The configured MTU and the other next hops
	// are in the FIB entry. There is no entry where the kernel assumes the destination
	// on the link because of RTA_OIF.
	entry, err := r.getRoute(dst, asked, mark, device, unix.RTM_F_FIB_MATCH)
	if err != nil {
		entry = route{device: f.Device}
	}
	if entry.mtu > 0 {
		f.MTU = min(f.MTU, entry.mtu)
	}
	if answer.mtu > 0 && answer.mtu < f.MTU {
		f.PathMTU = answer.mtu
	}
	f.prefsrc, f.multi, f.nexthop, f.entry = entry.source, entry.multiHop, entry.nexthop, entry.entry

	const arp = unix.IFF_LOOPBACK | unix.IFF_NOARP | unix.IFF_POINTOPOINT // none may be set
	f.Ethernet = !f.Local && !answer.multiHop && !entry.multiHop && entry.device == f.Device &&
		l.kind == unix.ARPHRD_ETHER && l.flags&arp == 0 && l.master == 0 && l.hasMAC
	if f.Ethernet {
		f.SourceMAC = l.mac
	}
	return f, asked, nil
}

// packetRoute returns the route of a packet; asked is the source that was looked up, as in
// lookup. A route of another type than unicast and local is ErrNotUnicast.
func (r *requester) packetRoute(dst, src [4]byte, mark uint32, device int) (answer route, asked [4]byte, err error) {
	if !ipv4.IsUnicast(netip.AddrFrom4(dst)) {
		return route{}, src, ErrNotUnicast
	}
	asked = src
	answer, err = r.getRoute(dst, asked, mark, device, 0)
	if err != nil && src != [4]byte{} {
		// The kernel refuses a source that is not local with EINVAL, as it does a blackhole.
		if own, ownErr := r.getRoute(src, [4]byte{}, 0, 0, 0); ownErr != nil || own.kind != unix.RTN_LOCAL {
			asked = [4]byte{}
			answer, err = r.getRoute(dst, asked, mark, device, 0)
		}
	}
	if err == nil && answer.kind != unix.RTN_LOCAL && answer.kind != unix.RTN_UNICAST {
		err = ErrNotUnicast
	}
	return answer, asked, err
}

// resolve makes the kernel resolve the next hop, or confirm its entry. The kernel cannot
// know of frames sent past its IP stack: a neighbour in use needs it every few seconds, or
// its entry becomes stale and is garbage-collected. resolve does not wait; a message tells
// of the change. It must not be called for a permanent entry, whose NUD_PERMANENT NTF_USE
// would clear (since Linux 5.16).
func (r *requester) resolve(n neighbour) error {
	// NTF_USE does to an entry what sending a packet does.
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_ACK)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(n.device), Flags: unix.NTF_USE})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, n.address[:]))
	if _, err := r.execute(req, unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("resolve the next hop %v: %w", netip.AddrFrom4(n.address), permission(err))
	}
	return nil
}

// noRoute returns the error for a failed look-up of dst: a *NoRouteError with its remedy, or another.
func noRoute(dst [4]byte, device int, err error) error {
	e := &NoRouteError{Destination: netip.AddrFrom4(dst), Err: err}
	add := fmt.Sprintf("ip route add %v via GATEWAY", e.Destination)
	e.Remedy = fmt.Sprintf("ip route get %v shows it: remove it, or set --underlay-device", e.Destination)
	switch {
	case errors.Is(err, unix.ENETUNREACH) && device != 0:
		e.Cause, e.Remedy = "the underlay device is down, or has no route to it", "ip link set IF up, or "+add+" dev IF"
	case errors.Is(err, unix.ENETUNREACH):
		e.Remedy = add + ", or set --underlay-device"
	case errors.Is(err, unix.EHOSTUNREACH):
		e.Cause = "its route is of the type unreachable"
	case errors.Is(err, unix.EACCES):
		e.Cause = "its route is of the type prohibit"
	case errors.Is(err, unix.EINVAL):
		e.Cause = "its route is of the type blackhole"
	case errors.Is(err, unix.EAGAIN):
		e.Cause = "its route is of the type throw"
	case errors.Is(err, unix.ENODEV):
		e.Cause, e.Remedy = "the underlay device is gone", "create it, or set another --underlay-device"
	case errors.Is(err, ErrNotUnicast):
		e.Cause, e.Remedy = "it is a broadcast or multicast address", "a tunnel needs the address of one host"
	default:
		return fmt.Errorf("look up the route to %v: %w", e.Destination, permission(err))
	}
	return e
}

// route is what is read of an RTM_NEWROUTE.
type route struct {
	kind            uint8 // RTN_UNICAST, …
	source, gateway [4]byte
	device          int  // 0 if there is no single one
	mtu             int  // RTAX_MTU; 0 if unset
	multiHop        bool // several next hops, an IPv6 one, or an encapsulation
	nexthop         bool // it has a next-hop object (RTA_NH_ID)
	entry           InterfaceRoute
}

const rtaNexthopID = 30 // RTA_NH_ID of linux/rtnetlink.h

// getRoute sends an RTM_GETROUTE. With RTM_F_FIB_MATCH in flags the answer is the FIB entry,
// with its configured metrics and all of its next hops; without, the route of a packet.
func (r *requester) getRoute(dst, src [4]byte, mark uint32, device int, flags uint32) (route, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Dst_len: 32, Flags: unix.RTM_F_LOOKUP_TABLE | flags}}
	if src != [4]byte{} {
		msg.Src_len = 32
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_DST, dst[:]))
	if src != [4]byte{} {
		req.AddData(nl.NewRtAttr(unix.RTA_SRC, src[:]))
	}
	if mark != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_MARK, nl.Uint32Attr(mark)))
	}
	if device != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(device))))
	}
	answers, err := r.execute(req, unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return route{}, err
	}
	if len(answers) != 1 {
		return route{}, errNotARoute
	}
	return parseRoute(answers[0])
}

var errNotARoute = errors.New("the kernel's answer is not a route")

// parseRoute reads an RTM_NEWROUTE that starts at its rtmsg.
func parseRoute(b []byte) (route, error) {
	if len(b) < unix.SizeofRtMsg {
		return route{}, errNotARoute
	}
	r := route{kind: b[7]} // rtm_type
	r.entry.Table = uint32(b[4])
	var destination [4]byte
	err := eachAttr(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) (err error) {
		switch kind {
		case unix.RTA_DST:
			destination = address(value)
		case unix.RTA_TABLE:
			r.entry.Table = u32(value)
		case unix.RTA_PRIORITY:
			r.entry.Metric = u32(value)
		case unix.RTA_PREFSRC:
			r.source = address(value)
		case unix.RTA_GATEWAY:
			r.gateway = address(value)
		case unix.RTA_OIF:
			r.device = int(u32(value))
		case unix.RTA_METRICS:
			r.mtu, err = metric(value, unix.RTAX_MTU)
		case rtaNexthopID:
			r.nexthop = true
		case unix.RTA_MULTIPATH, unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_NEWDST:
			r.multiHop = true
		}
		return err
	})
	if err != nil {
		return route{}, err
	}
	r.entry.Prefix = netip.PrefixFrom(netip.AddrFrom4(destination), int(b[1])) // rtm_dst_len
	return r, nil
}

func address(b []byte) (a [4]byte) {
	copy(a[:], b)
	return a
}

// metric reads one of a route's metrics; 0 if it is unset.
func metric(b []byte, which uint16) (value int, err error) {
	err = eachAttr(b, func(kind uint16, v []byte) error {
		if kind == which {
			value = int(u32(v))
		}
		return nil
	})
	return value, err
}

// nudValid is NUD_VALID without NUD_NOARP: the states in which the kernel sends to a
// neighbour.
const nudValid = netlink.NUD_PERMANENT | netlink.NUD_REACHABLE | netlink.NUD_PROBE | netlink.NUD_STALE | netlink.NUD_DELAY

// neighbour identifies a neighbour entry.
type neighbour struct {
	device  int
	address [4]byte
}

// neighbourState is what is read of a neighbour entry.
type neighbourState struct {
	mac      [6]byte
	resolved bool // valid, and with an Ethernet address
	static   bool // permanent
}

// getNeighbour sends an RTM_GETNEIGH for one entry. Kernels before 5.0 lack that: there an
// entry counts as unresolved until a message tells of it.
func (r *requester) getNeighbour(n neighbour) neighbourState {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(n.device)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, n.address[:]))
	answers, err := r.execute(req, unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil || len(answers) != 1 {
		return neighbourState{}
	}
	_, s := parseNeighbour(answers[0])
	return s
}

// parseNeighbour reads an RTM_NEWNEIGH that starts at its ndmsg. A zero neighbour means that
// the entry is not an IPv4 neighbour.
func parseNeighbour(b []byte) (n neighbour, s neighbourState) {
	if len(b) < unix.SizeofNdMsg {
		return n, s
	}
	const family, device, state, flags = 0, 4, 8, 10
	if b[family] != unix.AF_INET || b[flags]&unix.NTF_PROXY != 0 {
		return n, s
	}
	n.device = int(binary.NativeEndian.Uint32(b[device:]))
	nud := int(binary.NativeEndian.Uint16(b[state:]))
	err := eachAttr(b[unix.SizeofNdMsg:], func(kind uint16, value []byte) error {
		switch {
		case kind == netlink.NDA_DST:
			n.address = address(value)
		case kind == netlink.NDA_LLADDR && len(value) == len(s.mac) && nud&nudValid != 0:
			s = neighbourState{mac: [6]byte(value), resolved: true, static: nud&netlink.NUD_PERMANENT != 0}
		}
		return nil
	})
	if err != nil {
		return neighbour{}, neighbourState{}
	}
	return n, s
}

// isLocal reports whether this host may send from an IPv4 address: an interface of any VRF
// has it, or there is a route of the type local to it (AnyIP).
func (r *requester) isLocal(address [4]byte) (bool, error) {
	// The kernel refuses to look up a route from an address that is not local. The
	// destination needs the loopback interface only.
	if _, err := r.getRoute([4]byte{127, 0, 0, 1}, address, 0, 0, 0); err == nil && address != [4]byte{} {
		return true, nil
	}
	answer, _, err := r.packetRoute(address, [4]byte{}, 0, 0)
	if err != nil {
		if err = noRoute(address, 0, err); errors.As(err, new(*NoRouteError)) {
			return false, nil
		}
		return false, err
	}
	return answer.kind == unix.RTN_LOCAL, nil
}

// MinPMTU is net.ipv4.route.min_pmtu of the calling thread's network namespace, in
// bytes: the least path MTU that the kernel takes from an ICMP error. 0 if unreadable.
func MinPMTU() int {
	b, err := os.ReadFile("/proc/sys/net/ipv4/route/min_pmtu")
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}
