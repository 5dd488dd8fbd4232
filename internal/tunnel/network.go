package tunnel

import (
	"context"
	"net/netip"
	"slices"

	"ipipd/internal/netstate"
)

// Network is what a tunnel asks of its host's network: the underlay, and the
// interface that it makes. Package rtnl is the real one.
type Network interface {
	// Lookup tells how dst is reached from src (zero: any), with that mark, by
	// that device (0: any).
	Lookup(dst, src [4]byte, mark uint32, device int) (netstate.Route, error)
	// Resolve keeps the next hop of a route in the neighbour table.
	Resolve(r netstate.Route, dst [4]byte) error
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
	// EgressTaps is the same of what changes without Watch being told.
	EgressTaps(device int) (reason string)
	// Watch calls changed after the answers may have changed, until ctx ends.
	// wentDown are the interfaces, by index, that were down meanwhile.
	Watch(ctx context.Context, changed func(wentDown map[int]bool)) error
	// DeviceIndex is the index of an interface.
	DeviceIndex(ifname string) (int, error)
	// AddressIsLocal reports whether this host may send from the address.
	AddressIsLocal(address netip.Addr) (bool, error)
	// Configure gives an interface its addresses, sets it up, and routes into it.
	Configure(device int, addresses, routes []netip.Prefix) error
	// AddAddresses and AddRoutes give an interface that is up what it lacks, and
	// return what that was.
	AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error)
	AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error)
	// SetRPS sets rps_cpus of an interface, unless somebody has.
	SetRPS(ifname, mask string) error
	// Reassembly counts the packets that this host has put together from
	// fragments, and those that it could not.
	Reassembly() (done, failed uint64, err error)
}

// kernelNetwork asks the kernel.
type kernelNetwork struct{}

func (kernelNetwork) Lookup(dst, src [4]byte, mark uint32, device int) (netstate.Route, error) {
	return netstate.Lookup(dst, src, mark, device)
}

func (kernelNetwork) Resolve(r netstate.Route, dst [4]byte) error { return netstate.Resolve(r, dst) }

func (kernelNetwork) SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return netstate.SafeToBypass(device, local, remote)
}

func (kernelNetwork) IngressFilters(device int) (reason string) {
	return netstate.IngressFilters(device)
}

func (kernelNetwork) EgressHooks(device int) (reason string) { return netstate.EgressHooks(device) }

func (kernelNetwork) EgressTaps(device int) (reason string) { return netstate.EgressTaps(device) }

func (kernelNetwork) Watch(ctx context.Context, changed func(wentDown map[int]bool)) error {
	return netstate.Watch(ctx, changed)
}

func (kernelNetwork) DeviceIndex(ifname string) (int, error) { return netstate.DeviceIndex(ifname) }

func (kernelNetwork) AddressIsLocal(address netip.Addr) (bool, error) {
	return netstate.AddressIsLocal(address)
}

func (kernelNetwork) Configure(device int, addresses, routes []netip.Prefix) error {
	if _, err := netstate.AddAddresses(device, addresses); err != nil {
		return err
	}
	if err := netstate.SetUp(device); err != nil {
		return err
	}
	added, err := netstate.AddRoutes(device, routes)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if slices.Contains(added, r) {
			continue
		}
		if err := netstate.CheckRoute(device, r); err != nil {
			return err
		}
	}
	return nil
}

func (kernelNetwork) SetRPS(ifname, mask string) error { return netstate.SetRPS(ifname, mask) }

func (kernelNetwork) AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return netstate.AddAddresses(device, addresses)
}

func (kernelNetwork) AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return netstate.AddRoutes(device, destinations)
}

func (kernelNetwork) Reassembly() (done, failed uint64, err error) { return netstate.Reassembly() }
