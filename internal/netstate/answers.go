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

// AnswerRoute is a route that leaves the host, by the ifindex Device. MTU is that of the first hop, and AdvMSS
// what the route says, 0 if it says nothing, in bytes.
type AnswerRoute struct {
	Device, MTU, AdvMSS int
	// Words are the route as ip route takes it, without its MSS and, if there are several, NextHops.
	Words, NextHops string
}

// MSS is what the kernel's TCP offers to the other end (ipv4_default_advmss).
func (a *AnswerRoute) MSS() int {
	if a.AdvMSS != 0 {
		return a.AdvMSS
	}
	return a.MTU - 40
}

// SetMSS is the command that has it offer that.
func (a *AnswerRoute) SetMSS(mss int) string {
	return strings.TrimSpace(fmt.Sprintf("ip route change %s advmss %d %s", a.Words, mss, a.NextHops))
}
