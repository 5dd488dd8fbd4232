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
)

// Lookup asks the kernel how packets to dst leave, as `ip route get` does: from
// src (zero: whatever the route prefers), with that mark (0: none), by the
// interface of index device (0: any).
//
// A src that is not an address of this host is looked up as if none was asked
// for: it may come later, and a raw socket may send from it even so.
//
// The neighbour of the next hop is only looked at: see Resolve.
func Lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	if a := netip.AddrFrom4(dst); a.IsMulticast() || a.IsUnspecified() || dst == broadcast {
		return Route{}, noRoute(dst, device, errNotUnicast)
	}
	asked := src
	answer, err := getRoute(dst, asked, mark, device, 0)
	if err != nil && src != [4]byte{} {
		// A foreign source is refused with an error that means something else.
		if own, ownErr := getRoute(src, [4]byte{}, 0, 0, 0); ownErr != nil || own.kind != unix.RTN_LOCAL {
			asked = [4]byte{}
			answer, err = getRoute(dst, asked, mark, device, 0)
		}
	}
	if err != nil {
		return Route{}, noRoute(dst, device, err)
	}
	r := Route{Source: src, Device: answer.device, Gateway: answer.gateway}
	if src == [4]byte{} {
		r.Source = answer.source
	}
	switch answer.kind {
	case unix.RTN_LOCAL:
		r.Local = true
	case unix.RTN_UNICAST:
	default:
		return Route{}, noRoute(dst, device, errNotUnicast)
	}

	l, err := netlink.LinkByIndex(r.Device)
	if err != nil {
		return Route{}, noRoute(dst, device, unix.ENODEV) // gone between two questions
	}
	attrs := l.Attrs()
	r.DeviceName = attrs.Name
	r.MTU = min(attrs.MTU, 65535)
	r.VRF = attrs.Slave != nil && attrs.Slave.SlaveType() == "vrf"

	// The answer's MTU may be a learnt one. What is configured stands in the
	// routing table's own entry, and so do the other next hops. There is none
	// where the kernel takes the destination to be on the link because device
	// was asked for.
	entry, err := getRoute(dst, asked, mark, device, unix.RTM_F_FIB_MATCH)
	if err != nil {
		entry = route{device: r.Device}
	}
	if entry.mtu > 0 {
		r.MTU = min(r.MTU, entry.mtu)
	}
	if answer.mtu > 0 && answer.mtu < r.MTU {
		r.PathMTU = answer.mtu
	}

	const arp = unix.IFF_LOOPBACK | unix.IFF_NOARP | unix.IFF_POINTOPOINT // none of them
	r.Ethernet = !r.Local && answer.singleHop() && entry.singleHop() && entry.device == r.Device &&
		attrs.EncapType == "ether" && attrs.RawFlags&arp == 0 && attrs.MasterIndex == 0 && len(attrs.HardwareAddr) == 6
	if r.Ethernet {
		copy(r.SourceMAC[:], attrs.HardwareAddr)
		r.DestinationMAC, r.Resolved, r.Static = getNeighbour(r.Device, r.nextHop(dst))
	}
	return r, nil
}

// nextHop is the neighbour that packets to dst are handed to.
func (r *Route) nextHop(dst [4]byte) [4]byte {
	if r.Gateway != [4]byte{} {
		return r.Gateway
	}
	return dst
}

// Resolve has the kernel find out the MAC address of the next hop to dst, or see
// whether it still holds. The kernel does that by itself for what it sends, and
// cannot know of frames sent past it: a Link in use needs Resolve every few
// seconds, or the entry grows stale, its neighbour may change unseen, and it is
// collected as garbage. Resolve does not wait; Watch tells when there is news.
// For a Route that is not Ethernet it does nothing, nor for a Static one, which the
// kernel would forget (NTF_USE takes NUD_PERMANENT off, from Linux 5.16 on).
func Resolve(r Route, dst [4]byte) error {
	if !r.Ethernet || r.Static {
		return nil
	}
	// NTF_USE is what sending a packet does to an entry, without the packet.
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_ACK)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(r.Device), Flags: unix.NTF_USE})
	hop := r.nextHop(dst)
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, hop[:]))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("resolve the next hop %v on %s: %w", netip.AddrFrom4(hop), r.DeviceName, permission(err))
	}
	return nil
}

// broadcast is the address of every host on the link, whichever that is.
var broadcast = [4]byte{255, 255, 255, 255}

// errNotUnicast is the kernel's answer for a destination that is not one host.
var errNotUnicast = errors.New("not a unicast address")

