package ipsec

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
)

// negotiator runs IKE for one tunnel. Its goroutine, run, owns peer and everything from
// inbound on.
type negotiator struct {
	manager *Manager
	session *Session
	ports   *ports
	peer    *ike.Peer
	local   netip.Addr
	remote  netip.Addr
	changed func()
	event   func(Event)
	sas     *atomic.Uint64 // Config.SAs

	onDemand bool
	inbox    chan datagram
	demand   chan struct{} // see Session.Demand
	cancel   context.CancelFunc
	done     chan struct{}

	settings []setting // that the SAs depend on
	saved    []byte    // the tunnel's record of the process before, for restore

	inbound      map[uint32]*inboundSA // by SPI
	counters     map[uint32]saCounters // by inbound SPI
	lastPackets  map[uint32]uint64     // by SPI: inboundSA.Packets at the last poll
	current      *ike.Child            // whose outbound SA is used
	peerPort     uint16                // the peer's UDP port for ESP; 0 without UDP encapsulation
	problem      ike.Problem           // as last published
	dirty        bool                  // the status has changed other than by the problem
	reported     map[reportedProblem]bool
	weakReported string    // the value of Status.Weak in the last EventWeak
	upSince      time.Time // when the first of an uninterrupted series of SAs was established
	espReceived  bool      // since upSince
	noESP        bool      // EventNoESP has been emitted
	answered     time.Time // see ports.send
	refused      bool      // this host refused to send the last message: see ports.send
	restored     bool      // the SAs are of the process before, and EventRestored is to be emitted
	notKept      bool      // EventNotKept has been emitted
}

// reportedProblem identifies a problem for an operator. The details of ike.Problem are
// left out: they vary from attempt to attempt.
type reportedProblem struct {
	kind  ike.ProblemKind
	phase int
}

// datagram is a received IKE message, without a non-ESP marker.
type datagram struct {
	localPort uint16
	from      netip.AddrPort
	payload   []byte // owned by the negotiator
}

const (
	// inboxSize is how many IKE messages are queued while a Diffie-Hellman exchange is
	// computed.
	inboxSize = 32
	// pollInterval is how often the packet counters of the SAs are read.
	pollInterval = time.Second
	// noESPTimeout is how long ESP is sent without any being received until EventNoESP.
	noESPTimeout = 20 * time.Second
)

func (n *negotiator) run(ctx context.Context) {
	defer close(n.done)
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			// Stop sending before the peer gets the Delete. The caller of Close needs no
			// EventDown.
			n.session.outbound.Store(nil)
			n.event = nil
			if n.manager.leaving.Load() {
				return
			}
			n.do(n.peer.Close(time.Now()))
			n.publish()
			return
		case d := <-n.inbox:
			n.do(n.peer.Receive(time.Now(), d.localPort, d.from, d.payload))
		case <-timer.C:
			n.do(n.peer.Tick(time.Now()))
		case <-n.demand: // demanded stays set, so that the next Demand waits for the ticker
			n.do(n.peer.Demand(time.Now()))
		case <-ticker.C:
			if n.session.demanded.Swap(false) {
				n.do(n.peer.Demand(time.Now()))
			}
			n.pollSAs(time.Now())
		}
		n.publishIfChanged()
		timer.Stop()
		if next := n.peer.Next(); !next.IsZero() {
			timer.Reset(max(0, time.Until(next)))
		}
	}
}

