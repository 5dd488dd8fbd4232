// Package monitor is `ipipd monitor` without its terminal and without its sockets: a Model of what the
// processes have said, a View that makes lines of it and takes keys, and the outputs for what
// is no terminal.
//
// Everything here is a function of what it is given, times included. What operators wrote, and what
// the interfaces of others are called, is cleaned before it is shown: it can hold escape sequences.
package monitor

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/history"
	"ipipd/internal/tunnel"
	"ipipd/internal/warning"
)

// Answer is what a process says of its tunnels at one moment.
type Answer struct {
	tunnel.Samples
	// UndoAt is when the process undoes what it was told to change, unless that is confirmed.
	UndoAt time.Time `json:"undo-at,omitzero"`
}

// Reading is what came of asking one process.
type Reading struct {
	// Process is different for each process that runs at the same time.
	Process string
	// Links are the names of its tunnels' interfaces, as far as they are known without it.
	Links []string
	// At is when Answer came. Without one, State is StateStarting or StateSilent, or "" if there is none yet.
	At      time.Time
	Answer  *Answer
	State   State
	Problem string // why there is none
}

// State is that of a tunnel, in a word: tunnel.Sample.State, or what is with its process.
type State string

// The states of tunnels.
const (
	StateRunning  State = "running"
	StateWaiting  State = "waiting"     // for what tunnel.Sample.WaitingFor says
	StateNoSA     State = "no-sa"       // with a secret
	StateLost     State = "lost"        // the keepalive hears the peer no more
	StateUnheard  State = "never-heard" // the keepalive has never heard it
	StateDown     State = "down"        // for another reason
	StateDisabled State = "disabled"
	StateStarting State = "starting"  // its process
	StateSilent   State = "no-answer" // of its process
	StateGone     State = "gone"      // it has ended, or its process
)

// keepGone is how long a tunnel is shown that has gone.
const keepGone = time.Minute

// Tunnel is one of a Model.
type Tunnel struct {
	tunnel.Sample // the last
	Link          string
	State         State
	GoneAt        time.Time // with StateGone
	// Fresh is whether the last answer of its process has the tunnel: if not, there are no rates.
	Fresh bool

	process string
	history *history.History
	seen    bool // in this round
	now     history.Rate
	tenth   history.Rate
	known   bool // whether there are rates
	top     drop.Reason
}

// Model is what is known of the tunnels.
type Model struct {
	// Tunnels are sorted by name.
	Tunnels []*Tunnel
	// Problems are why processes could not be asked, or did not answer, the last time.
	Problems []string
	// UndoAt is the next time when a process undoes what is not confirmed.
	UndoAt time.Time
	// StrayRate are packets a second that belong to no tunnel, StrayTop the most frequent reason.
	StrayRate float64
	StrayTop  drop.Reason

	only     string
	interval time.Duration
	size     int
	compare  func(a, b string) int
	byLink   map[string]*Tunnel
	strays   map[string]*history.History // by process
	problems map[string]string           // by process
}

// graphSteps is the most that a graph shows.
const graphSteps = 60

// NewModel returns a Model of rounds that are interval apart: of the tunnel that is called only, or of
// all if that is "". compare sorts names.
func NewModel(interval time.Duration, only string, compare func(a, b string) int) *Model {
	return &Model{
		only: only, interval: interval, compare: compare,
		size:   2 + max(graphSteps, int(min(10*time.Second/interval, 200))),
		byLink: map[string]*Tunnel{}, strays: map[string]*history.History{}, problems: map[string]string{},
	}
}

// Update takes a round of readings: one of each process that there is.
func (m *Model) Update(now time.Time, readings []Reading) {
	for _, t := range m.Tunnels {
		t.seen = false
	}
	m.Problems, m.UndoAt, m.StrayRate, m.StrayTop = nil, time.Time{}, 0, drop.None
	processes := map[string]bool{}
	for i := range readings {
		r := &readings[i]
		processes[r.Process] = true
		if r.Answer != nil || r.State != "" {
			m.problems[r.Process] = r.Problem
		}
		if problem := m.problems[r.Process]; problem != "" && !slices.Contains(m.Problems, problem) {
			m.Problems = append(m.Problems, problem)
		}
		switch {
		case r.Answer != nil:
			m.take(r)
		case r.State == "": // nothing new
			for _, t := range m.Tunnels {
				t.seen = t.seen || t.process == r.Process
			}
		default:
			for _, link := range r.Links {
				if t := m.byLink[link]; t != nil || m.wanted(&tunnel.Sample{Name: link}) {
					t = m.tunnel(link, link)
					t.process, t.State, t.seen, t.Fresh = r.Process, r.State, true, false
				}
			}
		}
	}
	ended := func(id string) bool { return !processes[id] }
	maps.DeleteFunc(m.strays, func(id string, _ *history.History) bool { return ended(id) })
	maps.DeleteFunc(m.problems, func(id, _ string) bool { return ended(id) })
	for _, t := range m.Tunnels {
		if t.seen {
			continue
		}
		if t.Fresh = false; t.State != StateGone {
			t.State, t.GoneAt = StateGone, now
		} else if m.only == "" && now.Sub(t.GoneAt) >= keepGone {
			delete(m.byLink, t.Link)
		}
	}
	m.Tunnels = slices.DeleteFunc(m.Tunnels, func(t *Tunnel) bool { return m.byLink[t.Link] == nil })
	for _, t := range m.Tunnels {
		t.rate()
	}
	slices.SortStableFunc(m.Tunnels, func(a, b *Tunnel) int { return cmp.Or(m.compare(a.Name, b.Name), cmp.Compare(a.Link, b.Link)) })
}

