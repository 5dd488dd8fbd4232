package ipsec

import (
	"fmt"
	"net/netip"

	"ipipd/internal/warning"
)

// PortTaken returns the fault that a UDP port of IKE is in use at a local address. by is the process that has bound
// it, "" if that is not known; err may be nil.
func PortTaken(local netip.Addr, port int, by string, err error) *warning.Fault {
	f := &warning.Fault{
		Code: "udp-port-taken", What: fmt.Sprintf("UDP port %d of %v is taken", port, local), Why: "IKE needs it",
		Do: fmt.Sprintf("stop strongSwan, libreswan or racoon, or the ipipd that has it, or have it leave this address: ss -ulpn sport = :%d", port), Err: err,
	}
	if by != "" {
		f.What += " by " + by
	}
	return f
}
