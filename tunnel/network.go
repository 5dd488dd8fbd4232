package tunnel

import (
	"context"
	"net/netip"

	"ipipd/internal/rtnl"
)

// Network is what a tunnel asks of its host's network: the underlay, and the
// interface that it makes. Package rtnl is the real one.
type Network interface {
	// Lookup tells how dst is reached from src (zero: any), with that mark, by
	// that device (0: any).
	Lookup(dst, src [4]byte, mark uint32, device int) (rtnl.Route, error)
	// Resolve keeps the next hop of a route in the neighbour table.
	Resolve(r rtnl.Route, dst [4]byte) error
	// SafeToBypass is "" if nothing but the route decides about outer packets
	// that pass that device: no netfilter rule, no IPsec policy. Else it says
	// what does.
	SafeToBypass(device int, local, remote [4]byte) (reason string)
	// IngressFilters is "" if nothing looks at what that device receives before
	// the IP stack does. Else it says what does.
	IngressFilters(device int) (reason string)
	// EgressHooks is "" if nothing but routes decides about what that interface
	// sends, and nobody asked to see it. Else it says what does, or who.
	EgressHooks(device int) (reason string)
	// EgressTaps is the same of what changes without Follow being told.
	EgressTaps(device int) (reason string)
	// Follow calls changed after the answers may have changed, until ctx ends.
	Follow(ctx context.Context, changed func()) error
	// DeviceIndex is the index of an interface.
	DeviceIndex(ifname string) (int, error)
	// AddressIsLocal reports whether an interface of this host has the address.
	AddressIsLocal(address netip.Addr) (bool, error)
	// Configure gives an interface its addresses, sets it up, and routes into it.
	Configure(ifname string, addresses, routes []netip.Prefix) error
	// SetRPS sets rps_cpus of an interface, unless somebody has.
	SetRPS(ifname, mask string) error
	// LinkState reports whether an interface is up, and whether it has a carrier.
	LinkState(ifname string) (up, carrier bool, err error)
	// Reassembly counts the packets that this host has put together from
	// fragments, and those that it could not.
	Reassembly() (done, failed uint64, err error)
}

// kernelNetwork asks the kernel.
type kernelNetwork struct{}

func (kernelNetwork) Lookup(dst, src [4]byte, mark uint32, device int) (rtnl.Route, error) {
	return rtnl.Lookup(dst, src, mark, device)
}

func (kernelNetwork) Resolve(r rtnl.Route, dst [4]byte) error { return rtnl.Resolve(r, dst) }

func (kernelNetwork) SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return rtnl.SafeToBypass(device, local, remote)
}

func (kernelNetwork) IngressFilters(device int) (reason string) { return rtnl.IngressFilters(device) }

func (kernelNetwork) EgressHooks(device int) (reason string) { return rtnl.EgressHooks(device) }

func (kernelNetwork) EgressTaps(device int) (reason string) { return rtnl.EgressTaps(device) }

func (kernelNetwork) Follow(ctx context.Context, changed func()) error {
	return rtnl.Follow(ctx, changed)
}

func (kernelNetwork) DeviceIndex(ifname string) (int, error) { return rtnl.DeviceIndex(ifname) }

func (kernelNetwork) AddressIsLocal(address netip.Addr) (bool, error) {
	return rtnl.AddressIsLocal(address)
}

func (kernelNetwork) Configure(ifname string, addresses, routes []netip.Prefix) error {
	for _, a := range addresses {
		if err := rtnl.AddAddress(ifname, a); err != nil {
			return err
		}
	}
	if err := rtnl.SetUp(ifname); err != nil {
		return err
	}
	for _, r := range routes {
		if err := rtnl.AddRoute(ifname, r); err != nil {
			return err
		}
	}
	return nil
}

func (kernelNetwork) SetRPS(ifname, mask string) error { return rtnl.SetRPS(ifname, mask) }

func (kernelNetwork) LinkState(ifname string) (up, carrier bool, err error) {
	return rtnl.LinkState(ifname)
}

func (kernelNetwork) Reassembly() (done, failed uint64, err error) { return rtnl.Reassembly() }
