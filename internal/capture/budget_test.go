package capture

import (
	"io"
	"testing"
	"time"

	"ipipd/internal/drop"
)

// However much there is to write, what is written costs no more than the share of the processors and a burst at the
// beginning, and no less than half of that. Complete has no bound.
func TestBudget(t *testing.T) {
	for _, o := range []Options{{}, {Complete: true}} {
		r, now := NewRing(o), time.Unix(1, 0)
		s, err := NewStream(io.Discard, r, Header{Tunnel: "t0"}, now)
		if err != nil {
			t.Fatal(err)
		}
		b := NewBudget(s, o.Complete, 2, now)
		const second = 10 * time.Second
		bytes := s.bytes
		for end := now.Add(second); now.Before(end); {
			for range 1000 {
				Rings{r}.Packet(InnerIn, ping, 1, drop.None, now)
			}
			if _, _, err := s.Copy(); err != nil {
				t.Fatal(err)
			}
			now = now.Add(10 * time.Microsecond)
			wait := b.Wait(now)
			if wait > time.Second {
				t.Fatalf("it waits %v", wait)
			}
			now = now.Add(wait)
			if o.Complete && s.packets > 100_000 {
				break
			}
		}
		cost := time.Duration(s.packets)*packetCost + time.Duration(s.bytes-bytes)*byteCost
		most := time.Duration(2*share*float64(second)) + 2*burst
		if !o.Complete && (cost > most || cost < most/2) {
			t.Errorf("in %v it costs %v, want at most %v", second, cost, most)
		}
		if o.Complete && s.packets <= 100_000 {
			t.Errorf("only %d packets", s.packets)
		}
	}
}

// While there is little to write there is no wait.
func TestBudget_little(t *testing.T) {
	r, now := NewRing(Options{}), time.Unix(1, 0)
	s, err := NewStream(io.Discard, r, Header{Tunnel: "t0"}, now)
	if err != nil {
		t.Fatal(err)
	}
	b := NewBudget(s, false, 1, now)
	for range 1000 {
		now = now.Add(time.Millisecond)
		for range 20 {
			Rings{r}.Packet(InnerIn, ping, 1, drop.None, now)
		}
		if _, _, err := s.Copy(); err != nil {
			t.Fatal(err)
		}
		if wait := b.Wait(now); wait > 0 {
			t.Fatalf("it waits %v", wait)
		}
	}
}
