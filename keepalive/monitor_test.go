package keepalive

import (
	"math"
	"testing"
	"time"
)

// start is an arbitrary time; the tests count seconds from it.
var start = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time {
	return start.Add(time.Duration(seconds * float64(time.Second)))
}

// step is one call of a Monitor, and the expected result.
type step struct {
	at       float64
	received bool // NoteReceived rather than Tick
	probe    bool
	state    State
}

func TestMonitor(t *testing.T) {
	const tick, recv = false, true
	const probe, silent = true, false
	for _, c := range []struct {
		rule   string
		config Config
		steps  []step
	}{
		{"probes go out at the interval, the first at once", Config{10 * time.Second, 10}, []step{
			{0, tick, probe, Waiting}, {0, tick, silent, Waiting}, {9.9, tick, silent, Waiting}, {10, tick, probe, Waiting},
			{20.5, tick, probe, Waiting}, {29.9, tick, silent, Waiting}, {30, tick, probe, Waiting},
		}},
		{"a missed interval is not made up for by a burst", Config{10 * time.Second, 10}, []step{
			{0, tick, probe, Waiting}, {55, tick, probe, Waiting}, {55, tick, silent, Waiting}, {60, tick, silent, Waiting}, {65, tick, probe, Waiting},
		}},
		{"never heard: not running after the hold time, and probes go on", Config{10 * time.Second, 2}, []step{
			{0, tick, probe, Waiting}, {10, tick, probe, Waiting}, {19.9, tick, silent, Waiting}, {20, tick, probe, NeverHeard}, {30, tick, probe, NeverHeard},
		}},
		{"the first packet brings it up, and every packet restarts the hold time", Config{10 * time.Second, 2}, []step{
			{0, tick, probe, Waiting}, {1, recv, silent, Up}, {2, recv, silent, Up}, {20, tick, probe, Up}, {21.9, tick, silent, Up}, {22, tick, silent, Lost}, {30, tick, probe, Lost},
		}},
		{"one packet brings back a peer never heard", Config{time.Second, 1}, []step{
			{1, tick, probe, NeverHeard}, {1.5, recv, silent, Up}, {2.4, tick, probe, Up}, {2.5, tick, silent, Lost},
		}},
		{"one packet brings back a peer that was lost", Config{time.Second, 3}, []step{
			{0, recv, silent, Up}, {3, tick, probe, Lost}, {100, tick, probe, Lost}, {100.5, recv, silent, Up}, {103.4, tick, probe, Up}, {103.5, tick, silent, Lost},
		}},
		{"a packet received before the last tick counts from its own time", Config{time.Second, 3}, []step{
			{0, recv, silent, Up}, {2, tick, probe, Up}, {1, recv, silent, Up}, {3.9, tick, probe, Up}, {4, tick, probe, Lost}, {3.5, recv, silent, Up}, {6.5, tick, probe, Lost},
		}},
		{"a packet older than the hold time brings nothing back", Config{time.Second, 3}, []step{
			{0, tick, probe, Waiting}, {10, tick, probe, NeverHeard}, {6, recv, silent, NeverHeard}, {7, recv, silent, NeverHeard}, {7.1, recv, silent, Up},
		}},
		{"times of packets that come out of order do not shorten the hold time", Config{time.Second, 3}, []step{
			{2, recv, silent, Up}, {1, recv, silent, Up}, {4.9, tick, probe, Up}, {5, tick, silent, Lost},
		}},
		{"a clock set back prolongs neither the hold time nor the wait for a probe", Config{10 * time.Second, 2}, []step{
			{0, tick, probe, Waiting}, {1, recv, silent, Up}, {5, tick, silent, Up}, {-1000, tick, silent, Up}, {-995, tick, probe, Up}, {-985, tick, probe, Up}, {-984, tick, silent, Lost}, {-983, recv, silent, Up},
		}},
		{"a clock that leaps ahead counts as silence", Config{10 * time.Second, 2}, []step{
			{0, recv, silent, Up}, {1e6, tick, probe, Lost}, {1e6, tick, silent, Lost}, {1e6 + 1, recv, silent, Up}, {1e6 + 10, tick, probe, Up},
		}},
		{"off is always running and never probes", Config{}, []step{
			{0, tick, silent, Off}, {1e6, tick, silent, Off}, {1e6, recv, silent, Off}, {2e9, tick, silent, Off},
		}},
		{"the longest hold time does not end at once", Config{math.MaxUint32 * time.Second, math.MaxUint32}, []step{
			{0, tick, probe, Waiting}, {1e9, tick, silent, Waiting}, {1e9, recv, silent, Up}, {2e9, tick, silent, Up},
		}},
	} {
		m := New(c.config, at(0))
		for i, s := range c.steps {
			probe := false
			if s.received {
				m.NoteReceived(at(s.at))
			} else {
				probe = m.Tick(at(s.at))
			}
			if probe != s.probe || m.State() != s.state {
				t.Errorf("%s: step %d at %gs: probe %v, %v: want %v, %v", c.rule, i, s.at, probe, m.State(), s.probe, s.state)
				break
			}
		}
	}
}

