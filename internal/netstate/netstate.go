// Package netstate reads the state of the host's network (routes, addresses, neighbours,
// links, netfilter, IPsec policies, qdiscs) and configures a tunnel's interface, through
// Linux's rtnetlink.
//
// A function works in the network namespace of the calling thread and keeps nothing open;
// Watch stays in the namespace it was started in. Only IPv4. On other systems the package
// does what Go's net package can, and the rest fails with ErrUnsupported.
//
// Errors are one line with the remedy.
package netstate

import (
	"errors"
	"fmt"
	"net/netip"
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
	// DestinationMAC are set. Only with Ethernet; see Resolve.
	Resolved bool
	// Static: the neighbour entry is permanent (NUD_PERMANENT).
	Static                    bool
	SourceMAC, DestinationMAC [6]byte
}

// NoRouteError is Lookup's error where there is no usable route to the destination.
type NoRouteError struct {
	Destination netip.Addr
	// Why is the cause and its remedy.
	Why string
	// Err is the kernel's error.
	Err error
}

func (e *NoRouteError) Error() string {
	return fmt.Sprintf("no route to %v: %s", e.Destination, e.Why)
}

func (e *NoRouteError) Unwrap() error { return e.Err }
