package ike

import (
	"fmt"
	"io"
	"net/netip"
	"time"

	"ipipd/internal/ipsec/esp"
)

// Secret is a pre-shared key. No fmt verb and no encoder shows it.
type Secret []byte

// String hides the secret.
func (Secret) String() string { return "(secret)" }

// GoString hides the secret from %#v.
func (Secret) GoString() string { return "(secret)" }

// Format hides the secret from every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(secret)")) }

// MarshalText hides the secret from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte("(secret)"), nil }

// Mode is the IKE version.
type Mode uint8

// The modes, by RouterOS's names.
const (
	Main Mode = iota // IKEv1 main mode
	IKE2             // IKEv2
	Auto             // initiator: IKEv2, then IKEv1 main mode; responder: either
)

// ParseMode parses main, ike2 or auto.
func ParseMode(s string) (Mode, error) {
	for m := Main; m <= Auto; m++ {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("%q is not accepted: want main, ike2 or auto", s)
}

// String returns the mode's name.
func (m Mode) String() string { return [...]string{"main", "ike2", "auto"}[m] }

// Config configures a Peer.
type Config struct {
	// Local and Remote are the outer addresses of the tunnel, both IPv4.
	Local, Remote netip.Addr
	Secret        Secret
	Mode          Mode
	// Phase1 and Phase2 are offered in this order, and nothing else is accepted; nil stands for
	// DefaultPhase1 and DefaultPhase2.
	Phase1, Phase2 []Proposal
	// PFS is the Diffie-Hellman group of quick mode and CREATE_CHILD_SA, 0 for none. A peer's
	// offer must have this group or a stronger one.
	PFS Group
	// Lifetime1 and Lifetime2 are the lifetimes of the IKE SA and of the ESP SAs; 0 stands for a
	// day and half an hour. SAs are rekeyed after 75 to 80 % of it.
	Lifetime1, Lifetime2 time.Duration
	// DPDInterval is the time without an authentic packet after which the peer is probed, and the
	// interval of the probes; 0 disables dead peer detection. DPDRetries is how many probes may
	// go unanswered.
	DPDInterval time.Duration
	DPDRetries  int
	// RemoteID is the identity that the peer must have: an IPv4 address, or the text of an FQDN,
	// a user FQDN or a key ID. If it is "", the identity must be Remote or, for a peer behind a
	// NAT, the first one that it authenticated with. Remembered keeps that identity across the
	// Peers of a tunnel; nil stands for an Identity of this Peer alone.
	RemoteID   string
	Remembered *Identity
	// Passive leaves it to the peer to initiate.
	Passive bool
	// OnDemand begins a negotiation only if there is an SA to replace, or after Demand. The peer may
	// begin one at any time.
	OnDemand bool
	// Limits bound the cost of unauthenticated messages; nil stands for Limits of this Peer alone.
	Limits *Limits
	// ForceUDP encapsulates ESP in UDP (RFC 3948) without a NAT, too.
	ForceUDP bool
	// Rand is the source of SPIs, nonces and private keys; nil stands for crypto/rand. Tests set
	// it.
	Rand io.Reader
}

// Action is an output of a Peer. The caller carries Actions out in order.
type Action interface{ isAction() }

// Send sends a UDP datagram. The caller adds the non-ESP marker to an IKE message from port 4500
// (RFC 3948 section 2.2).
type Send struct {
	LocalPort uint16
	To        netip.AddrPort
	Payload   []byte
	// Keepalive marks a NAT-keepalive (RFC 3948 section 2.3), which gets no marker.
	Keepalive bool
	// Unverified marks an answer to a sender that has not shown return routability: anybody can forge the
	// peer's address, where there may be no host.
	Unverified bool
}

// AddInbound installs the inbound SA: the peer may send on it from now on.
type AddInbound struct{ *Child }

// UseOutbound makes the outbound SA the only one to encrypt with. If Child is nil, nothing may be
// sent.
type UseOutbound struct{ *Child }

// Remove removes the inbound SA.
type Remove struct{ *Child }

// SetPorts changes the UDP ports of an SA: the NAT in front of the peer has made a new mapping.
type SetPorts struct {
	*Child
	Local, Remote uint16
}

func (Send) isAction()        {}
func (AddInbound) isAction()  {}
func (UseOutbound) isAction() {}
func (Remove) isAction()      {}
func (SetPorts) isAction()    {}

// Child is a pair of ESP SAs (IKEv2: a Child SA).
type Child struct {
	Inbound, Outbound esp.Config
	// Version is the IKE version, 1 or 2, and IKE the proposal of the IKE SA.
	Version int
	IKE     Proposal
	// Group is the group of the Diffie-Hellman exchange that the keys come from: the PFS group,
	// or, for the first Child SA of IKEv2, that of the IKE SA.
	Group       Group
	Established time.Time
	RekeyAt     time.Time
	ExpireAt    time.Time

	active       bool // may be used for sending: the peer has it
	activateAt   time.Time
	peerSends    bool   // the peer has sent on it
	replaces     *Child // to be deleted once the peer sends on this one
	rekeying     bool
	receiveUntil time.Time // the peer no longer sends on it after that
	removeAt     time.Time // when a retired SA is removed; zero unless retired
	deleting     bool
	deleteAt     time.Time // when a DELETE is sent for a replaced SA
	v1           *v1SA     // the ISAKMP SA of the negotiation
	v2           *v2SA     // the IKE SA that it belongs to
}

// Weak names the algorithms of the ESP and the IKE SA that are only acceptable for lack of better
// ones; "" if there are none.
func (c *Child) Weak() string {
	p := Proposal{Cipher: c.Outbound.Suite.Cipher, Hash: c.Outbound.Suite.Integrity, Group: c.Group}
	if w := p.weak(); w != "" {
		return w
	}
	return c.IKE.weak()
}

// ProblemKind is why there is no SA.
type ProblemKind uint8

// The kinds of problem.
const (
	NoProblem ProblemKind = iota
	// NoAnswer: the peer does not answer, or no longer.
	NoAnswer
	// NoCommonProposal: Ours and Theirs are the two offers.
	NoCommonProposal
	// SecretMismatch: authentication failed, at either end.
	SecretMismatch
	// Refused: the peer sent an error, given in Detail.
	Refused
	// WrongIdentity: the peer has the secret, but Theirs is not the expected identity.
	WrongIdentity
)

// Problem is why there is no SA. Problems are comparable with ==.
type Problem struct {
	Kind         ProblemKind
	Phase        int
	Ours, Theirs string
	Detail       string
}

// String returns the problem for a log line.
func (p Problem) String() string {
	switch p.Kind {
	case NoAnswer:
		return "the peer does not answer" + p.Detail
	case NoCommonProposal:
		s := fmt.Sprintf("no common proposal in phase %d: ours %s", p.Phase, p.Ours)
		if p.Theirs != "" {
			s += ", theirs " + p.Theirs
		}
		return s
	case SecretMismatch:
		return "the secret is not the peer's" + p.Detail
	case Refused:
		return "the peer refuses: " + p.Detail
	case WrongIdentity:
		return "the peer says that it is " + p.Theirs + p.Detail
	}
	return ""
}
