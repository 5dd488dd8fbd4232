// Package keepalive decides whether a tunnel is running, by whether its peer is
// heard, and builds the probes that make a silent peer speak.
//
// A Monitor is a state machine without a clock: time enters as an argument, and
// what is to be done comes out as a value. Any authentic packet of the peer says
// that it is there, not only the answer to a probe; what is authentic is for the
// caller to judge.
//
//	          Heard                        Heard
//	Waiting ────────▶ Up ◀───────────────────────────────┐
//	   │              │                                  │
//	   │ allowance    │ allowance used up                │
//	   ▼              ▼                                  │
//	NeverHeard       Lost ───────────────────────────────┤
//	   └─────────────────────────────────────────────────┘
//
// The allowance is the interval times the retries. Probes go out in every state,
// else two ends that have given each other up would stay so for ever.
//
// No RFC says how IP-in-IP is kept alive, and no capture of RouterOS doing it
// was found: the forms of Probe are those of GRE (reflect) and EoIP (empty) on
// such routers, and an ICMP echo (RFC 792) for peers that answer neither.
package keepalive

import (
	"strconv"
	"time"
)

// State is what is known of the peer.
type State uint8

const (
	// Off: nobody asked for a keepalive; the tunnel is running whatever happens.
	Off State = iota
	// Waiting: nothing was heard yet, and the peer still has time. Running, so
	// that a peer that is itself waiting for traffic is not kept out.
	Waiting
	// Up: the peer was heard within the allowance. Running.
	Up
	// NeverHeard: the allowance passed and there never was a sign of the peer.
	// Not running; most likely it is set up wrong, or protocol 4 is filtered.
	NeverHeard
	// Lost: the peer was heard once and has fallen silent. Not running.
	Lost
)

var stateNames = []string{"off", "waiting", "up", "never-heard", "lost"}

// String is what print shows: "off", "waiting", "up", "never-heard" or "lost".
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "State(" + strconv.Itoa(int(s)) + ")"
}

// Running says whether a tunnel in that state is running.
func (s State) Running() bool { return s <= Up }

// Action is what a Tick asks for.
type Action struct {
	// Probe: send a probe now.
	Probe bool
	// Changed: the State is another than before; Running may be.
	Changed bool
}

// Monitor is the keepalive of one tunnel. It is not safe for concurrent use:
// one goroutine owns it, and a data path that hears the peer leaves the time
// where that goroutine finds it before its next Tick.
//
// Times should carry Go's monotonic reading. A clock that is set back moves the
// Monitor's own times back with it, so that neither the silence nor the wait for
// the next probe grows; one that leaps forward counts as time gone by.
type Monitor struct {
	config    Config
	holdTime  time.Duration
	state     State
	lastTick  time.Time // the last Tick, which tells a clock set back
	received  bool
	since     time.Time // when the allowance began: New, or the last packet heard
	nextProbe time.Time // when the next probe is due
}

// New starts a keepalive at now. Its first probe is due at once.
func New(c Config, now time.Time) *Monitor {
	m := &Monitor{config: c, holdTime: c.HoldTime(), lastTick: now, since: now, nextProbe: now}
	if c.Interval > 0 {
		m.state = Waiting
	}
	return m
}

// NoteReceived tells that an authentic packet of the peer came at now, which may lie
// before the last Tick, and says whether the State changed. A packet that came
// longer ago than the allowance does not bring the tunnel back.
func (m *Monitor) NoteReceived(now time.Time) (changed bool) {
	if m.received && !now.After(m.since) {
		return false
	}
	if m.state == Off {
		m.received, m.since = true, now
		return false
	}
	if m.lastTick.Sub(now) >= m.holdTime {
		return false
	}
	m.received, m.since = true, now
	changed = m.state != Up
	m.state = Up
	return changed
}

// Tick tells what time it is. It may be called at any time and must be called
// at Next.
func (m *Monitor) Tick(now time.Time) (a Action) {
	if m.state == Off {
		return a
	}
	if back := now.Sub(m.lastTick); back < 0 {
		if m.since = m.since.Add(back); m.since.After(now) {
			m.since = now // heard after the last Tick
		}
		m.nextProbe = m.nextProbe.Add(back)
	}
	m.lastTick = now
	if !now.Before(m.nextProbe) {
		a.Probe = true
		// Keep the rhythm; but after an interval was missed whole, begin anew
		// rather than send a burst of what was missed.
		m.nextProbe = m.nextProbe.Add(m.config.Interval)
		if !now.Before(m.nextProbe) {
			m.nextProbe = now.Add(m.config.Interval)
		}
	}
	if m.state.Running() && now.Sub(m.since) >= m.holdTime {
		a.Changed = true
		if m.state == Waiting {
			m.state = NeverHeard
		} else {
			m.state = Lost
		}
	}
	return a
}

// Next is when Tick is due next: the next probe, or the end of the allowance.
// It is the zero Time if the keepalive is off.
func (m *Monitor) Next() time.Time {
	if m.state == Off {
		return time.Time{}
	}
	if end := m.since.Add(m.holdTime); m.state.Running() && end.Before(m.nextProbe) {
		return end
	}
	return m.nextProbe
}

// State is what is known of the peer.
func (m *Monitor) State() State { return m.state }

// Running says whether the tunnel is running.
func (m *Monitor) Running() bool { return m.state.Running() }

// LastReceived is when the peer was last heard, or the zero Time if it never was.
func (m *Monitor) LastReceived() time.Time {
	if !m.received {
		return time.Time{}
	}
	return m.since
}
