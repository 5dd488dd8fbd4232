// Package netstate asks the kernel about the network that carries a tunnel, and sets
// up the interface of one: routes, addresses, neighbours, links, through Linux's
// rtnetlink, and what netfilter and IPsec have to say about outer packets.
//
// Every function is about the network namespace of the thread that calls it and
// keeps nothing open; Watch stays in the namespace it was started in. Only IPv4.
// The package is Linux's: elsewhere it does what Go's net package can, and the
// rest fails with ErrUnsupported.
//
// Errors are one line that says what to do about it.
package netstate

import (
	"errors"
	"fmt"
	"net/netip"
)

// ErrUnsupported is what is Linux's fails with on other systems.
var ErrUnsupported = errors.New("routes and interfaces are managed on Linux only: set up the interface by hand")

// Route is how packets to one destination leave this host. Addresses are in
// network byte order.
type Route struct {
	// Source is the address that packets leave with: the one asked for, else
	// the one the route prefers.
	Source [4]byte
	// Gateway is the next hop; zero if the destination itself is.
	Gateway [4]byte
	// Device is the index of the interface that they leave by, DeviceName its
	// name.
	Device     int
	DeviceName string
	// MTU of the first hop in bytes, as it is configured: the route's metric
	// if that is set and less than the device's, else the device's.
	MTU int
	// PathMTU in bytes is what the kernel itself has learnt of the way to this
	// destination from ICMP and not yet forgotten; 0 if it has learnt nothing.
	PathMTU int
	// Local: the destination is this host.
	Local bool
	// VRF: Device is in one.
	VRF bool
	// Ethernet: the next hop is one plain Ethernet neighbour, to which a frame
	// of our own makes the same way as a packet through the kernel's routes: no
	// second next hop, no encapsulation on the route, no VRF or bridge above
	// the device, and ARP in use.
	Ethernet bool
	// Resolved: the MAC addresses are known and the kernel holds them for good.
	// Only with Ethernet; see Resolve.
	Resolved bool
	// Static: an operator has set the next hop's MAC address for good.
	Static                    bool
	SourceMAC, DestinationMAC [6]byte
}

// NoRouteError is what Lookup fails with where packets to the destination cannot
// leave.
type NoRouteError struct {
	Destination netip.Addr
	// Why in words, and what to do about it.
	Why string
	// Err is what the kernel said.
	Err error
}

func (e *NoRouteError) Error() string {
	return fmt.Sprintf("no route to %v: %s", e.Destination, e.Why)
}

func (e *NoRouteError) Unwrap() error { return e.Err }
