package ike

// nat is what the NAT discovery of an SA of IKE has found (RFC 3947 section 3.2,
// RFC 7296 section 2.23). Which end is behind one matters: of a peer that is not,
// the identity and the selector are its outer address, whatever is in front of us.
type nat struct {
	local, remote bool // whether we are behind one, whether the peer is
	forced        bool // Config.ForceUDP
}

// udp reports whether ESP is wrapped in UDP, and IKE on port 4500.
func (n nat) udp() bool { return n.local || n.remote || n.forced }

// tracksPeerPort reports whether we go on to where fresh messages of the peer come from.
// Who is behind a NAT itself does not (RFC 7296 section 2.23).
func (n nat) tracksPeerPort() bool { return n.remote && !n.local }
