package tunnel

import (
	"context"
	"net/netip"
	"slices"

	"ipipd/internal/netstate"
)

// Network looks up the underlay's routes and configures the tunnel's interface. Package netstate
// implements it for the kernel. Devices are ifindexes; its methods are safe for concurrent use.
type Network interface {
	// Lookup returns the route to dst, from src (zero: any), with that fwmark, by that device
	// (0: any).
	Lookup(dst, src [4]byte, mark uint32, device int) (netstate.Route, error)
	// Resolve has the kernel resolve the next hop of a route to dst (ARP).
	Resolve(r netstate.Route, dst [4]byte) error
	// SafeToBypass returns "" if outer packets may bypass the IP stack on that device: no
	// netfilter rule or XFRM policy applies. Otherwise it returns what does.
	SafeToBypass(device int, local, remote [4]byte) (reason string)
	// IngressFilters returns "" if nothing handles the device's received packets before the IP
	// stack (XDP, tc). Otherwise it returns what does.
	IngressFilters(device int) (reason string)
	// EgressHooks returns "" if nothing handles or captures the packets that the interface
	// sends. Otherwise it returns what does.
	EgressHooks(device int) (reason string)
	// EgressTaps does the same for the hooks of whose changes Watch is not notified.
	EgressTaps(device int) (reason string)
	// Watch calls changed after results of the methods above may have changed, until ctx is
	// done. wentDown are the interfaces that were down in the meantime.
	Watch(ctx context.Context, changed func(wentDown map[int]bool)) error
	// DeviceIndex returns an interface's ifindex.
	DeviceIndex(ifname string) (int, error)
	// AddressIsLocal reports whether the address is assigned to this host.
	AddressIsLocal(address netip.Addr) (bool, error)
	// Configure adds an interface's addresses, sets it up, and adds routes into it.
	Configure(device int, addresses, routes []netip.Prefix) error
	// AddAddresses and AddRoutes add the prefixes that an interface lacks, and return those.
	// The interface must be up.
	AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error)
	AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error)
	// SetRPS sets rps_cpus of an interface, unless it is already set.
	SetRPS(ifname, mask string) error
	// Reassembly returns this host's ReasmOKs and ReasmFails (RFC 4293).
	Reassembly() (done, failed uint64, err error)
}

// kernelNetwork is the kernel's Network.
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
