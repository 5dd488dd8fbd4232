// Package history keeps what a tunnel has counted over the last minutes, and makes rates of it.
//
// A History takes readings of the counters, at any times, and keeps the sums of how much each went up:
// 56 bytes for each reading, in a ring that never grows. Counters that went down belong to a tunnel, or
// a process, that was started again; what it had counted when it was first read is left out, so that no
// rate is negative, and none counts hours of traffic within a second.
//
// A rate can be had of any span of time: between two readings a counter is taken to go up evenly. Nothing
// here reads a clock, and a History belongs to one goroutine.
package history

import (
	"time"

	"ipipd/internal/drop"
)

// Sample is what a tunnel has counted since it was started.
type Sample struct {
	// Time is when the counters were read, by time.Now: it has to have a monotonic clock reading.
	Time                                   time.Time
	RxPackets, RxBytes, TxPackets, TxBytes uint64
	Drops                                  drop.Counts
}

// Rate is how much was counted per second.
type Rate struct {
	RxPackets, RxBytes, TxPackets, TxBytes float64
	// Drops counts dropped packets, for all reasons but those of the ICMP group, which count messages.
	Drops float64
}

// History is the last readings of one tunnel. Make one with New.
type History struct {
	epoch  time.Time // the time of the first reading, from which point.at counts
	last   Sample
	points []point // a ring
	next   int     // index of the next point
	n      int     // how many points there are
}

// point is a reading: sums since the first one of a History, which never go down.
type point struct {
	at                                            time.Duration
	rxPackets, rxBytes, txPackets, txBytes, drops uint64
	// topDrops are the drops for top, the most frequent reason since the point before.
	topDrops uint32
	top      drop.Reason
}

// New returns a History of size readings, two at least.
func New(size int) *History { return &History{points: make([]point, max(2, size))} }

// Add adds a reading. One of the same time as the last is left out, and with one from before it the
// History begins anew.
func (h *History) Add(s Sample) {
	since := s.Time.Sub(h.last.Time)
	switch {
	case h.n == 0 || since < 0:
		*h = History{epoch: s.Time, last: s, points: h.points}
		h.push(point{})
		return
	case since == 0:
		return
	}
	p := *h.at(h.n - 1)
	p.at, p.top, p.topDrops = s.Time.Sub(h.epoch), drop.None, 0
	if !restarted(&h.last, &s) {
		p.rxPackets += s.RxPackets - h.last.RxPackets
		p.rxBytes += s.RxBytes - h.last.RxBytes
		p.txPackets += s.TxPackets - h.last.TxPackets
		p.txBytes += s.TxBytes - h.last.TxBytes
		for r := range drop.All() {
			n := s.Drops[r] - h.last.Drops[r]
			if n == 0 || r.Direction() == "" {
				continue
			}
			p.drops += n
			if n > uint64(p.topDrops) {
				p.top, p.topDrops = r, uint32(min(n, 1<<32-1))
			}
		}
	}
	h.last = s
	h.push(p)
}

// restarted reports whether a counter went down.
func restarted(before, now *Sample) bool {
	for r := range now.Drops {
		if now.Drops[r] < before.Drops[r] {
			return true
		}
	}
	return now.RxPackets < before.RxPackets || now.RxBytes < before.RxBytes ||
		now.TxPackets < before.TxPackets || now.TxBytes < before.TxBytes
}

func (h *History) push(p point) {
	h.points[h.next] = p
	h.next = (h.next + 1) % len(h.points)
	h.n = min(h.n+1, len(h.points))
}

// at returns the i-th point, the oldest first.
func (h *History) at(i int) *point {
	return &h.points[(h.next-h.n+i+len(h.points))%len(h.points)]
}

// Last returns the last reading; false if there is none.
func (h *History) Last() (Sample, bool) { return h.last, h.n > 0 }

// Rate returns the rate over the window that ends with the last reading, or since the oldest reading
// if that is shorter; false if there are fewer than two readings.
func (h *History) Rate(window time.Duration) (Rate, bool) {
	if h.n < 2 {
		return Rate{}, false
	}
	end := h.at(h.n - 1).at
	return h.between(max(end-window, h.at(0).at), end), true
}

// TopDrop returns the most frequent reason for drops in the window that ends with the last reading, and
// its drops a second; drop.None if there were none. Of each reading only the most frequent reason is
// kept: the drops for any other are not counted.
func (h *History) TopDrop(window time.Duration) (drop.Reason, float64) {
	if h.n < 2 {
		return drop.None, 0
	}
	end := h.at(h.n - 1).at
	start := max(end-window, h.at(0).at)
	if end <= start {
		return drop.None, 0
	}
	var counts [drop.NumReasons]float64
	for i := h.n - 1; i > 0; i-- {
		p, before := h.at(i), h.at(i-1).at
		if p.at <= start {
			break
		}
		part := float64(p.at-max(start, before)) / float64(p.at-before)
		counts[p.top] += part * float64(p.topDrops)
	}
	top := drop.None
	for r := range drop.All() {
		if counts[r] > counts[top] {
			top = r
		}
	}
	return top, counts[top] / (end - start).Seconds()
}

// Series appends to dst the rates of n consecutive intervals of length step, the last of which ends at
// end, and returns it. The rate is zero before the oldest reading and after the last one, and an
// interval that is known in part has the rate of that part.
func (h *History) Series(dst []Rate, end time.Time, step time.Duration, n int) []Rate {
	if step <= 0 {
		return dst
	}
	last := end.Sub(h.epoch)
	for i := n; i > 0; i-- {
		to := last - time.Duration(i-1)*step
		var r Rate
		if h.n >= 2 {
			r = h.between(max(to-step, h.at(0).at), min(to, h.at(h.n-1).at))
		}
		dst = append(dst, r)
	}
	return dst
}

// between returns the rate from one time to another, both within the readings; zeros if there is no
// time between them.
func (h *History) between(from, to time.Duration) Rate {
	if to <= from {
		return Rate{}
	}
	a, b := h.sums(from), h.sums(to)
	per := func(a, b float64) float64 { return max(0, b-a) / (to - from).Seconds() } // a sum of floats is not exact
	return Rate{
		RxPackets: per(a.RxPackets, b.RxPackets),
		RxBytes:   per(a.RxBytes, b.RxBytes),
		TxPackets: per(a.TxPackets, b.TxPackets),
		TxBytes:   per(a.TxBytes, b.TxBytes),
		Drops:     per(a.Drops, b.Drops),
	}
}

// sums returns what was counted from the oldest point to a time within the readings.
func (h *History) sums(at time.Duration) Rate {
	// Find the first point that is not before at.
	low, high := 0, h.n-1
	for low < high {
		if mid := (low + high) / 2; h.at(mid).at < at {
			low = mid + 1
		} else {
			high = mid
		}
	}
	first, p := h.at(0), h.at(low)
	if low == 0 {
		return Rate{}
	}
	before := h.at(low - 1)
	part := float64(at-before.at) / float64(p.at-before.at)
	sum := func(of func(*point) uint64) float64 {
		return float64(of(before)-of(first)) + part*float64(of(p)-of(before))
	}
	return Rate{
		RxPackets: sum(func(p *point) uint64 { return p.rxPackets }),
		RxBytes:   sum(func(p *point) uint64 { return p.rxBytes }),
		TxPackets: sum(func(p *point) uint64 { return p.txPackets }),
		TxBytes:   sum(func(p *point) uint64 { return p.txBytes }),
		Drops:     sum(func(p *point) uint64 { return p.drops }),
	}
}
