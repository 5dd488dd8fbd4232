// Package monitor is `ipipd monitor` without its terminal and without its sockets: a Model of the tunnels as their
// processes answered, a View that makes lines of it and takes keys, and the outputs for pipes and files.
//
// Everything here is a function of its arguments, times included. Text of operators, and the names of others'
// interfaces, can hold escape sequences: it is cleaned before it is shown.
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

// Answer is a process's answer about its tunnels at one moment.
type Answer struct {
	tunnel.Samples
	// UndoAt is when the process undoes what it was told to change, unless that is confirmed.
	UndoAt time.Time `json:"undo-at,omitzero"`
}

// Reading is the result of asking one process.
type Reading struct {
	// Process identifies the process among those that run at the same time.
	Process string
	// Links are the names of its tunnels' interfaces, known from its socket's hard links.
	Links []string
	// At is when Answer came. Without an answer, State is StateStarting or StateSilent, or "" while it is awaited.
	At      time.Time
	Answer  *Answer
	State   State
	Problem string // why there is no answer
}

// State is a tunnel's state in a word: tunnel.Sample.State, or the state of its process.
type State string

// The states of tunnels.
const (
	StateRunning  State = "running"
	StateWaiting  State = "waiting"     // for what tunnel.Sample.WaitingFor says
	StateNoSA     State = "no-sa"       // has a secret and no SA
	StateLost     State = "lost"        // the keepalive hears the peer no more
	StateUnheard  State = "never-heard" // the keepalive has never heard the peer
	StateDown     State = "down"        // for another reason
	StateDisabled State = "disabled"
	StateStarting State = "starting"  // its process is starting
	StateSilent   State = "no-answer" // its process does not answer
	StateGone     State = "gone"      // the tunnel or its process has ended
)

// keepGone is how long a tunnel that has gone is still shown.
const keepGone = time.Minute

// Tunnel is a tunnel of a Model.
type Tunnel struct {
	tunnel.Sample // the last one received
	Link          string
	State         State
	GoneAt        time.Time // when State became StateGone
	// Fresh is whether the last answer of its process has the tunnel: if not, there are no rates.
	Fresh bool

	process  string
	history  *history.History
	seen     bool         // in this round of readings
	rate1s   history.Rate // over the last second
	rate10s  history.Rate // over the last ten seconds
	hasRates bool         // whether there are rates
	top      drop.Reason  // the most frequent one of the last ten seconds
}

// Model is the state of all tunnels that are shown.
type Model struct {
	// Tunnels are sorted by name.
	Tunnels []*Tunnel
	// Problems are why processes could not be asked, or did not answer, the last time.
	Problems []string
	// UndoAt is the next time at which a process undoes a change that is not confirmed.
	UndoAt time.Time
	// StrayRate is how many packets a second are dropped that belong to no tunnel, StrayTop their most frequent reason.
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

// graphSteps is the greatest number of steps that a graph shows.
const graphSteps = 60

// NewModel returns a Model whose rounds are interval apart, of the tunnel named only, or of all if only is "".
// compare sorts names.
func NewModel(interval time.Duration, only string, compare func(a, b string) int) *Model {
	return &Model{
		only: only, interval: interval, compare: compare,
		size:   2 + max(graphSteps, int(min(10*time.Second/interval, 200))),
		byLink: map[string]*Tunnel{}, strays: map[string]*history.History{}, problems: map[string]string{},
	}
}

// Update takes a round of readings, one for each process that runs.
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

// take takes the answer of r into the Model.
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

// add adds a reading, unless the last one is less than half an interval old, as in a round beside the regular ones:
// over so short a time one packet would be a rate of hundreds.
func (m *Model) add(h *history.History, s history.Sample) {
	if last, ok := h.Last(); ok && s.Time.Sub(last.Time) < m.interval/2 {
		return
	}
	h.Add(s)
}

// tunnel returns the tunnel with that link, and adds one if there is none.
func (m *Model) tunnel(link, name string) *Tunnel {
	t := m.byLink[link]
	if t == nil {
		t = &Tunnel{Sample: tunnel.Sample{Name: name, Interface: link}, Link: link, history: history.New(m.size)}
		m.byLink[link] = t
		m.Tunnels = append(m.Tunnels, t)
	}
	return t
}

// wanted reports whether the tunnel is to be shown: only is "", or the name of it or its interface.
func (m *Model) wanted(s *tunnel.Sample) bool {
	return m.only == "" || s.Name == m.only || s.Interface == m.only || s.Name == tunnel.InterfaceName(m.only)
}

// rate computes the tunnel's rates after a round.
func (t *Tunnel) rate() {
	t.rate1s, t.rate10s, t.hasRates, t.top = history.Rate{}, history.Rate{}, false, drop.None
	if !t.Fresh || !t.Started {
		return
	}
	if t.rate1s, t.hasRates = t.history.Rate(time.Second); t.hasRates {
		t.rate10s, _ = t.history.Rate(10 * time.Second)
		t.top, _ = t.history.TopDrop(10 * time.Second)
	}
}

// bits returns the rates in bit/s of the last n steps, in both directions, the oldest first.
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

// heard returns how long ago the peer was last heard; false if never.
func (t *Tunnel) heard(now time.Time) (time.Duration, bool) {
	return max(0, now.Sub(t.LastHeard)), !t.LastHeard.IsZero()
}

// warning returns the first active warning that is more than a note; nil if there is none.
func (t *Tunnel) warning() *tunnel.Warning {
	if i := slices.IndexFunc(t.Warnings, func(w tunnel.Warning) bool { return w.Severity != warning.Note }); i >= 0 && t.Fresh {
		return &t.Warnings[i]
	}
	return nil
}

func rounded(n float64) float64 { return math.Round(n*10) / 10 }
