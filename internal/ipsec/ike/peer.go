package ike

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Peer negotiates with one other host. One goroutine at a time uses it.
type Peer struct {
	cfg Config

	now     time.Time
	next    time.Time
	rerun   bool
	actions []Action

	v1       []*v1SA
	v2       []*v2SA
	children []*Child
	current  *Child // what packets are sealed with

	lastReceived time.Time // something authentic last came from the peer
	refresh      bool      // the peer may have lost our SAs: make a new one
	holdUntil    time.Time // give a negotiation that the peer began time to get there
	holdUsed     bool      // that has been done since we last began, and nothing has come of it
	nextStart    time.Time
	nextChild    time.Time
	backoff      time.Duration
	tryMain      bool // in Auto mode: IKEv2 got no answer
	problem      Problem
	closed       bool

	unverifiedV1  unverifiedV1
	cookieSecrets cookieSecrets
	cheapReplies  rateLimiter // for strangers: what costs little
	unverifiedDH  rateLimiter // Diffie-Hellman exchanges for who may not hear us
	verifiedDH    rateLimiter // and for who does
}

// How long things take.
const (
	retransmitFirst = time.Second
	retransmitMax   = 8 * time.Second
	retransmitTries = 6 // the first one included: 1+2+4+8+8+8 s
	halfOpenTime    = 40 * time.Second
	maxHalfOpen     = 8
	backoffFirst    = time.Second
	backoffMax      = 30 * time.Second
	holdTime        = 3 * time.Second  // for the peer's quick mode to follow its main mode
	overlapTime     = 5 * time.Second  // of a replaced SA, for packets still on the way
	activateDelay   = 5 * time.Second  // to a new SA, for the peer to have it
	confirmTimeout  = time.Second / 2  // for the peer to show that it has our answer
	lingerTime      = 60 * time.Second // for answers to retransmissions
	keepaliveTime   = 20 * time.Second // RFC 3948 section 4
	maxChildren     = 16
	maxEstablished  = 16 // IKE SAs
)

