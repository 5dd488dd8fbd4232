package ike

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Peer negotiates with one other host. It is not safe for concurrent use.
type Peer struct {
	cfg Config

	now     time.Time
	next    time.Time
	rerun   bool
	actions []Action

	v1       []*v1SA
	v2       []*v2SA
	children []*Child
	current  *Child // the SA that outbound packets are encrypted with

	lastReceived time.Time // the last authentic packet of the peer, IKE or ESP
	renegotiate  bool      // the peer may have lost our SAs: negotiate a new one
	holdUntil    time.Time // until then a negotiation of the peer's has precedence
	holdUsed     bool      // holdUntil was set since our last attempt
	nextStart    time.Time
	nextChild    time.Time
	backoff      time.Duration
	demandedTill time.Time
	tryMain      bool // Auto mode: IKEv2 got no answer, so try IKEv1
	problem      Problem
	closed       bool
	changed      bool // Save would return another state than the last time

	cookieSecrets cookieSecrets
	verifiedDH    rateLimiter // Diffie-Hellman exchanges after return routability is shown
}

// Timers and limits.
const (
	retransmitFirst = time.Second
	retransmitMax   = 8 * time.Second
	retransmitTries = 6 // including the first transmission: 1+2+4+8+8+8 s
	halfOpenTime    = 40 * time.Second
	maxHalfOpen     = 8
	backoffFirst    = time.Second
	backoffMax      = 30 * time.Second
	demandTime      = 30 * time.Second // how long a Demand lets us negotiate
	holdTime        = 3 * time.Second  // for the peer's quick mode or IKE_AUTH to follow
	overlapTime     = 5 * time.Second  // a replaced SA is kept for packets in flight
	activateDelay   = 5 * time.Second  // before sending on a new SA, so that the peer has installed it
	confirmTimeout  = time.Second / 2  // before probing whether the peer got our IKE_AUTH response
	lingerTime      = 60 * time.Second // responses are kept for retransmitted requests
	keepaliveTime   = 20 * time.Second // RFC 3948 section 4
	maxChildren     = 16
	maxEstablished  = 16 // IKE SAs
)

// NewPeer returns a Peer that does nothing before its first Tick. It copies the secret.
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
	if cfg.Limits == nil {
		cfg.Limits = new(Limits)
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Mode != IKE2 && len(encodePhase1(cfg.Phase1, 0).transforms) == 0 && cfg.Mode == Main {
		return nil, fmt.Errorf("ike: none of the proposals for phase 1 is one of main mode")
	}
	return &Peer{cfg: cfg, now: now, next: now, lastReceived: now}, nil
}

// Receive processes an IKE message, without the non-ESP marker. from must have the peer's
// address; b is not kept. localPort is the port that it arrived on.
func (p *Peer) Receive(now time.Time, localPort uint16, from netip.AddrPort, b []byte) []Action {
	p.begin(now)
	if h, err := parseHeader(b); err == nil && !p.closed {
		via := udpPath{localPort, from}
		switch h.version >> 4 {
		case version1 >> 4:
			p.receiveV1(h, b, via)
		case version2 >> 4:
			p.receiveV2(h, b, via)
		}
	}
	return p.end()
}

// Tick runs the timers that are due at now. Call it at Next; calling it more often does no harm.
func (p *Peer) Tick(now time.Time) []Action {
	p.begin(now)
	return p.end()
}

// Next returns when Tick is due; zero if no timer runs.
func (p *Peer) Next() time.Time { return p.next }

// NoteReceived reports an authentic ESP packet on the SA with that inbound SPI. It need not be
// called for every packet.
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

// UpdateRemotePort reports an authentic ESP packet from another UDP port: the NAT in front of the
// peer has made a new mapping, which IKE then uses too (RFC 7296 section 2.23). Without a NAT it
// does nothing.
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
		if moved && c.Outbound.DestinationPort != 0 { // including SAs that are not used for sending yet
			p.setPorts(c, udpPath{c.Outbound.SourcePort, addrPort(p.cfg.Remote, port)})
		}
	}
	return p.actions
}

// Demand reports that there are packets and no SA: with OnDemand, the Peer may begin to negotiate for demandTime.
func (p *Peer) Demand(now time.Time) []Action {
	p.begin(now)
	p.demandedTill = p.now.Add(demandTime)
	return p.end()
}

