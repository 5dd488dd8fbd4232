package history

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
	"unsafe"

	"ipipd/internal/drop"
)

var start = time.Unix(1_800_000_000, 0)

// after returns the reading d after start: 1000 bytes and 10 packets a second received, and twice as much sent.
func after(d time.Duration) Sample {
	n := uint64(d / time.Millisecond)
	return Sample{Time: start.Add(d), RxPackets: n / 100, RxBytes: n, TxPackets: n / 50, TxBytes: 2 * n}
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-6*max(1, math.Abs(b)) }

func TestHistory_Rate(t *testing.T) {
	h := New(16)
	if r, ok := h.Rate(time.Second); ok || r != (Rate{}) {
		t.Errorf("without a reading: %v", r)
	}
	h.Add(after(0))
	if _, ok := h.Rate(time.Second); ok {
		t.Error("one reading has a rate")
	}
	if _, ok := h.Last(); !ok {
		t.Error("no last reading")
	}
	for i := 1; i <= 5; i++ {
		h.Add(after(time.Duration(i) * time.Second))
	}
	busy := after(6 * time.Second)
	busy.RxBytes += 9000
	h.Add(busy)
	for window, want := range map[time.Duration]float64{
		time.Second:            10000,
		500 * time.Millisecond: 10000,
		2 * time.Second:        5500,
		10 * time.Second:       15000. / 6, // there are 6 s only
		0:                      0,
	} {
		if r, ok := h.Rate(window); !ok || !near(r.RxBytes, want) || window > 0 && (!near(r.TxBytes, 2000) || !near(r.RxPackets, 10) || !near(r.TxPackets, 20)) {
			t.Errorf("Rate(%v) = %+v, %v, want rx %v", window, r, ok, want)
		}
	}
}

// A full ring forgets its oldest reading, and its rates stay right.
func TestHistory_full(t *testing.T) {
	h := New(4)
	for i := range 100 {
		h.Add(after(time.Duration(i) * time.Second))
	}
	if r, ok := h.Rate(time.Minute); !ok || !near(r.RxBytes, 1000) || h.n != 4 || len(h.points) != 4 {
		t.Errorf("Rate = %+v, %v with %d of %d points", r, ok, h.n, len(h.points))
	}
	if size := unsafe.Sizeof(point{}); size > 56 {
		t.Errorf("a point has %d bytes: the doc says 56", size)
	}
}

func TestHistory_restart(t *testing.T) {
	for name, change := range map[string]func(*Sample){
		"all":                  func(s *Sample) { *s = Sample{Time: s.Time, RxBytes: 5, TxBytes: 1 << 60} },
		"one":                  func(s *Sample) { s.RxPackets-- },
		"drops":                func(s *Sample) { s.Drops[drop.NoPath] = 1; s.TxBytes = 1 << 60 },
		"one less by a glitch": func(s *Sample) { s.TxBytes-- },
	} {
		t.Run(name, func(t *testing.T) {
			h := New(16)
			for i := range 3 {
				s := after(10*time.Hour + time.Duration(i)*time.Second)
				s.Drops[drop.NoPath] = 7
				h.Add(s)
			}
			s, _ := h.Last()
			s.Time = s.Time.Add(time.Second)
			change(&s)
			h.Add(s)
			if r, _ := h.Rate(time.Second); r != (Rate{}) {
				t.Errorf("across the restart: %+v", r)
			}
			s.Time = s.Time.Add(time.Second)
			s.RxBytes += 300
			s.Drops[drop.NoPath] += 2
			h.Add(s)
			if r, _ := h.Rate(time.Second); !near(r.RxBytes, 300) || r.TxBytes != 0 || !near(r.Drops, 2) {
				t.Errorf("after it: %+v", r)
			}
		})
	}
}

// A second reading of one time is ignored, a late one counts as any, and one from before the last begins anew.
func TestHistory_time(t *testing.T) {
	h := New(8)
	h.Add(after(0))
	h.Add(after(time.Second))
	again := after(time.Second)
	again.RxBytes += 1 << 40
	h.Add(again)
	if r, _ := h.Rate(time.Second); !near(r.RxBytes, 1000) {
		t.Errorf("twice at once: %+v", r)
	}
	h.Add(after(30 * time.Second))
	if r, _ := h.Rate(time.Second); !near(r.RxBytes, 1000) {
		t.Errorf("late: %+v", r)
	}
	h.Add(after(5 * time.Second))
	if _, ok := h.Rate(time.Second); ok || h.n != 1 {
		t.Errorf("from before: %d readings", h.n)
	}
}