// take takes an answer.
func (m *Model) take(r *Reading) {
	a := r.Answer
	if !a.UndoAt.IsZero() && (m.UndoAt.IsZero() || a.UndoAt.Before(m.UndoAt)) {
		m.UndoAt = a.UndoAt
	}
	h := m.strays[r.Process]
	if h == nil {
		h = history.New(2)
		m.strays[r.Process] = h
	}
	m.add(h, history.Sample{Time: r.At, Drops: a.Drops})
	if rate, ok := h.Rate(m.interval); ok && rate.Drops > 0 {
		if top, n := h.TopDrop(m.interval); n >= m.StrayRate {
			m.StrayTop = top
		}
		m.StrayRate += rate.Drops
	}
	for i := range a.Tunnels {
		s := &a.Tunnels[i]
		if !m.wanted(s) {
			continue
		}
		t := m.tunnel(tunnel.InterfaceName(s.Name), s.Name)
		t.Sample, t.process, t.State, t.seen, t.Fresh = *s, r.Process, State(s.State()), true, true
		m.add(t.history, history.Sample{
			Time:      r.At,
			RxPackets: s.RxPackets, RxBytes: s.RxBytes, TxPackets: s.TxPackets, TxBytes: s.TxBytes,
			Drops: s.Drops,
		})
	}
}

// add adds a reading. One that comes soon after another, of a round beside the regular ones, is left out:
// a packet would be a rate of hundreds.
func (m *Model) add(h *history.History, s history.Sample) {
	if last, ok := h.Last(); ok && s.Time.Sub(last.Time) < m.interval/2 {
		return
	}
	h.Add(s)
}

// tunnel returns the one with that link, a new one if there is none.
func (m *Model) tunnel(link, name string) *Tunnel {
	t := m.byLink[link]
	if t == nil {
		t = &Tunnel{Sample: tunnel.Sample{Name: name, Interface: link}, Link: link, history: history.New(m.size)}
		m.byLink[link] = t
		m.Tunnels = append(m.Tunnels, t)
	}
	return t
}

// wanted reports whether a tunnel is called as was asked for.
func (m *Model) wanted(s *tunnel.Sample) bool {
	return m.only == "" || s.Name == m.only || s.Interface == m.only || s.Name == tunnel.InterfaceName(m.only)
}

// rate works out the rates of a round.
func (t *Tunnel) rate() {
	t.now, t.tenth, t.known, t.top = history.Rate{}, history.Rate{}, false, drop.None
	if !t.Fresh || !t.Started {
		return
	}
	if t.now, t.known = t.history.Rate(time.Second); t.known {
		t.tenth, _ = t.history.Rate(10 * time.Second)
		t.top, _ = t.history.TopDrop(10 * time.Second)
	}
}

// bits returns the last rates of n steps, in both directions.
func (t *Tunnel) bits(n int, step time.Duration) (rx, tx []float64) {
	last, ok := t.history.Last()
	if !ok {
		return make([]float64, n), make([]float64, n)
	}
	for _, r := range t.history.Series(nil, last.Time, step, n) {
		rx, tx = append(rx, 8*r.RxBytes), append(tx, 8*r.TxBytes)
	}
	return rx, tx
}

// heard is how long ago the peer was heard; false is never.
func (t *Tunnel) heard(now time.Time) (time.Duration, bool) {
	return max(0, now.Sub(t.LastHeard)), !t.LastHeard.IsZero()
}

// warning is the first that is active and more than a note; nil is none.
func (t *Tunnel) warning() *tunnel.Warning {
	if i := slices.IndexFunc(t.Warnings, func(w tunnel.Warning) bool { return w.Severity != warning.Note }); i >= 0 && t.Fresh {
		return &t.Warnings[i]
	}
	return nil
}

func rounded(n float64) float64 { return math.Round(n*10) / 10 }
