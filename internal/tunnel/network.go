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
	// EgressTaps are the packet sockets that see what an interface sends; no message tells of them.
	EgressTaps() (netstate.Taps, error)
	// RawSockets are the inodes of this host's raw sockets of a protocol; no message tells of them.
	RawSockets(protocol uint8) ([]uint64, error)
	// Reassembly returns this host's ReasmOKs and ReasmFails (RFC 4293).
	Reassembly() (done, failed uint64, err error)

	// Configure adds the interfaces' addresses and programs, sets them up, and adds routes into them. An error
	// about one of them is a *netstate.InterfaceError.
	Configure(interfaces []netstate.Interface) error
	// AddAddresses and AddRoutes add what an interface lacks of them, and return that. The
	// interface must be up.
	AddAddresses(device int, addresses []netstate.InterfaceAddress) (added []netstate.InterfaceAddress, err error)
	AddRoutes(device int, routes []netstate.InterfaceRoute) (added []netstate.InterfaceRoute, err error)
	// RemoveAddresses and RemoveRoutes remove what the others add. What is gone is no error.
	RemoveAddresses(device int, addresses []netstate.InterfaceAddress) error
	RemoveRoutes(device int, routes []netstate.InterfaceRoute) error
	// ExistingRoutes are those of the interfaces' routes that there are.
	ExistingRoutes(interfaces []netstate.Interface) (existing map[netstate.InterfaceRoute]bool, err error)
	// ReplaceRoutes adds routes, each in place of the one of that prefix, metric and table, wherever it leads.
	ReplaceRoutes(device int, routes []netstate.InterfaceRoute) error
	// SetRPS sets rps_cpus of an interface, unless it is already set; ClearRPS takes it back.
	SetRPS(ifname, mask string) error
	ClearRPS(ifname, mask string) error
	// Remove removes interfaces together, those that are gone already aside.
	Remove(devices []int) error
	Close() error
}

// Follower is a *netstate.Follower.
type Follower interface {
	// Answer is the present one, never nil. It does not block.
	Answer() *netstate.Answer
	// Set replaces the query, and answers it.
	Set(q netstate.Query) *netstate.Answer
	// Attach has the query's interface run an eBPF program on egress, and Answer.Attached say whether it
	// does.
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
