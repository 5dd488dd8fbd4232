// Package netstate reads the state of the host's network (routes, addresses, neighbours,
// links, netfilter, IPsec policies, qdiscs) and configures a tunnel's interface, through
// Linux's rtnetlink.
//
// A Host answers from memory and follows changes by netlink, for any number of tunnels. A
// function works in the network namespace of the calling thread and keeps nothing open; a
// Host stays in the namespace it was opened in. Only IPv4. On other systems the package
// does what Go's net package can, and the rest fails with ErrUnsupported.
//
// Errors are one line with the remedy.
package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"ipipd/internal/warning"
)

// ErrUnsupported is the error of a function that only Linux has.
var ErrUnsupported = errors.New("routes and interfaces are managed on Linux only: set up the interface by hand")

// Route is the route to one destination. Addresses are in network byte order.
type Route struct {
	// Source is the source address of packets: the requested one, else the route's
	// preferred one.
	Source [4]byte
	// Gateway is the next hop; zero if the destination is on the link.
	Gateway [4]byte
	// Device is the index of the outgoing interface, DeviceName its name.
	Device     int
	DeviceName string
	// MTU is the configured one of the first hop, in bytes: the route's metric if it is
	// set and less than the device's MTU, else the latter.
	MTU int
	// PathMTU is the path MTU that the kernel has learnt from ICMP errors and not yet
	// expired, in bytes; 0 if none.
	PathMTU int
	// Local: the destination is an address of this host.
	Local bool
	// VRF: Device is a port of a VRF.
	VRF bool
	// Ethernet: the next hop is a single IPv4 neighbour on Ethernet, so that a frame sent
	// to its MAC address takes the path that the kernel's route would take: no multipath,
	// no encapsulation on the route, no VRF or bridge above the device, ARP in use.
	Ethernet bool
	// Resolved: the kernel has a valid neighbour entry (NUD_VALID), and SourceMAC and
	// DestinationMAC are set. Only with Ethernet; see Follower.Refresh.
	Resolved bool
	// Static: the neighbour entry is permanent (NUD_PERMANENT).
	Static                    bool
	SourceMAC, DestinationMAC [6]byte
}

// NoRouteError means that there is no usable route to the destination.
type NoRouteError struct {
	Destination netip.Addr
	// Cause says why there is no route; "" if just none matches. Remedy is what to do.
	Cause, Remedy string
	// Err is the kernel's error.
	Err error
}

func (e *NoRouteError) Error() string { return e.Fault().Error() }
func (e *NoRouteError) Unwrap() error { return e.Err }

// Fault returns the error as doctor reports it.
func (e *NoRouteError) Fault() *warning.Fault {
	f := &warning.Fault{Code: noRouteCode, What: fmt.Sprintf("no route to %v", e.Destination), Why: noRouteWhy, Do: e.Remedy}
	if e.Cause != "" {
		f.What += ": " + e.Cause
	}
	return f
}

// The code and the consequence of every fault that keeps outer packets from being routed.
const noRouteCode, noRouteWhy = "no-route", "nothing can be sent"

// ErrNotUnicast is the Err of a NoRouteError: the destination is a broadcast or multicast address, or its
// route is of another type than unicast and local.
var ErrNotUnicast = errors.New("not a unicast address")

// NoDeviceError means that there is no interface of that name.
type NoDeviceError struct{ Name string }

func (e *NoDeviceError) Error() string {
	return fmt.Sprintf("%v: %v", e.Fault(), syscall.ENODEV)
}

// Fault returns the error as doctor reports it.
func (e *NoDeviceError) Fault() *warning.Fault {
	return &warning.Fault{
		Code: noRouteCode, What: fmt.Sprintf("no interface %q", e.Name), Why: noRouteWhy,
		Do: "create it, or set another --underlay-device; ip link show has those there are",
	}
}

func (e *NoDeviceError) Unwrap() error { return syscall.ENODEV }

// Options are the options of Open.
type Options struct {
	// Failed is called at most once, from the Host's goroutine: changes are no longer seen.
	// nil ignores it.
	Failed func(error)
	// Bypass is the Answer.Bypass of every route; "" leaves it to what the host has.
	Bypass string
}

// Query describes a tunnel, for the Host's Answer. Addresses are in network byte order.
type Query struct {
	Remote [4]byte // zero: not known yet, as of a DNS name; see Answer.NetworkChanges
	Local  [4]byte // zero: the route's preferred source
	// AnyLocal: the remote's packets are received at any address of this host.
	AnyLocal bool
	Mark     uint32
	// UnderlayDevice is the name of the interface to send by, resolved again when links
	// change; "" is any.
	UnderlayDevice string
	// Interface is the ifindex of the tunnel's own TUN; 0 before it exists.
	Interface int
	// Routes are the configured routes into Interface: a route of the same prefix
	// elsewhere counts in InterfaceChanges. See also Answer.Loop.
	Routes []InterfaceRoute
}

// Answer is what the network does with a tunnel's packets now. It is immutable.
type Answer struct {
	Device int   // ifindex of UnderlayDevice; 0 if none was given
	Route  Route // as of `ip route get`; zero if Err is set
	// Err is a *NoRouteError, a *NoDeviceError (UnderlayDevice is missing), or another.
	Err error
	// Loop is the route of Query.Routes that leads outer packets back into Interface, or would once
	// it is added, as it is Route or takes precedence over it; zero is none. Only routes of Route's
	// table are compared: which table comes first is for the routing rules.
	Loop InterfaceRoute
	// HasLocal: Query.Local, or else the route's preferred source, is an address of this host,
	// whatever Err is. It is true if that is unknown: the kernel then decides for each packet.
	HasLocal bool
	// Bypass is the reason not to send outer packets, and receive the peer's, past the
	// kernel's IP stack as frames on the route's device: nftables, iptables, an IPsec policy,
	// a tc filter or a routing rule would apply to them, or Options.Bypass is set. "" is none.
	Bypass string
	// Ingress is the reason not to redirect received packets ahead of the tc filters of the
	// route's device; "" is none.
	Ingress string
	// Egress is the reason not to redirect what Interface sends ahead of its qdisc and captures;
	// "" is none.
	Egress string
	// Clsact: Interface has the queueing discipline clsact. Attached: it runs the program that
	// Follower.Attach was called with.
	Clsact, Attached bool
	// ReturnDevice is the device of the route to the remote without mark and
	// UnderlayDevice, which is where rp_filter expects its packets; 0 if there is none.
	ReturnDevice int
	// NetworkChanges grows, while Query.Remote is zero, when a link, a rule or the default route
	// has changed: a DNS name may resolve then.
	NetworkChanges uint64
	// InterfaceChanges grows when Interface was renamed, moved, set up or down, or got
	// another MTU, and with each change of its addresses and of the routes out of it.
	InterfaceChanges uint64
	// InterfaceDowns grows when Interface was seen down, even if it is up again.
	InterfaceDowns uint64
}
