package tunnel

import (
	"ipipd/internal/netstate"
)

// Network follows the host's network and configures interfaces. *netstate.Host is the kernel's, by
// way of hostNetwork. Devices are ifindexes; its methods are safe for concurrent use.
type Network interface {
	// Follow answers q now, and calls changed, which must not block, when the answer changes.
	Follow(q netstate.Query, changed func()) Follower
	// FollowRoutes tells of the routes out of an interface: see netstate.Host.FollowRoutes.
	FollowRoutes(device int, changed func([]netstate.RouteChange)) RouteFollower
	// FollowAddresses tells of the addresses of this host: see netstate.Host.FollowAddresses.
	FollowAddresses(changed func([][4]byte)) AddressFollower
	// Recheck looks for changes of answers that no message tells of.
	Recheck()
	// EgressTaps returns the packet sockets that see what an interface sends; no message tells of them.
	EgressTaps() (netstate.Taps, error)
	// RawSockets returns the inodes of this host's raw sockets of a protocol; no message tells of them.
	RawSockets(protocol uint8) ([]uint64, error)
	// Reassembly returns this host's ReasmOKs and ReasmFails (RFC 4293).
	Reassembly() (done, failed uint64, err error)

	// Configure adds the interfaces' addresses and programs, sets them up, and adds routes into them. An error
	// about one of them is a *netstate.InterfaceError.
	Configure(interfaces []netstate.Interface) error
	// AddAddresses and AddRoutes add the addresses and routes that an interface lacks, and return those
	// that they have added. For routes the interface must be up.
	AddAddresses(device int, addresses []netstate.InterfaceAddress) (added []netstate.InterfaceAddress, err error)
	AddRoutes(device int, routes []netstate.InterfaceRoute) (added []netstate.InterfaceRoute, err error)
	// RemoveAddresses and RemoveRoutes remove what AddAddresses and AddRoutes add; one that is gone is no error.
	RemoveAddresses(device int, addresses []netstate.InterfaceAddress) error
	RemoveRoutes(device int, routes []netstate.InterfaceRoute) error
	// ExistingRoutes returns which of the interfaces' Routes the kernel has.
	ExistingRoutes(interfaces []netstate.Interface) (existing map[netstate.InterfaceRoute]bool, err error)
	// ReplaceRoutes adds routes, each in place of one with its prefix, metric and table, wherever that leads.
	ReplaceRoutes(device int, routes []netstate.InterfaceRoute) error
	// SetRPS sets rps_cpus of an interface, and fails if a mask is set already; ClearRPS undoes SetRPS.
	SetRPS(ifname, mask string) error
	ClearRPS(ifname, mask string) error
	// Remove removes interfaces together; one that is gone is no error.
	Remove(devices []int) error
	Close() error
}

// Follower is a *netstate.Follower.
type Follower interface {
	// Answer returns the present answer to the query, never nil. It does not block.
	Answer() *netstate.Answer
	// Set replaces the query, and returns the answer to the new one.
	Set(q netstate.Query) *netstate.Answer
	// Attach has the query's interface run an eBPF program on egress. From then on Answer.Attached says
	// whether it does.
	Attach(p netstate.Program) error
	// Refresh has the kernel confirm the neighbour that is the next hop (ARP).
	Refresh() error
	Close()
}

// RouteFollower is a *netstate.RouteFollower.
type RouteFollower interface{ Close() }

// AddressFollower is a *netstate.AddressFollower.
type AddressFollower interface{ Close() }

// hostNetwork is the Network of the kernel.
type hostNetwork struct{ *netstate.Host }

func (h hostNetwork) Follow(q netstate.Query, changed func()) Follower {
	return h.Host.Follow(q, changed)
}

func (h hostNetwork) FollowRoutes(device int, changed func([]netstate.RouteChange)) RouteFollower {
	return h.Host.FollowRoutes(device, changed)
}

func (h hostNetwork) FollowAddresses(changed func([][4]byte)) AddressFollower {
	return h.Host.FollowAddresses(changed)
}