// mayInitiate reports whether we may begin a negotiation. With OnDemand that takes a current SA, or a recent Demand.
func (p *Peer) mayInitiate() bool {
	return !p.cfg.Passive && (!p.cfg.OnDemand || p.current != nil || p.now.Before(p.demandedTill))
}

// Rekey starts a rekey of the current SA, before its sequence numbers run out.
func (p *Peer) Rekey(now time.Time) []Action {
	p.begin(now)
	if p.current != nil {
		p.current.RekeyAt, p.changed = earlier(p.current.RekeyAt, now), true
	}
	return p.end()
}

// Close deletes all SAs and notifies the peer. Afterwards nothing may be sent or received.
func (p *Peer) Close(now time.Time) []Action {
	p.begin(now)
	p.setOutbound(nil)
	p.closeV1()
	p.closeV2()
	for len(p.children) > 0 {
		p.remove(p.children[0])
	}
	p.forgetUnverified()
	p.v1, p.v2, p.closed, p.changed, p.next = nil, nil, true, true, time.Time{}
	return p.actions
}

// Current returns the SA that outbound packets are encrypted with, or nil.
func (p *Peer) Current() *Child { return p.current }

// Problem returns the latest reason why there is no SA; NoProblem once there is one.
func (p *Peer) Problem() Problem { return p.problem }

func (p *Peer) begin(now time.Time) {
	if now.After(p.now) { // time does not go backwards
		p.now = now
	}
	p.actions = nil
}

// end runs the timers that are due, and sets next.
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

// due reports whether t has come, and makes end run another pass then. Otherwise it schedules a
// Tick for t. A zero t is never due.
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

// past reports whether t has come. Otherwise it schedules a Tick for t.
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

// newSPI returns a random inbound SPI, unique among the SAs with this peer; 0 to 255 are reserved
// (RFC 4303 section 2.1).
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

// udpPath is the local UDP port and the remote endpoint that IKE messages use.
type udpPath struct {
	local  uint16
	remote netip.AddrPort
}

func (p *Peer) firstPath() udpPath { return udpPath{500, netip.AddrPortFrom(p.cfg.Remote, 500)} }

func (p *Peer) send(to udpPath, b []byte) {
	p.actions = append(p.actions, Send{LocalPort: to.local, To: to.remote, Payload: b})
}

// sendUnverified is send for an answer to a sender that has not shown return routability.
func (p *Peer) sendUnverified(to udpPath, b []byte) {
	p.actions = append(p.actions, Send{LocalPort: to.local, To: to.remote, Payload: b, Unverified: true})
}

// retransmission is a message that is retransmitted until it is answered.
type retransmission struct {
	messages [][]byte
	tries    int
	nextAt   time.Time
}

func (p *Peer) transmit(r *retransmission, to udpPath, messages ...[]byte) {
	r.messages, r.tries, r.nextAt, p.changed = messages, 1, p.now.Add(retransmitFirst), true
	p.resend(r, to)
}

func (p *Peer) resend(r *retransmission, to udpPath) {
	for _, b := range r.messages {
		p.send(to, b)
	}
}

func (r *retransmission) stop() { r.nextAt = time.Time{} }

// step retransmits the message when it is time to. It returns false once the tries are used up.
func (r *retransmission) step(p *Peer, to udpPath) bool {
	if !p.due(r.nextAt) {
		return true
	}
	p.changed = true
	if r.tries == retransmitTries {
		r.stop()
		return false
	}
	p.resend(r, to)
	r.nextAt = p.now.Add(min(retransmitFirst<<r.tries, retransmitMax))
	r.tries++
	return true
}

// noteFailure records why a negotiation of ours failed, and backs off before the next.
func (p *Peer) noteFailure(problem Problem) {
	known := p.problem.Kind != NoProblem && (problem.Kind == NoAnswer || // the recorded problem is more specific
		problem.Kind == p.problem.Kind && problem.Phase == p.problem.Phase && problem.Theirs == "" && p.problem.Theirs != "")
	if problem.Kind != NoProblem && !known {
		p.problem = problem
	}
	p.backoff = min(max(2*p.backoff, backoffFirst), backoffMax)
	p.nextStart = p.now.Add(p.backoff)
}

// noteHint records a problem known from an unauthenticated message only. It is ignored while
// there is an SA.
func (p *Peer) noteHint(problem Problem) {
	if p.current == nil {
		p.problem = problem
	}
}
