package ipsec

import (
	"context"
	"net/netip"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
)

// negotiator runs the IKE of one tunnel: one goroutine, which is the only one that
// touches the ike.Peer.
type negotiator struct {
	manager *Manager
	session *Session
	ports   *ports
	peer    *ike.Peer
	local   netip.Addr
	remote  netip.Addr
	changed func()
	event   func(Event)

	inbox  chan datagram
	cancel context.CancelFunc
	done   chan struct{}

	inbound      map[uint32]*inboundSA // by SPI
	lastPackets  map[uint32]uint64     // packets that had been opened when we last looked
	current      *ike.Child
	port         uint16 // the peer's UDP port that ESP last came from
	problem      ike.Problem
	dirty        bool                     // something other than the problem has changed since publish
	reported     map[reportedProblem]bool // upSince the gate was last open
	weakReported string                   // weak algorithms that have been warned about
	upSince      time.Time
	espReceived  bool // anything, since the SA was made
	noESP        bool // it has been said that nothing arrives
}

// reportedProblem is what makes a problem another one for an operator: what is known
// of it in detail changes from try to try.
type reportedProblem struct {
	kind  ike.ProblemKind
	phase int
}

// datagram is an IKE message as it came.
type datagram struct {
	port    uint16 // ours
	from    netip.AddrPort
	payload []byte
}

const (
	// inboxSize bounds what waits while a Diffie-Hellman exchange is computed.
	inboxSize = 32
	// pollInterval is how often the counters of the SAs are looked at.
	pollInterval = time.Second
	// noESPTimeout is how long an SA may send without anything coming back until that
	// is said.
	noESPTimeout = 20 * time.Second
)

func (x *negotiator) run(ctx context.Context) {
	defer close(x.done)
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			// First the gate, then the farewell; who closed it need not be told.
			x.session.outbound.Store(nil)
			x.event = nil
			x.do(x.peer.Close(time.Now()))
			x.publish()
			return
		case d := <-x.inbox:
			x.do(x.peer.Receive(time.Now(), d.port, d.from, d.payload))
		case <-timer.C:
			x.do(x.peer.Tick(time.Now()))
		case <-ticker.C:
			x.pollSAs(time.Now())
		}
		x.publishIfChanged()
		timer.Stop()
		if next := x.peer.Next(); !next.IsZero() {
			timer.Reset(max(0, time.Until(next)))
		}
	}
}

// do carries out what the state machine wants.
func (x *negotiator) do(actions []ike.Action) {
	for _, a := range actions {
		if send, ok := a.(ike.Send); ok {
			x.ports.send(send)
			continue
		}
		x.dirty = true
		switch a := a.(type) {
		case ike.AddInbound:
			in, err := esp.NewInbound(a.Inbound)
			if err != nil {
				x.emit(EventFailed, err)
				continue
			}
			sa := &inboundSA{Inbound: in, owner: x, udp: a.Outbound.DestinationPort != 0}
			sa.port.Store(uint32(a.Outbound.DestinationPort))
			x.inbound[a.Inbound.SPI] = sa
			x.manager.addSA(x.key(a.Inbound.SPI), sa)
		case ike.UseOutbound:
			x.setOutbound(a.Child)
		case ike.Remove:
			if sa := x.inbound[a.Inbound.SPI]; sa != nil {
				x.manager.removeSA(x.key(a.Inbound.SPI), sa)
				sa.Close() // for whoever has just found it
				delete(x.inbound, a.Inbound.SPI)
				delete(x.lastPackets, a.Inbound.SPI)
			}
		case ike.SetPorts:
			// What has come from the port before counts no more, what comes from now on does.
			if sa := x.inbound[a.Inbound.SPI]; sa != nil {
				sa.port.Store(uint32(a.Remote))
			}
			if a.Child == x.current {
				x.port = a.Remote
				if o := x.session.outbound.Load(); o != nil {
					o.SetPorts(a.Local, a.Remote)
				}
			}
		}
	}
}

func (x *negotiator) key(spi uint32) saKey {
	return saKey{remote: as4(x.remote), local: as4(x.local), spi: spi}
}

