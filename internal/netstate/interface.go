package netstate

import (
	"fmt"
	"net/netip"
	"strings"
)

// Interface is what Configure adds to the interface Index.
type Interface struct {
	Index     int
	AltName   string // an alternative name, added if the kernel has them (5.5); "" is none
	Addresses []InterfaceAddress
	Routes    []InterfaceRoute
	// Program is attached to the interface's egress; the zero Program is none. A failure to attach it
	// is no error: see Follower.Attach.
	Program Program
	// Adopted: a former process made the interface. Its program stays until Follower.Attach replaces it, but is
	// removed if Program is zero; its routes with a Gateway that are not among Routes are removed.
	Adopted bool
}

// InterfaceAddress is an address of an interface.
type InterfaceAddress struct {
	// Prefix is the address, host bits kept, and the length of its subnet.
	Prefix netip.Prefix
	// Peer is the other end's address if the link is point-to-point, where Prefix has 32 bits
	// (IFA_ADDRESS); the zero Addr is none.
	Peer netip.Addr
}

// String returns the address in the notation of `ip address`: 10.255.0.1/30, 10.255.0.1/32 peer 10.255.0.2/32.
func (a InterfaceAddress) String() string {
	if !a.Peer.IsValid() {
		return a.Prefix.String()
	}
	return fmt.Sprintf("%v peer %v/32", a.Prefix, a.Peer)
}

// Opposite returns the other end's address: Peer, or the other host of a /30 or /31; the zero Addr if it cannot be told.
func (a InterfaceAddress) Opposite() netip.Addr {
	if a.Peer.IsValid() {
		return a.Peer
	}
	own := a.Prefix.Addr()
	first := a.Prefix.Masked().Addr()
	switch a.Prefix.Bits() {
	case 30: // its first and its last address are no host's
		first = first.Next()
	case 31:
	default:
		return netip.Addr{}
	}
	switch own {
	case first:
		return first.Next()
	case first.Next():
		return first
	}
	return netip.Addr{}
}

// MarshalText returns the text of String.
func (a InterfaceAddress) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// RouteProtocolPeer is the protocol (rtm_protocol) of routes with a Gateway: `ip route show proto 94` shows
// them. 94 is IPIP in IANA's registry of protocol numbers, and unassigned in iproute2's rt_protos.
const RouteProtocolPeer = 94

// InterfaceRoute is a route into an interface. Two routes of one prefix differ in metric or table.
type InterfaceRoute struct {
	Prefix netip.Prefix
	// Gateway is the next hop of a route of RouteProtocolPeer (onlink), of an interface with many remotes;
	// the zero Addr is none.
	Gateway netip.Addr
	// Metric is the route's priority (RTA_PRIORITY): of a prefix's routes the one with the least is used.
	Metric uint32
	// Table is the routing table; 0 is main, or that of the interface's VRF.
	Table uint32
}

// String returns the route in the notation of `ip route`: 0.0.0.0/0 metric 200 table 100.
func (r InterfaceRoute) String() string {
	var b strings.Builder
	fmt.Fprint(&b, r.Prefix)
	if r.Gateway.IsValid() {
		fmt.Fprintf(&b, " via %v", r.Gateway)
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	return b.String()
}

// Slot returns r without its Gateway: the kernel has at most one route of a Slot.
func (r InterfaceRoute) Slot() InterfaceRoute {
	r.Gateway = netip.Addr{}
	return r
}

// MarshalText returns the text of String.
func (r InterfaceRoute) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Program is a loaded eBPF program of the type BPF_PROG_TYPE_SCHED_CLS.
type Program struct {
	FD   int
	ID   uint32 // given by the kernel
	Name string // as `tc filter show` shows it
}

// InterfaceError means that an interface could not be configured.
type InterfaceError struct {
	Index int
	Err   error
}

func (e *InterfaceError) Error() string { return e.Err.Error() }

func (e *InterfaceError) Unwrap() error { return e.Err }
