package ipv4

import "net/netip"

// IsUnicast reports whether a can be the IPv4 address of one host: not 0.0.0.0, which filters of DNS
// answer, multicast (RFC 1112) or the limited broadcast (RFC 919).
func IsUnicast(a netip.Addr) bool {
	return a.Is4() && !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