// setOutbound makes the gate seal by another SA, or closes it.
func (x *negotiator) setOutbound(c *ike.Child) {
	var next *esp.Outbound
	if c != nil {
		var err error
		if next, err = esp.NewOutbound(c.Outbound); err != nil {
			x.emit(EventFailed, err)
			c = nil
		}
	}
	if next != nil { // first, so that nobody finds the gate open and the form that was
		x.session.espFormat.Store(&espFormat{c.Outbound.Suite, c.Outbound.DestinationPort != 0})
	}
	old := x.session.outbound.Swap(next)
	if old != nil && next == nil {
		old.Close() // also for whoever has just loaded it; a replaced one stays good for them
	}
	if c != nil && x.current == nil {
		x.upSince, x.espReceived, x.noESP = time.Now(), false, false
	}
	x.current = c
	x.port = 0
	if c != nil {
		x.port = c.Outbound.DestinationPort
	}
}

// pollSAs tells the state machine what came in by ESP, and watches for keys that
// are used up and for a path that takes IKE but no ESP.
func (x *negotiator) pollSAs(now time.Time) {
	for spi, sa := range x.inbound {
		n := sa.Packets()
		if n == x.lastPackets[spi] {
			continue
		}
		x.lastPackets[spi] = n
		x.espReceived = true
		x.do(x.peer.NoteReceived(now, spi))
		// The NAT in front of the peer has given it another port; the packet
		// that came from there was authentic (RFC 3948 section 5 wants no more).
		if port := uint16(sa.port.Load()); sa.udp && x.current != nil && x.current.Inbound.SPI == spi && port != x.port {
			x.do(x.peer.UpdateRemotePort(port))
		}
	}
	if o := x.session.outbound.Load(); o != nil {
		if o.NeedsRekey() {
			x.do(x.peer.Rekey(now))
			x.dirty = true // when that will be
		}
		if !x.espReceived && !x.noESP && o.Packets() > 5 && now.Sub(x.upSince) > noESPTimeout {
			x.noESP, x.dirty = true, true
			x.emit(EventNoESP, nil)
		}
		if x.espReceived && x.noESP {
			x.noESP, x.dirty = false, true
			x.emit(EventESPReceived, nil)
		}
	}
}

// isNew reports whether a problem has not been told yet since the gate was open.
func (x *negotiator) isNew(problem ike.Problem) bool {
	key := reportedProblem{problem.Kind, problem.Phase}
	if problem.Kind == ike.NoProblem || x.reported[key] {
		return false
	}
	if x.reported == nil {
		x.reported = map[reportedProblem]bool{}
	}
	x.reported[key] = true
	return true
}

func (x *negotiator) emit(kind EventKind, err error) {
	if x.event != nil {
		x.event(Event{Kind: kind, Status: x.session.Status(), Err: err})
	}
}

// publishIfChanged is publish if anything has changed, which it has not for most of what
// a stranger sends.
func (x *negotiator) publishIfChanged() {
	if x.dirty || x.peer.Problem() != x.problem {
		x.publish()
	}
}

// publish says what has changed: to the status, once as an event, to the tunnel.
func (x *negotiator) publish() {
	x.dirty = false
	s := &Status{Problem: x.peer.Problem().String()}
	if c := x.current; c != nil {
		s.Established, s.Suite, s.Group, s.Version = true, c.Outbound.Suite, c.Group, c.Version
		s.UDP, s.InboundSPI, s.OutboundSPI = c.Outbound.DestinationPort != 0, c.Inbound.SPI, c.Outbound.SPI
		s.Since, s.RekeyAt, s.Weak = c.Established, c.RekeyAt, c.Weak()
		if x.noESP {
			s.Problem = "no ESP arrives"
		}
	}
	old := x.session.status.Swap(s)
	if old == nil {
		old = &Status{}
	}
	x.problem = x.peer.Problem()
	if x.current == nil && x.isNew(x.problem) { // it may have come up while the gate was open
		x.emit(EventProblem, nil)
	}
	switch {
	case s.Established && !old.Established:
		x.reported = nil
		x.emit(EventUp, nil)
	case !s.Established && old.Established:
		x.emit(EventDown, nil)
	}
	if s.Established && s.Weak != "" && s.Weak != x.weakReported {
		x.weakReported = s.Weak
		x.emit(EventWeak, nil)
	}
	if x.changed != nil && (s.Established != old.Established || s.Suite != old.Suite || s.UDP != old.UDP) {
		x.changed()
	}
}