func TestHistory_TopDrop(t *testing.T) {
	h := New(16)
	if top, n := h.TopDrop(time.Second); top != drop.None || n != 0 {
		t.Errorf("without readings: %v %v", top, n)
	}
	s := after(0)
	s.Drops[drop.Loop] = 1 << 40 // from before
	h.Add(s)
	for i := 1; i <= 4; i++ {
		s = after(time.Duration(i) * time.Second)
		s.Drops[drop.Loop] = 1 << 40
		s.Drops[drop.TooBig] = uint64(i) * 5
		s.Drops[drop.ICMPLimited] = uint64(i) * 1000 // no packets
		h.Add(s)
	}
	s.Time = s.Time.Add(time.Second)
	s.Drops[drop.NoPath] += 12
	h.Add(s)
	for window, want := range map[time.Duration]struct {
		reason drop.Reason
		rate   float64
		all    float64
	}{
		time.Second:             {drop.NoPath, 12, 12},
		2 * time.Second:         {drop.NoPath, 6, 8.5},
		1500 * time.Millisecond: {drop.NoPath, 8, 29. / 3},
		time.Minute:             {drop.TooBig, 4, 6.4},
		0:                       {drop.None, 0, 0},
	} {
		top, n := h.TopDrop(window)
		if r, _ := h.Rate(window); top != want.reason || !near(n, want.rate) || !near(r.Drops, want.all) {
			t.Errorf("TopDrop(%v) = %v %v of %v, want %v", window, top, n, r.Drops, want)
		}
	}
}

func TestHistory_Series(t *testing.T) {
	h := New(32)
	end := start.Add(10 * time.Second)
	if s := h.Series(nil, end, time.Second, 3); len(s) != 3 || s[0] != (Rate{}) {
		t.Errorf("without readings: %v", s)
	}
	for _, ms := range []int{0, 1100, 1900, 3050, 4000, 5000} {
		h.Add(after(time.Duration(ms) * time.Millisecond))
	}
	got := h.Series(nil, start.Add(6500*time.Millisecond), time.Second, 8)
	for i, want := range []float64{0, 1000, 1000, 1000, 1000, 1000, 1000, 0} { // 0.5 s of the second is known, nothing of the last
		if !near(got[i].RxBytes, want) {
			t.Errorf("[%d] = %v, want %v", i, got[i].RxBytes, want)
		}
	}
	if s := h.Series(got, end, time.Second, 0); len(s) != len(got) {
		t.Errorf("none: %d", len(s))
	}
	if s := h.Series(nil, end, 0, 5); len(s) != 0 {
		t.Errorf("steps of no length: %v", s)
	}
}

// Whatever is read, and whenever, no rate is negative, infinite or not a number, and none is more than was counted
// between two readings.
func TestHistory_random(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		h := New(r.IntN(20))
		now, most := start, 0.0
		var s Sample
		for range 60 {
			if r.IntN(10) == 0 {
				s = Sample{}
			}
			step := time.Duration(r.Int64N(int64(3 * time.Second)))
			if r.IntN(40) == 0 {
				step = -step
			}
			now = now.Add(step)
			more := r.Uint64N(1 << r.IntN(40))
			if step > 0 {
				most = max(most, float64(more)/step.Seconds())
			}
			s.Time, s.RxBytes = now, s.RxBytes+more
			s.Drops[drop.Reason(r.IntN(int(drop.NumReasons)))] += r.Uint64N(1 << r.IntN(50))
			h.Add(s)
			got := h.Series(nil, now.Add(time.Duration(r.Int64N(int64(time.Second)))), 1+time.Duration(r.Int64N(int64(time.Second))), 20)
			one, _ := h.Rate(time.Second)
			for _, rate := range append(got, one) {
				for _, v := range []float64{rate.RxBytes, rate.Drops, rate.TxBytes} {
					if v < 0 || math.IsNaN(v) || math.IsInf(v, 0) {
						t.Fatalf("seed %d: %+v", seed, rate)
					}
				}
				if rate.RxBytes > most*(1+1e-6)+1 {
					t.Fatalf("seed %d: %v bytes a second, at most %v were counted", seed, rate.RxBytes, most)
				}
			}
			if top, n := h.TopDrop(5 * time.Second); n < 0 || math.IsNaN(n) || (top == drop.None) != (n == 0) {
				t.Fatalf("seed %d: %v %v", seed, top, n)
			}
		}
	}
}
