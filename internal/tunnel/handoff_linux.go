package tunnel

import (
	"sync/atomic"
	"time"
)

// Hand-off of TUN queues. A thread per direction gives throughput, but at low load waking the
// second thread dominates the latency of an answer. So while a pair's TUN queues are idle, out parks:
// it adds its epoll set to that of in, which then does the work of both, and releases out when load
// rises.

const (
	// smallBatch is the number of packets from which a worker is not idle.
	smallBatch = 4
	// idleGap is the shortest time between reads of an idle worker.
	idleGap = 30 * time.Microsecond
	// idleAfter is how long a worker must be idle before it is parked.
	idleAfter = 10 * time.Millisecond
	// busyAfter is the number of reads in a row, less than idleGap apart, after which a
	// parked worker is released.
	busyAfter = 16
)

// load measures the packet rate of a worker.
type load struct {
	busyAt    time.Time // last time that it was not idle
	lastRead  time.Time // of a parked worker
	shortGaps int       // of a parked worker, reads in a row less than idleGap apart
}

// idle records a read of n packets, for which the worker began to wait at since and which came at now,
// and reports whether to park it.
func (l *load) idle(n int, since, now time.Time) bool {
	if n >= smallBatch || now.Sub(since) < idleGap {
		l.busyAt = now
	}
	return now.Sub(l.busyAt) >= idleAfter
}

// busyAgain records a read of n packets of a parked worker, and reports whether to release it.
func (l *load) busyAgain(n int, now time.Time) bool {
	if now.Sub(l.lastRead) < idleGap {
		l.shortGaps++
	} else {
		l.shortGaps = 0
	}
	l.lastRead = now
	if n < smallBatch && l.shortGaps < busyAfter {
		return false
	}
	l.busyAt, l.shortGaps = now, 0
	return true
}

// handoff is the part of a pair that the hand-off needs. The thread that does out's work, out's own or in's
// while out is parked, owns load.
type handoff struct {
	load     load
	parked   atomic.Bool   // changed with out.mu held
	released chan struct{} // capacity 1; receives a value on release

	epoch      time.Time
	lastBusyNs atomic.Int64 // when in had smallBatch packets at once, nanoseconds after epoch
}

func newHandoff() handoff {
	return handoff{released: make(chan struct{}, 1), epoch: time.Now().Add(-time.Hour)} // so that in does not count as busy
}

// park leaves the work of out to in, and returns when out is released, or at once if in is busy or does not
// run. It is called by out's thread.
func (p *workers) park() {
	if !p.in.running.Load() || time.Since(p.epoch)-time.Duration(p.lastBusyNs.Load()) < idleAfter {
		return
	}
	if p.adopt() {
		<-p.released
	}
}

// adopt adds out's epoll set to in's, and reports whether it could.
func (p *workers) adopt() bool {
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	if p.out.stopping.Load() || p.in.epoll.Add(p.out.epoll.FD(), outKey) != nil {
		return false
	}
	p.parked.Store(true)
	return true
}

// releaseLocked returns out's work to its thread. out.mu is held.
func (p *workers) releaseLocked() {
	_ = p.in.epoll.Remove(p.out.epoll.FD())
	p.parked.Store(false)
	p.released <- struct{}{}
}

// unpark releases out, if it is parked.
func (p *workers) unpark() {
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	if p.parked.Load() {
		p.releaseLocked()
	}
}

// serveParked does the work of out, if it is parked, after in has received that many packets: often an answer to
// them is there already. It releases out if in has received smallBatch or more, or if out is busy again.
func (p *workers) serveParked(received int, now time.Time) {
	if received >= smallBatch {
		p.lastBusyNs.Store(int64(now.Sub(p.epoch)))
	}
	if !p.parked.Load() {
		return
	}
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	switch {
	case !p.parked.Load():
	case received >= smallBatch:
		p.releaseLocked()
	default:
		if n := p.out.carryAll(p.out.epoll.Poll()); n > 0 && p.load.busyAgain(n, now) {
			p.releaseLocked()
		}
	}
}