func TestStateRunning(t *testing.T) {
	want := map[State]bool{Off: true, Waiting: true, Up: true, NeverHeard: false, Lost: false}
	for s, running := range want {
		if s.Running() != running {
			t.Errorf("%v: running is %v", s, s.Running())
		}
	}
}

func TestMonitorNoteReceived_time(t *testing.T) {
	for _, c := range []Config{{}, {time.Second, 2}} {
		m := New(c, at(0))
		m.Tick(at(10))
		if !m.last.IsZero() {
			t.Errorf("%v: last received %v before anything was", c, m.last)
		}
		m.NoteReceived(at(11))
		m.Tick(at(99))
		if !m.last.Equal(at(11)) {
			t.Errorf("%v: last received %v, want %v", c, m.last, at(11))
		}
	}
}

func TestMonitorNext(t *testing.T) {
	m := New(Config{10 * time.Second, 2}, at(0))
	expect := func(seconds float64) {
		t.Helper()
		if !m.Next().Equal(at(seconds)) {
			t.Errorf("next is at %v, want %v", m.Next().Sub(start), at(seconds).Sub(start))
		}
	}
	expect(0)
	m.Tick(at(0))
	expect(10)
	m.NoteReceived(at(3))
	m.Tick(at(10))
	expect(20)
	m.Tick(at(20))
	expect(23) // the hold time ends before the probe at 30
	m.Tick(at(23))
	expect(30)
	if off := New(Config{}, at(0)); !off.Next().IsZero() {
		t.Errorf("off is due at %v", off.Next())
	}
}

