package tunnel

import (
	"net/netip"

	"ipipd/keepalive"
)

// cgn is the shared address space of carrier-grade NAT (RFC 6598).
var cgn = netip.MustParsePrefix("100.64.0.0/10")

// IsPublic reports whether an address is globally routable: not of RFC 1918 or RFC 6598, and
// neither link-local nor loopback.
func IsPublic(a netip.Addr) bool {
	return !a.IsPrivate() && !cgn.Contains(a) && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// KernelIPIP is what `up` and doctor say alike.
const KernelIPIP = "the kernel's ipip module is loaded and handles protocol 4 as well: it may answer the peer with ICMP errors"

// ReflectsBehindNAT reports whether the local address is private and the remote is not, which means a NAT,
// and c has reflect probes. It translates the outer header only: the inner destination of a reflect probe
// stays the private address, to which the peer has no route.
func ReflectsBehindNAT(c *Config, local, remote netip.Addr) bool {
	return c.keepalive().Interval != 0 && c.KeepaliveProbe == keepalive.FormReflect && !IsPublic(local) && IsPublic(remote)
}