// do performs the actions of the IKE state machine, once its state is saved.
func (n *negotiator) do(actions []ike.Action) {
	n.save()
	for _, a := range actions {
		if send, ok := a.(ike.Send); ok {
			refused := n.ports.send(send, time.Now(), &n.answered) != nil
			if refused != n.refused && !send.Unverified {
				n.refused, n.dirty = refused, true
			}
			continue
		}
		n.dirty = true
		switch a := a.(type) {
		case ike.AddInbound:
			if n.install(a.Child) && n.sas != nil {
				n.sas.Add(1)
			}
		case ike.UseOutbound:
			n.setOutbound(a.Child)
		case ike.Remove:
			if sa := n.inbound[a.Inbound.SPI]; sa != nil {
				n.manager.removeSA(n.key(a.Inbound.SPI), sa)
				sa.Close() // for a Receiver that has just looked it up
				if sa.outbound != nil {
					sa.outbound.Close()
				}
				delete(n.inbound, a.Inbound.SPI)
				delete(n.lastPackets, a.Inbound.SPI)
			}
			n.releaseCounters(a.Inbound.SPI) // after both are closed
		case ike.SetPorts:
			// A port seen before this no longer counts; one in a later packet does.
			if sa := n.inbound[a.Inbound.SPI]; sa != nil {
				sa.port.Store(uint32(a.Remote))
			}
			if a.Child == n.current {
				n.peerPort = a.Remote
				if o := n.session.outbound.Load(); o != nil {
					o.SetPorts(a.Local, a.Remote)
				}
			}
		}
	}
}

// install makes the inbound SA of c, and adds it to the table of received SPIs. It reports whether it could.
func (n *negotiator) install(c *ike.Child) bool {
	words := n.countersOf(c).words
	cfg := c.Inbound
	cfg.Counters = words[esp.OutboundWords:]
	in, err := esp.NewInbound(cfg)
	if err != nil {
		n.emit(EventFailed, err)
		return false
	}
	sa := &inboundSA{Inbound: in, owner: n, udp: c.Outbound.DestinationPort != 0, counters: words[:esp.OutboundWords]}
	sa.port.Store(uint32(c.Outbound.DestinationPort))
	n.inbound[c.Inbound.SPI] = sa
	n.manager.addSA(n.key(c.Inbound.SPI), sa)
	return true
}

func (n *negotiator) tunnelKey() tunnelKey { return tunnelKey{n.local, n.remote} }

func (n *negotiator) key(spi uint32) saKey {
	return saKey{remote: as4(n.remote), local: as4(n.local), spi: spi}
}

// setOutbound makes the Session send by the outbound SA of c; with nil it stops sending.
func (n *negotiator) setOutbound(c *ike.Child) {
	var next *esp.Outbound
	if c != nil {
		var err error
		if next, err = n.outboundOf(c); err != nil {
			n.emit(EventFailed, err)
			c = nil
		}
	}
	if next != nil { // before Swap: MaxInner must not use the old format once Established
		n.session.espFormat.Store(&espFormat{c.Outbound.Suite, c.Outbound.DestinationPort != 0})
	}
	old := n.session.outbound.Swap(next)
	if old != nil && next == nil {
		// Also for a Seal that has already loaded it. After a rekey such a Seal may go on.
		old.Close()
		if sa := n.inbound[n.current.Inbound.SPI]; sa != nil {
			sa.outbound = nil
		}
	}
	if c != nil && n.current == nil {
		n.upSince, n.espReceived, n.noESP = time.Now(), false, false
	}
	n.current = c
	n.peerPort = 0
	if c != nil {
		n.peerPort = c.Outbound.DestinationPort
	}
}

// outboundOf returns the outbound SA of c. If it is used again, after its successor has ended, its sequence
// numbers continue.
func (n *negotiator) outboundOf(c *ike.Child) (*esp.Outbound, error) {
	sa := n.inbound[c.Inbound.SPI]
	if sa == nil {
		return nil, errors.New("its inbound SA is not installed")
	}
	if sa.outbound != nil {
		sa.outbound.SetPorts(c.Outbound.SourcePort, c.Outbound.DestinationPort)
		return sa.outbound, nil
	}
	cfg := c.Outbound
	cfg.Counters = sa.counters
	var err error
	sa.outbound, err = esp.NewOutbound(cfg)
	return sa.outbound, err
}

