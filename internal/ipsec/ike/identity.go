package ike

import (
	"bytes"
	"fmt"
	"net/netip"
	"strconv"
)

// Identity types (RFC 2407 section 4.6.2.1, RFC 7296 section 3.5).
const (
	idIPv4       = 1
	idFQDN       = 2
	idUserFQDN   = 3 // RFC 822 address
	idIPv4Subnet = 4
	idKeyID      = 11 // opaque bytes
)

// Identity pins the first identity that a peer authenticated with (trust on first use).
// Consecutive Peers of the same tunnel share one; only one Peer at a time may use it. The zero
// value pins nothing yet.
type Identity struct {
	id []byte // the type octet, then the identification data
}

// ourID returns the body of our ID payload for both versions: ID_IPV4_ADDR and, in IKEv1, any
// protocol and port.
func (p *Peer) ourID() []byte {
	ip := p.cfg.Local.As4()
	return append([]byte{idIPv4, 0, 0, 0}, ip[:]...)
}

// checkIdentity checks the body of an ID payload against the expected identity. The secret alone
// does not identify the peer: several hosts may share it, and an attacker on the path can relay
// our messages to another of them, or to another tunnel of ours. Call it after authentication
// only, since it pins the first identity.
//
// Without Config.RemoteID the identity must be the peer's outer address. Behind a NAT it often is
// not, and the first one is pinned. n is the result of NAT discovery, which an attacker on the
// path can forge.
func (p *Peer) checkIdentity(body []byte, n nat) (Problem, bool) {
	local, remote := p.cfg.Local.As4(), p.cfg.Remote.As4()
	id := append([]byte{body[0]}, body[4:]...)
	wrong := Problem{Kind: WrongIdentity, Phase: 1, Theirs: formatIdentity(id)}
	switch known := p.cfg.Remembered; {
	case bytes.Equal(id, append([]byte{idIPv4}, local[:]...)):
		wrong.Detail = ", which is our own address"
	case p.cfg.RemoteID != "":
		if p.isRemoteID(id) {
			return Problem{}, true
		}
		wrong.Detail = ", and ipsec-remote-id is " + p.cfg.RemoteID
	case bytes.Equal(id, append([]byte{idIPv4}, remote[:]...)),
		n.remote && known.id == nil,
		n.remote && bytes.Equal(id, known.id):
		if known.id == nil {
			known.id = id
		}
		return Problem{}, true
	case n.remote:
		wrong.Detail = ", and was " + formatIdentity(known.id) + " before: if it is the same host, give it one identity and set ipsec-remote-id to that"
	default:
		wrong.Detail = ", and its address is " + p.cfg.Remote.String() + ", with no NAT in front of it: if it is the right host, set ipsec-remote-id to what it says"
	}
	return wrong, false
}

// isRemoteID reports whether id is Config.RemoteID: that address, or the same text in any of the
// text types.
func (p *Peer) isRemoteID(id []byte) bool {
	if a, err := netip.ParseAddr(p.cfg.RemoteID); err == nil && a.Is4() {
		ip := a.As4()
		return bytes.Equal(id, append([]byte{idIPv4}, ip[:]...))
	}
	switch id[0] {
	case idFQDN, idUserFQDN, idKeyID:
		return string(id[1:]) == p.cfg.RemoteID
	}
	return false
}

// formatIdentity formats an identity for a log line. The peer chooses its bytes, so they are
// quoted and truncated.
func formatIdentity(id []byte) string {
	const longest = 64
	data := id[1:]
	switch id[0] {
	case idIPv4:
		if a, ok := netip.AddrFromSlice(data); ok {
			return a.String()
		}
	case idFQDN, idUserFQDN, idKeyID:
		return strconv.QuoteToASCII(string(data[:min(len(data), longest)]))
	}
	return fmt.Sprintf("type %d %x", id[0], data[:min(len(data), longest)])
}
