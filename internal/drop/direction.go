package drop

// Direction is the direction, as seen from this host, of the packets of a tunnel that a Reason counts.
type Direction string

// The empty Direction is that of ICMP messages, which are no packets of a tunnel.
const (
	Transmit Direction = "transmit" // outbound
	Receive  Direction = "receive"  // inbound
)

// Direction returns the direction of the packets that a tunnel counts under r. Packets that a
// process counts under an ESP reason were received.
func (r Reason) Direction() Direction {
	switch {
	case r == None || r >= endESP:
		return ""
	case r < endOutbound, r == ESPNoSA, r == ESPExhausted, r == ESPNoRoom:
		return Transmit
	}
	return Receive
}

// ByProcess reports whether r is about packets of which no tunnel is known: no tunnel counts it.
func (r Reason) ByProcess() bool {
	switch r {
	case ReceiveOverflow, OuterMalformed, OuterNotIPIP, OuterFragment, OuterChecksum, UnknownPeer, OuterErrorMalformed:
		return true
	}
	return false
}

// ByESP reports whether only a tunnel with a secret counts r.
func (r Reason) ByESP() bool { return r >= endInbound && r < endESP }

// ByManyRemotes reports whether only an interface with many remotes counts r.
func (r Reason) ByManyRemotes() bool {
	switch r {
	case NoRemote, RemoteNotUsable, ReversePath, NotInAcceptFrom, NotInAcceptTo:
		return true
	}
	return false
}