// pollSAs reports received ESP to the state machine, rekeys before sequence numbers run
// out, and detects a path that passes IKE but not ESP.
func (n *negotiator) pollSAs(now time.Time) {
	for spi, sa := range n.inbound {
		packets := sa.Packets()
		if packets == n.lastPackets[spi] {
			continue
		}
		n.lastPackets[spi] = packets
		n.espReceived = true
		n.do(n.peer.NoteReceived(now, spi))
		// The NAT in front of the peer has changed its mapping. An authenticated packet
		// from the new port suffices (RFC 7296 section 2.23).
		if port := uint16(sa.port.Load()); sa.udp && n.current != nil && n.current.Inbound.SPI == spi && port != n.peerPort {
			n.do(n.peer.UpdateRemotePort(port))
		}
	}
	if o := n.session.outbound.Load(); o != nil {
		if o.NeedsRekey() {
			n.do(n.peer.Rekey(now))
			n.dirty = true // RekeyAt
		}
		if !n.espReceived && !n.noESP && o.Packets() > 5 && now.Sub(n.upSince) > noESPTimeout {
			n.noESP, n.dirty = true, true
			n.emit(EventNoESP, nil)
		}
		if n.espReceived && n.noESP {
			n.noESP, n.dirty = false, true
			n.emit(EventESPReceived, nil)
		}
	}
}

// isNew reports whether a problem has not been reported since there was last an SA, and
// notes it as reported.
func (n *negotiator) isNew(problem ike.Problem) bool {
	key := reportedProblem{problem.Kind, problem.Phase}
	if problem.Kind == ike.NoProblem || n.reported[key] {
		return false
	}
	if n.reported == nil {
		n.reported = map[reportedProblem]bool{}
	}
	n.reported[key] = true
	return true
}

func (n *negotiator) emit(kind EventKind, err error) {
	if n.event != nil {
		n.event(Event{Kind: kind, Status: n.session.Status(), Err: err})
	}
}

// publishIfChanged calls publish if the status has changed: it need not be allocated for each unauthenticated message.
func (n *negotiator) publishIfChanged() {
	if n.dirty || n.peer.Problem() != n.problem {
		n.publish()
	}
}

// publish updates Session.Status, emits an event for each change, and calls changed.
func (n *negotiator) publish() {
	n.dirty = false
	s := &Status{Problem: n.peer.Problem().String()}
	if n.refused {
		s.Problem = "this host refuses what IKE sends (EPERM): a firewall rule in OUTPUT, or IPAddressDeny= of the service"
	}
	if c := n.current; c != nil {
		s.Established, s.Suite, s.Group, s.Version = true, c.Outbound.Suite, c.Group, c.Version
		s.UDP, s.InboundSPI, s.OutboundSPI = c.Outbound.DestinationPort != 0, c.Inbound.SPI, c.Outbound.SPI
		s.Since, s.RekeyAt, s.Weak = c.Established, c.RekeyAt, c.Weak()
		if s.NoESP = n.noESP; s.NoESP {
			s.Problem = "no ESP is received"
		}
	}
	defer func() { n.restored = false }()
	old := n.session.status.Swap(s)
	if old == nil {
		old = &Status{}
	}
	n.problem = n.peer.Problem()
	// Without a test for a change: the problem may have arisen while there was an SA.
	if n.current == nil && n.isNew(n.problem) {
		n.emit(EventProblem, nil)
	}
	switch {
	case s.Established && !old.Established:
		n.reported = nil
		if n.restored {
			n.emit(EventRestored, nil)
		} else {
			n.emit(EventUp, nil)
		}
	case !s.Established && old.Established:
		n.emit(EventDown, nil)
	}
	if s.Established && s.Weak != "" && s.Weak != n.weakReported {
		n.weakReported = s.Weak
		n.emit(EventWeak, nil)
	}
	if n.changed != nil && (s.Established != old.Established || s.Suite != old.Suite || s.UDP != old.UDP || s.Problem != old.Problem || s.Weak != old.Weak) {
		n.changed()
	}
}
