package netstate

import (
	"fmt"
	"net/netip"
	"strings"
)

// AddressedInterface is an interface with its IPv4 addresses, host bits kept. ARP: it is on a link where
// hosts ask for them.
type AddressedInterface struct {
	Name      string
	Index     int
	ARP       bool
	Addresses []netip.Prefix
}

// ReplyRoute is the route that a server's answers to clients take. Device is the ifindex of its first next hop,
// MTU the route's or the device's, whichever is less, AdvMSS the route's advmss, 0 if it has none; both in bytes.
type ReplyRoute struct {
	Device, MTU, AdvMSS int
	// Words are the route in the syntax of `ip route`, without advmss; NextHops the next hops of a multipath route.
	Words, NextHops string
}

// MSS returns the MSS that the kernel's TCP advertises on the route (ipv4_default_advmss), in bytes.
func (a *ReplyRoute) MSS() int {
	if a.AdvMSS != 0 {
		return a.AdvMSS
	}
	return a.MTU - 40
}

// SetMSS returns the command that makes the kernel's TCP advertise mss, in bytes, on the route.
func (a *ReplyRoute) SetMSS(mss int) string {
	return strings.TrimSpace(fmt.Sprintf("ip route change %s advmss %d %s", a.Words, mss, a.NextHops))
}
