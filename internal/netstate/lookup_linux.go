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

// Lookup is `ip route get dst from src mark mark oif device`: a zero src is the route's
// preferred one, a mark of 0 is none, a device index of 0 is any.
//
// A src that is not an address of this host is looked up as if it was zero: it may be
// added later, and a raw socket may send from it even so.
//
// Lookup reads the next hop's neighbour entry and does not resolve it: see Resolve.
func Lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	if a := netip.AddrFrom4(dst); a.IsMulticast() || a.IsUnspecified() || dst == broadcast {
		return Route{}, noRoute(dst, device, errNotUnicast)
	}
	asked := src
	answer, err := getRoute(dst, asked, mark, device, 0)
	if err != nil && src != [4]byte{} {
		// The kernel refuses a source that is not local with EINVAL, as it does a blackhole.
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
		return Route{}, noRoute(dst, device, unix.ENODEV) // removed since getRoute
	}
	attrs := l.Attrs()
	r.DeviceName = attrs.Name
	r.MTU = min(attrs.MTU, 65535)
	r.VRF = attrs.Slave != nil && attrs.Slave.SlaveType() == "vrf"

	// The answer's MTU may be a learnt one. The configured MTU and the other next hops
	// are in the FIB entry. There is no entry where the kernel assumes the destination
	// on the link because of RTA_OIF.
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

	const arp = unix.IFF_LOOPBACK | unix.IFF_NOARP | unix.IFF_POINTOPOINT // none may be set
	r.Ethernet = !r.Local && !answer.multiHop && !entry.multiHop && entry.device == r.Device &&
		attrs.EncapType == "ether" && attrs.RawFlags&arp == 0 && attrs.MasterIndex == 0 && len(attrs.HardwareAddr) == 6
	if r.Ethernet {
		copy(r.SourceMAC[:], attrs.HardwareAddr)
		r.DestinationMAC, r.Resolved, r.Static = getNeighbour(r.Device, r.nextHop(dst))
	}
	return r, nil
}

// nextHop is the neighbour on the way to dst.
func (r *Route) nextHop(dst [4]byte) [4]byte {
	if r.Gateway != [4]byte{} {
		return r.Gateway
	}
	return dst
}

// Resolve has the kernel resolve the next hop to dst, or confirm its entry. The kernel
// cannot know of frames sent past its IP stack: a Link in use needs Resolve every few
// seconds, or the entry becomes stale and is garbage-collected. Resolve does not wait;
// Watch reports the change. It does nothing for a Route that is not Ethernet, nor for a
// Static one, whose NUD_PERMANENT NTF_USE would clear (since Linux 5.16).
func Resolve(r Route, dst [4]byte) error {
	if !r.Ethernet || r.Static {
		return nil
	}
	// NTF_USE does to an entry what sending a packet does.
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_ACK)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(r.Device), Flags: unix.NTF_USE})
	hop := r.nextHop(dst)
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, hop[:]))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("resolve the next hop %v on %s: %w", netip.AddrFrom4(hop), r.DeviceName, permission(err))
	}
	return nil
}

// broadcast is the limited broadcast address (RFC 919).
var broadcast = [4]byte{255, 255, 255, 255}

// errNotUnicast: the route to the destination is not of the type unicast or local.
var errNotUnicast = errors.New("not a unicast address")

// noRoute is the error for dst, with the remedy.
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

// route is what is read of an RTM_NEWROUTE.
type route struct {
	kind            uint8 // RTN_UNICAST, …
	source, gateway [4]byte
	device          int  // 0 if there is no single one
	mtu             int  // the metric; 0 if unset
	multiHop        bool // several next hops, an IPv6 one, or an encapsulation
}

// getRoute is one RTM_GETROUTE. With RTM_F_FIB_MATCH in flags the answer is the FIB entry,
// with its configured metrics and all of its next hops; without, the route of a packet.
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

// parseRoute reads an RTM_NEWROUTE that starts at its rtmsg.
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
		var value int
		if len(a.Value) >= 4 {
			value = int(binary.NativeEndian.Uint32(a.Value))
		}
		switch a.Attr.Type & nlaTypeMask {
		case unix.RTA_PREFSRC:
			r.source = address(a.Value)
		case unix.RTA_GATEWAY:
			r.gateway = address(a.Value)
		case unix.RTA_OIF:
			r.device = value
		case unix.RTA_METRICS:
			if r.mtu, err = metric(a.Value, unix.RTAX_MTU); err != nil {
				return route{}, err
			}
		case unix.RTA_MULTIPATH, unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_NEWDST:
			r.multiHop = true
		}
	}
	return r, nil
}

// nlaTypeMask is NLA_TYPE_MASK: the type of a netlink attribute without its flags.
const nlaTypeMask = 0x3fff

func address(b []byte) (a [4]byte) {
	copy(a[:], b)
	return a
}

// metric reads one of a route's metrics; 0 if it is unset.
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

// nudValid is NUD_VALID without NUD_NOARP: the states in which the kernel sends to a
// neighbour.
const nudValid = netlink.NUD_PERMANENT | netlink.NUD_REACHABLE | netlink.NUD_PROBE | netlink.NUD_STALE | netlink.NUD_DELAY

// getNeighbour is one RTM_GETNEIGH. Kernels before 5.0 lack it for a single entry: there
// nothing is ever resolved.
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

// parseNeighbour reads an RTM_NEWNEIGH that starts at its ndmsg.
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
