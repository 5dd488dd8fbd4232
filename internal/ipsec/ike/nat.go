package ike

// nat is the result of NAT discovery (RFC 3947 section 3.2, RFC 7296 section 2.23). The two ends
// are kept apart: a peer that is not behind a NAT must have its outer address as identity and
// selector, even if we are behind one.
type nat struct {
	local, remote bool // we are behind a NAT, the peer is
	forced        bool // Config.ForceUDP
}

// udp reports whether ESP is encapsulated in UDP, and IKE moves to port 4500.
func (n nat) udp() bool { return n.local || n.remote || n.forced }

// tracksPeerPort reports whether we follow the peer to the source of its latest message. A host
// behind a NAT must not (RFC 7296 section 2.23).
func (n nat) tracksPeerPort() bool { return n.remote && !n.local }