// FuzzMonitor drives a Monitor with a clock that jumps, against a model in elapsed time: the
// tunnel stops running exactly at the end of the hold time, and there is one probe per interval.
// Each two bytes of the script are one step: the event, and its time or distance.
func FuzzMonitor(f *testing.F) {
	f.Add(uint8(10), uint8(10), []byte{0, 0, 1, 40, 0, 3, 2, 200, 3, 9, 0, 40, 1, 1})
	f.Add(uint8(1), uint8(1), []byte{1, 1, 0, 4, 5, 0, 5, 0, 5, 0, 1, 1})
	f.Add(uint8(3), uint8(2), []byte{4, 255, 0, 1, 2, 255, 1, 0, 4, 255, 5, 0, 5, 0, 5, 0, 5, 0})
	f.Fuzz(func(t *testing.T, interval, retries uint8, script []byte) {
		c := Config{Interval: time.Duration(interval%60+1) * time.Second, Retries: int(retries%20) + 1}
		m := New(c, start)
		// The durations are elapsed time since New; clock is what the Monitor gets.
		clock := start
		var now, ticked, heard, probed time.Duration
		ever, probes := false, int64(0)
		tick := func() {
			probe := m.Tick(clock)
			ticked = now
			want := Up
			switch silent := now-heard >= c.HoldTime(); {
			case silent && ever:
				want = Lost
			case silent:
				want = NeverHeard
			case !ever:
				want = Waiting
			}
			if m.State() != want {
				t.Fatalf("%v, %v after the last packet: %v: want %v", c, now-heard, m.State(), want)
			}
			if probe {
				probes++
				probed = now
			} else if probes == 0 || now-probed >= c.Interval {
				t.Fatalf("%v: no probe, %v after the last", c, now-probed)
			}
			if probes > int64(now/c.Interval)+1 {
				t.Fatalf("%v: %d probes in %v", c, probes, now)
			}
			if !m.Next().After(clock) || m.Next().Sub(clock) > c.Interval {
				t.Fatalf("%v: next tick is in %v", c, m.Next().Sub(clock))
			}
		}
		for ; len(script) >= 2; script = script[2:] {
			n := time.Duration(script[1]) * c.Interval / 16
			switch script[0] % 6 {
			case 0: // time passes
				clock, now = clock.Add(n), now+n
				tick()
			case 1: // time passes, and a packet arrives
				clock, now = clock.Add(n), now+n
				if m.NoteReceived(clock); m.State() != Up {
					t.Fatalf("heard a packet: %v", m.State())
				}
				heard, ever = now, true
			case 2: // a packet is reported late
				m.NoteReceived(clock.Add(-n))
				if when := now - n; (!ever || when > heard) && ticked-when < c.HoldTime() {
					heard, ever = when, true
				}
			case 3: // the clock jumps ahead, which counts as elapsed time
				clock, now = clock.Add(n*1000), now+n*1000
				tick()
			case 4: // the clock is set back
				tick()
				clock = clock.Add(-n * 1000)
				tick()
			case 5: // the timer fires
				if wait := m.Next().Sub(clock); wait > 0 {
					clock, now = clock.Add(wait), now+wait
				}
				tick()
			}
		}
	})
}

// A new Config takes nothing down that runs, and brings nothing up that does not.
func TestMonitorConfigure(t *testing.T) {
	at := time.Now()
	tick := func(m *Monitor, d time.Duration) State {
		at = at.Add(d)
		m.Tick(at)
		return m.State()
	}
	m := New(Config{10 * time.Second, 10}, at)
	m.NoteReceived(at)
	if s := tick(m, 50*time.Second); s != Up {
		t.Fatalf("heard 50 s ago of 100 s it is %v", s)
	}
	heard := m.last
	m.Configure(Config{time.Second, 3}, at)
	if next := m.Next(); next.After(at.Add(time.Second)) {
		t.Errorf("the next probe is due %v after the change", next.Sub(at))
	}
	if s := tick(m, 0); s != Up || !m.last.Equal(heard) {
		t.Errorf("with a shorter hold time it is %v at once, heard at %v, not %v", s, m.last, heard)
	}
	if s := tick(m, 2900*time.Millisecond); s != Up {
		t.Errorf("before the new hold time is over it is %v", s)
	}
	if s := tick(m, 200*time.Millisecond); s != Lost {
		t.Errorf("after the new hold time it is %v", s)
	}
	m.Configure(Config{10 * time.Second, 10}, at)
	if s := tick(m, 0); s != Lost {
		t.Errorf("a longer hold time has it %v", s)
	}
	m.Configure(Config{}, at)
	if s := tick(m, 0); s != Off || !m.Next().IsZero() {
		t.Errorf("off, it is %v and due at %v", s, m.Next())
	}
	m.NoteReceived(at)
	m.Configure(Config{10 * time.Second, 10}, at.Add(time.Second))
	if s := tick(m, time.Second); s != Up {
		t.Errorf("on again with a peer just heard it is %v", s)
	}
	m = New(Config{}, at)
	m.Configure(Config{10 * time.Second, 10}, at)
	if probe := m.Tick(at); m.State() != Waiting || !probe {
		t.Errorf("on with a peer never heard it is %v, a probe is due: %v", m.State(), probe)
	}
}
