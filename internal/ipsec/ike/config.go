package ike

import (
	"fmt"
	"io"
	"net/netip"
	"time"

	"ipipd/internal/ipsec/esp"
)

// Secret is a pre-shared key. It never shows itself in a log or an error.
type Secret []byte

// String hides the secret.
func (Secret) String() string { return "(secret)" }

// GoString hides the secret from %#v.
func (Secret) GoString() string { return "(secret)" }

// Format hides the secret from every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(secret)")) }

// MarshalText hides the secret from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte("(secret)"), nil }

// Mode is which version of IKE is spoken.
type Mode uint8

// The modes, in RouterOS's words.
const (
	Main Mode = iota // IKEv1 main mode
	IKE2             // IKEv2
	Auto             // as initiator IKEv2, then main; as responder what comes
)

// ParseMode reads main, ike2 or auto.
func ParseMode(s string) (Mode, error) {
	for m := Main; m <= Auto; m++ {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("%q is not accepted: want main, ike2 or auto", s)
}

// String is the mode's name.
func (m Mode) String() string { return [...]string{"main", "ike2", "auto"}[m] }

// Config is what a Peer has to know.
type Config struct {
	// Local and Remote are the outer addresses of the tunnel.
	Local, Remote netip.Addr
	Secret        Secret
	Mode          Mode
	// Phase1 and Phase2 are offered in this order, and nothing else is accepted;
	// nil stands for the defaults.
	Phase1, Phase2 []Proposal
	// PFS is the group of quick mode, 0 for none. What a peer offers must have
	// it or one of the groups after it in strength.
	PFS Group
	// Lifetime1 and Lifetime2 are the lifetimes of IKE's own SA and of ESP's;
	// 0 stands for a day and for half an hour. A rekey comes after 80 % of it.
	Lifetime1, Lifetime2 time.Duration
	// DPDInterval is how long nothing has to be heard of the peer until it is
	// asked whether it is there, DPDRetries how often; 0 never asks.
	DPDInterval time.Duration
	DPDRetries  int
	// RemoteID is the identity that the peer has to have: an IPv4 address, or the text
	// of an FQDN, a user FQDN or a key ID. "" stands for Remote, or, if the peer is
	// behind a NAT, for whatever it is at first, which Remembered keeps; nil is for a
	// Peer that shares that with no other.
	RemoteID   string
	Remembered *Identity
	// Passive leaves it to the peer to begin.
	Passive bool
	// ForceUDP has ESP wrapped in UDP as if there were a NAT.
	ForceUDP bool
	// Rand is where cookies, nonces, SPIs and private keys come from; nil
	// stands for crypto/rand. Anything else is for tests.
	Rand io.Reader
}

// Action is what a Peer wants done. Actions are to be carried out in order.
type Action interface{ isAction() }

// Send asks for a datagram. From port 4500 an IKE message gets a non-ESP marker
// in front of it (RFC 3948 section 2.2).
type Send struct {
	LocalPort uint16
	To        netip.AddrPort
	Payload   []byte
	// Keepalive says that Payload is a NAT keepalive and gets no marker.
	Keepalive bool
}

// AddInbound says that the peer may send by this SA from now on.
type AddInbound struct{ *Child }

// UseOutbound says that packets are to be sealed by this SA from now on, and by
// no other; by none, if Child is nil: then nothing may be sent.
type UseOutbound struct{ *Child }

// Remove says that the SA's time is over: nothing of it is to be opened any more.
type Remove struct{ *Child }

// SetPorts says that the peer, behind a NAT, has another port now.
type SetPorts struct {
	*Child
	Local, Remote uint16
}

func (Send) isAction()        {}
func (AddInbound) isAction()  {}
func (UseOutbound) isAction() {}
func (Remove) isAction()      {}
func (SetPorts) isAction()    {}

// Child is a pair of ESP SAs.
type Child struct {
	Inbound, Outbound esp.Config
	// Version is that of IKE, 1 or 2; IKE is what protected the negotiation.
	Version int
	IKE     Proposal
	// Group is that of the exchange that gave the keys: the PFS group, or, for
	// IKEv2's first, that of IKE.
	Group       Group
	Established time.Time
	RekeyAt     time.Time
	ExpireAt    time.Time

	active       bool // outbound too: the peer opens what is sealed by it
	activateAt   time.Time
	peerSends    bool   // the peer seals by it
	replaces     *Child // that is to be deleted once the peer seals by this one
	rekeying     bool
	receiveUntil time.Time // whatever becomes of it, the peer does not seal by it any more
	removeAt     time.Time // nothing is sealed by it any more, but opened until then
	deleting     bool
	deleteAt     time.Time // we tell the peer then
	v1           *v1SA     // that it was negotiated under
	v2           *v2SA     // that it belongs to
}

// Weak names the algorithms of the SA, and of what negotiated it, that should
// be used only where the peer has no better; "" is none.
func (c *Child) Weak() string {
	p := Proposal{Cipher: c.Outbound.Suite.Cipher, Hash: c.Outbound.Suite.Integrity, Group: c.Group}
	if w := p.weak(); w != "" {
		return w
	}
	return c.IKE.weak()
}

// ProblemKind is what keeps the peers from an SA.
type ProblemKind uint8

// The problems.
const (
	NoProblem ProblemKind = iota
	// NoAnswer: nothing comes back, or nothing any more.
	NoAnswer
	// NoCommonProposal: Ours and Theirs say what was on offer.
	NoCommonProposal
	// SecretMismatch: the peer's authentication, or ours there, failed.
	SecretMismatch
	// Refused: the peer said no, for the reason in Detail.
	Refused
	// WrongIdentity: the peer has the secret, but Theirs is not who is meant.
	WrongIdentity
)

// Problem is what keeps the peers from an SA. Equal problems compare equal.
type Problem struct {
	Kind         ProblemKind
	Phase        int
	Ours, Theirs string
	Detail       string
}

// String is the problem for a log line.
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
