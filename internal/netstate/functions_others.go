//go:build !linux

package netstate

import (
	"context"
	"net/netip"
)

// Lookup is the Answer's Route.
func Lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	return lookup(dst, src, mark, device)
}

// Resolve does nothing: a Route is never Ethernet here.
func Resolve(r Route, dst [4]byte) error { return nil }

// Watch is for Linux. Elsewhere the caller polls.
func Watch(ctx context.Context, changed func(wentDown map[int]bool)) error { return ErrUnsupported }

// SafeToBypass is for Linux.
func SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return "the system is not Linux"
}

// IngressFilters is for Linux.
func IngressFilters(device int) (reason string) { return "the system is not Linux" }

// EgressHooks is for Linux.
func EgressHooks(device int) (reason string) { return "the system is not Linux" }

// EgressTaps is for Linux.
func EgressTaps(device int) (reason string) { return "the system is not Linux" }

// AddRoutes is for Linux.
func AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return addNone(destinations)
}

// CheckRoute is for Linux.
func CheckRoute(device int, destination netip.Prefix) error { return ErrUnsupported }

// SetRPS is for Linux.
func SetRPS(ifname, mask string) error { return ErrUnsupported }

// AddressIsLocal is Answer.HasLocal.
func AddressIsLocal(address netip.Addr) (bool, error) { return isLocal(address) }

// Reassembly is for Linux.
func Reassembly() (done, failed uint64, err error) { return 0, 0, ErrUnsupported }