// NewPeer makes a Peer. Nothing happens before the first Tick.
func NewPeer(cfg Config, now time.Time) (*Peer, error) {
	if !cfg.Local.Is4() || !cfg.Remote.Is4() {
		return nil, fmt.Errorf("ike: local and remote address have to be IPv4")
	}
	if len(cfg.Secret) == 0 {
		return nil, fmt.Errorf("ike: the secret is empty")
	}
	cfg.Secret = append(Secret(nil), cfg.Secret...)
	var err error
	if cfg.Phase1 == nil {
		if cfg.Phase1, err = ParsePhase1(DefaultPhase1); err != nil {
			return nil, err
		}
	}
	if cfg.Phase2 == nil {
		if cfg.Phase2, err = ParsePhase2(DefaultPhase2); err != nil {
			return nil, err
		}
	}
	if cfg.Lifetime1 == 0 {
		cfg.Lifetime1 = 24 * time.Hour
	}
	if cfg.Lifetime2 == 0 {
		cfg.Lifetime2 = 30 * time.Minute
	}
	if cfg.RemoteID == cfg.Local.String() {
		return nil, fmt.Errorf("ike: the identity of the peer cannot be our own address")
	}
	if cfg.Remembered == nil {
		cfg.Remembered = new(Identity)
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Mode != IKE2 && len(encodePhase1(cfg.Phase1, 0).transforms) == 0 && cfg.Mode == Main {
		return nil, fmt.Errorf("ike: none of the proposals for phase 1 is one of main mode")
	}
	return &Peer{cfg: cfg, now: now, next: now, lastReceived: now}, nil
}

// Receive takes a message that came from the network, without a non-ESP marker,
// and returns what is to be done. from must have the peer's address.
func (p *Peer) Receive(now time.Time, localPort uint16, from netip.AddrPort, b []byte) []Action {
	p.begin(now)
	if h, err := parseHeader(b); err == nil && !p.closed {
		at := udpPath{localPort, from}
		switch h.version >> 4 {
		case version1 >> 4:
			p.receiveV1(h, b, at)
		case version2 >> 4:
			p.receiveV2(h, b, at)
		}
	}
	return p.end()
}

// Tick does what is due at now. It is to be called at Next, and may be called at
// any time.
func (p *Peer) Tick(now time.Time) []Action {
	p.begin(now)
	return p.end()
}

// Next is when Tick has something to do; zero if that depends on what is received.
func (p *Peer) Next() time.Time { return p.next }

// NoteReceived says that an authentic ESP packet of the peer has come in, by the SA with
// that inbound SPI. It need not be said of every packet.
func (p *Peer) NoteReceived(now time.Time, spi uint32) []Action {
	p.begin(now)
	p.lastReceived = p.now
	for _, c := range p.children {
		if c.Inbound.SPI == spi {
			p.notePeerSends(c)
		}
	}
	return p.end()
}

// UpdateRemotePort says that an authentic ESP packet of the peer has come from another UDP
// port than before: the NAT in front of it has given it a new one, which holds
// for IKE as well (RFC 7296 section 2.23). Nothing moves where there is none.
func (p *Peer) UpdateRemotePort(port uint16) []Action {
	p.actions = nil
	moved := false
	move := func(at *udpPath, n nat) {
		if n.tracksPeerPort() && at.local == 4500 {
			at.remote = addrPort(at.remote.Addr(), port)
			moved = true
		}
	}
	for _, s := range p.v1 {
		if s.state == establishedV1 {
			move(&s.path, s.nat)
		}
	}
	for _, s := range p.v2 {
		if s.state == establishedV2 {
			move(&s.path, s.nat)
		}
	}
	for _, c := range p.children {
		if moved && c.Outbound.DestinationPort != 0 { // also one that is not sent by yet
			p.setPorts(c, udpPath{c.Outbound.SourcePort, addrPort(p.cfg.Remote, port)})
		}
	}
	return p.actions
}

// Rekey asks for new keys before the sequence numbers of the present ones end.
func (p *Peer) Rekey(now time.Time) []Action {
	p.begin(now)
	if p.current != nil {
		p.current.RekeyAt = earlier(p.current.RekeyAt, now)
	}
	return p.end()
}

// Close tells the peer that all SAs are deleted. After it nothing may be sent or
// received, and the Peer does nothing more.
func (p *Peer) Close(now time.Time) []Action {
	p.begin(now)
	p.setOutbound(nil)
	p.closeV1()
	p.closeV2()
	for len(p.children) > 0 {
		p.remove(p.children[0])
	}
	p.v1, p.v2, p.unverifiedV1, p.closed, p.next = nil, nil, unverifiedV1{}, true, time.Time{}
	return p.actions
}

// Current is the SA that packets are sealed with; nil if there is none.
func (p *Peer) Current() *Child { return p.current }

// Problem is what keeps the peers from an SA, or has last done so; NoProblem
// once there is one.
func (p *Peer) Problem() Problem { return p.problem }

// Established reports whether there is an SA of IKE itself.
func (p *Peer) Established() bool { return p.newestV1() != nil || p.newestV2() != nil }

func (p *Peer) begin(now time.Time) {
	if now.After(p.now) { // a clock that goes back has no say
		p.now = now
	}
	p.actions = nil
}

// end does what is due, and finds out when the next thing will be.
func (p *Peer) end() []Action {
	for range 16 {
		p.rerun, p.next = false, time.Time{}
		if p.closed {
			break
		}
		p.stepV1()
		p.stepV2()
		p.stepChildren()
		p.maintain()
		if !p.rerun {
			break
		}
	}
	return p.actions
}

// due reports whether t, if it is a time at all, has come, and else has Tick
// called then.
func (p *Peer) due(t time.Time) bool {
	if t.IsZero() {
		return false
	}
	if p.now.Before(t) {
		p.next = earlier(p.next, t)
		return false
	}
	p.rerun = true
	return true
}

// past reports whether t has come, and else has Tick called then.
func (p *Peer) past(t time.Time) bool {
	if p.now.Before(t) {
		p.next = earlier(p.next, t)
		return false
	}
	return true
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func (p *Peer) random(b []byte) {
	if _, err := io.ReadFull(p.cfg.Rand, b); err != nil {
		panic("ike: no random numbers: " + err.Error())
	}
}

func (p *Peer) random32() uint32 {
	var b [4]byte
	for {
		p.random(b[:])
		if v := binary.BigEndian.Uint32(b[:]); v != 0 {
			return v
		}
	}
}

// newSPI is one that no SA with this peer has.
func (p *Peer) newSPI() uint32 {
next:
	for {
		spi := p.random32()
		if spi < 256 {
			continue
		}
		for _, c := range p.children {
			if c.Inbound.SPI == spi {
				continue next
			}
		}
		return spi
	}
}

// udpPath is how datagrams go to the peer.
type udpPath struct {
	local  uint16
	remote netip.AddrPort
}

func (p *Peer) firstPath() udpPath { return udpPath{500, netip.AddrPortFrom(p.cfg.Remote, 500)} }

func (p *Peer) send(to udpPath, b []byte) {
	p.actions = append(p.actions, Send{LocalPort: to.local, To: to.remote, Payload: b})
}

// retransmission is a message that is repeated until an answer comes.
type retransmission struct {
	messages [][]byte
	tries    int
	at       time.Time
}

func (p *Peer) transmit(r *retransmission, to udpPath, messages ...[]byte) {
	r.messages, r.tries, r.at = messages, 1, p.now.Add(retransmitFirst)
	p.resend(r, to)
}

func (p *Peer) resend(r *retransmission, to udpPath) {
	for _, b := range r.messages {
		p.send(to, b)
	}
}

func (r *retransmission) stop() { r.at = time.Time{} }

// step repeats the message if it is time to; false says that there is no hope left.
func (r *retransmission) step(p *Peer, to udpPath) bool {
	if !p.due(r.at) {
		return true
	}
	if r.tries == retransmitTries {
		r.stop()
		return false
	}
	p.resend(r, to)
	r.at = p.now.Add(min(retransmitFirst<<r.tries, retransmitMax))
	r.tries++
	return true
}

// noteFailure notes why a negotiation that we began came to nothing, and has the next
// one wait.
func (p *Peer) noteFailure(problem Problem) {
	known := p.problem.Kind != NoProblem && (problem.Kind == NoAnswer || // what has been said says more
		problem.Kind == p.problem.Kind && problem.Phase == p.problem.Phase && problem.Theirs == "" && p.problem.Theirs != "")
	if problem.Kind != NoProblem && !known {
		p.problem = problem
	}
	p.backoff = min(max(2*p.backoff, backoffFirst), backoffMax)
	p.nextStart = p.now.Add(p.backoff)
}

// noteHint notes what a message that is not authenticated lets one guess.
func (p *Peer) noteHint(problem Problem) {
	if p.current == nil {
		p.problem = problem
	}
}