// noRoute says why there is no way to dst and what to do about it.
func noRoute(dst [4]byte, device int, err error) error {
	e := &NoRouteError{Destination: netip.AddrFrom4(dst), Err: err}
	show := fmt.Sprintf("remove it (`ip route get %v` shows it), or set --underlay-device", e.Destination)
	switch {
	case errors.Is(err, unix.ENETUNREACH) && device != 0:
		e.Why = "the underlay device is down, or has no route to it: bring it up, or add one"
	case errors.Is(err, unix.ENETUNREACH):
		e.Why = "add one, or set --underlay-device"
	case errors.Is(err, unix.EHOSTUNREACH):
		e.Why = "its route is of the type unreachable: " + show
	case errors.Is(err, unix.EACCES):
		e.Why = "its route is of the type prohibit: " + show
	case errors.Is(err, unix.EINVAL):
		e.Why = "its route is of the type blackhole: " + show
	case errors.Is(err, unix.EAGAIN):
		e.Why = "its route is of the type throw: " + show
	case errors.Is(err, unix.ENODEV):
		e.Why = "the underlay device is gone: create it, or set another --underlay-device"
	case errors.Is(err, errNotUnicast):
		e.Why = "it is a broadcast or multicast address: a tunnel needs the address of one host"
	default:
		return fmt.Errorf("look up the route to %v: %w", e.Destination, permission(err))
	}
	return e
}

// route is a route as the kernel writes it, reduced to what matters here.
type route struct {
	kind            uint8 // RTN_UNICAST, …
	source, gateway [4]byte
	device          int // 0 if there is no single one
	mtu             int // 0 if there is no such metric
	multiHop        bool
}

// singleHop says that there is one next hop, and it is an IPv4 address or none.
func (r *route) singleHop() bool { return !r.multiHop }

// getRoute is one RTM_GETROUTE. With RTM_F_FIB_MATCH in flags the answer is the
// entry of the routing table, with its metrics as they were configured and all
// of its next hops; without, it is what a packet would get.
func getRoute(dst, src [4]byte, mark uint32, device int, flags uint32) (route, error) {
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
	answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return route{}, err
	}
	if len(answers) != 1 {
		return route{}, errNotARoute
	}
	return parseRoute(answers[0])
}

var errNotARoute = errors.New("the kernel's answer is not a route")

// parseRoute reads an RTM_NEWROUTE, from its rtmsg on.
func parseRoute(b []byte) (route, error) {
	if len(b) < unix.SizeofRtMsg {
		return route{}, errNotARoute
	}
	r := route{kind: b[7]} // rtm_type
	attrs, err := attributes(b[unix.SizeofRtMsg:])
	if err != nil {
		return route{}, err
	}
	for _, a := range attrs {
		// Every value that is read has 4 bytes at least, or it is not what it says.
		var be32 int
		if len(a.Value) >= 4 {
			be32 = int(binary.NativeEndian.Uint32(a.Value))
		}
		switch a.Attr.Type & nlaTypeMask {
		case unix.RTA_PREFSRC:
			r.source = address(a.Value)
		case unix.RTA_GATEWAY:
			r.gateway = address(a.Value)
		case unix.RTA_OIF:
			r.device = be32
		case unix.RTA_METRICS:
			if r.mtu, err = metric(a.Value, unix.RTAX_MTU); err != nil {
				return route{}, err
			}
		case unix.RTA_MULTIPATH, unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_NEWDST:
			// Several next hops, an IPv6 one, or something around the packet.
			r.multiHop = true
		}
	}
	return r, nil
}

// nlaTypeMask takes the flags off the type of a netlink attribute (NLA_TYPE_MASK).
const nlaTypeMask = 0x3fff

func address(b []byte) (a [4]byte) {
	copy(a[:], b)
	return a
}

// metric reads one of the metrics of a route; 0 if it is not set.
func metric(b []byte, which uint16) (int, error) {
	metrics, err := attributes(b)
	if err != nil {
		return 0, err
	}
	for _, m := range metrics {
		if m.Attr.Type&nlaTypeMask == which && len(m.Value) >= 4 {
			return int(binary.NativeEndian.Uint32(m.Value)), nil
		}
	}
	return 0, nil
}

// nudValid are the states in which the kernel itself sends to a neighbour
// (NUD_VALID), those that are only for devices without ARP left out.
const nudValid = netlink.NUD_PERMANENT | netlink.NUD_REACHABLE | netlink.NUD_PROBE | netlink.NUD_STALE | netlink.NUD_DELAY

// getNeighbour asks for one entry of the neighbour table. Kernels before 5.0
// cannot be asked for one; for them nothing is ever resolved.
func getNeighbour(device int, hop [4]byte) (mac [6]byte, ok, static bool) {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(device)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, hop[:]))
	answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil || len(answers) != 1 {
		return mac, false, false
	}
	return parseNeighbour(answers[0])
}

// parseNeighbour reads an RTM_NEWNEIGH, from its ndmsg on.
func parseNeighbour(b []byte) (mac [6]byte, ok, static bool) {
	if len(b) < unix.SizeofNdMsg {
		return mac, false, false
	}
	state := int(binary.NativeEndian.Uint16(b[8:])) // ndm_state
	attrs, err := attributes(b[unix.SizeofNdMsg:])
	if err != nil || state&nudValid == 0 {
		return mac, false, false
	}
	for _, a := range attrs {
		if a.Attr.Type == netlink.NDA_LLADDR && len(a.Value) == len(mac) {
			copy(mac[:], a.Value)
			ok = true
		}
	}
	return mac, ok, ok && state&netlink.NUD_PERMANENT != 0
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
