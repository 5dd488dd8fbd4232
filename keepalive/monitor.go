// Package keepalive decides from the packets received whether a tunnel is running, and builds the
// probes that make a peer answer.
//
// A Monitor is a state machine without a clock: the caller passes the time, and is told when to probe.
// Any authentic packet of the peer counts, not only the answer to a probe; the caller decides
// what is authentic.
//
//	       NoteReceived                NoteReceived
//	Waiting ────────▶ Up ◀───────────────────────────────┐
//	   │              │                                  │
//	   │ hold time    │ hold time expired                │
//	   ▼              ▼                                  │
//	NeverHeard       Lost ───────────────────────────────┤
//	   └─────────────────────────────────────────────────┘
//
// The hold time is the interval times the retries. Probes are sent in every state, or two ends
// that are both down would never come up again.
//
// No RFC has a keepalive for IP-in-IP, and no capture of RouterOS's was found. The probes are
// those of GRE (FormReflect) and EoIP (FormEmpty) on such routers, and an ICMP echo (RFC 792) for
// peers that answer neither.
package keepalive

import (
	"strconv"
	"time"
)

// State is the state of the keepalive.
type State uint8

const (
	// Off: no keepalive is configured. Always running.
	Off State = iota
	// Waiting: no packet yet, within the first hold time. Running, so that a peer that waits for
	// our traffic gets it.
	Waiting
	// Up: the last packet is within the hold time. Running.
	Up
	// NeverHeard: the hold time expired without any packet. Not running; most likely a
	// configuration error, or a filter for protocol 4.
	NeverHeard
	// Lost: the hold time expired after the last packet. Not running.
	Lost
)

var stateNames = []string{"off", "waiting", "up", "never-heard", "lost"}

// String returns the name in print's output: "off", "waiting", "up", "never-heard" or "lost".
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "State(" + strconv.Itoa(int(s)) + ")"
}

// Running reports whether a tunnel in that state is running.
func (s State) Running() bool { return s <= Up }

// Monitor is the keepalive of one tunnel. It is not safe for concurrent use: the data path stores
// the time of the latest packet for the goroutine that owns the Monitor.
//
// Times should have Go's monotonic reading. If the clock is set back, the Monitor moves its own
// times back, so that neither the hold time nor the wait for a probe grows. A jump forward counts
// as elapsed time.
type Monitor struct {
	config    Config
	holdTime  time.Duration
	state     State
	lastTick  time.Time // to notice that the clock was set back
	last      time.Time // of the latest packet; zero is none
	since     time.Time // start of the hold time: New, Configure, or the latest packet
	nextProbe time.Time // when the next probe is due
}

// New returns a Monitor started at now. The first probe is due at once.
func New(c Config, now time.Time) *Monitor {
	m := &Monitor{config: c, holdTime: c.HoldTime(), lastTick: now, since: now, nextProbe: now}
	if c.Interval > 0 {
		m.state = Waiting
	}
	return m
}

// Configure replaces the Config at now. A running tunnel stays running for at least a whole hold time; one
// that is not comes up with the next packet. The next probe is due no later than an interval from now.
func (m *Monitor) Configure(c Config, now time.Time) {
	off := m.state == Off
	m.config, m.holdTime = c, c.HoldTime()
	switch {
	case c.Interval == 0:
		m.state = Off
		return
	case off:
		m.state, m.lastTick, m.nextProbe = Waiting, now, now
		if !m.last.IsZero() && now.Sub(m.last) < m.holdTime {
			m.state = Up
		}
	case now.Add(c.Interval).Before(m.nextProbe):
		m.nextProbe = now.Add(c.Interval)
	}
	if m.state.Running() {
		m.since = now
	}
}

// NoteReceived reports an authentic packet of the peer received at now, which may be before the
// last Tick. A packet older than the hold time does not bring the tunnel up.
func (m *Monitor) NoteReceived(now time.Time) {
	if !m.last.IsZero() && !now.After(m.last) {
		return
	}
	if m.state == Off {
		m.last = now
		return
	}
	if m.lastTick.Sub(now) >= m.holdTime {
		return
	}
	m.last = now
	if m.state == Waiting || !m.state.Running() || now.After(m.since) {
		m.since = now
	}
	m.state = Up
}

// Tick advances the time, and reports whether to send a probe. Call it at Next; calling it more
// often does no harm.
func (m *Monitor) Tick(now time.Time) (probe bool) {
	if m.state == Off {
		return false
	}
	if back := now.Sub(m.lastTick); back < 0 {
		for _, t := range []*time.Time{&m.since, &m.last} {
			if !t.IsZero() {
				*t = t.Add(back)
			}
			if t.After(now) { // received after the last Tick
				*t = now
			}
		}
		m.nextProbe = m.nextProbe.Add(back)
	}
	m.lastTick = now
	if !now.Before(m.nextProbe) {
		probe = true
		// Keep the period, but do not make up for whole intervals missed with a burst.
		m.nextProbe = m.nextProbe.Add(m.config.Interval)
		if !now.Before(m.nextProbe) {
			m.nextProbe = now.Add(m.config.Interval)
		}
	}
	if m.state.Running() && now.Sub(m.since) >= m.holdTime {
		if m.state == Waiting {
			m.state = NeverHeard
		} else {
			m.state = Lost
		}
	}
	return probe
}

// Next returns when Tick is due: the next probe, or the end of the hold time. It is the zero Time
// if the keepalive is off.
func (m *Monitor) Next() time.Time {
	if m.state == Off {
		return time.Time{}
	}
	if end := m.since.Add(m.holdTime); m.state.Running() && end.Before(m.nextProbe) {
		return end
	}
	return m.nextProbe
}

// State returns the present state.
func (m *Monitor) State() State { return m.state }
