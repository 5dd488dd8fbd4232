package tunnel

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/underlay"
	"ipipd/tun"
)

// Hand-off of TUN queues. A thread per direction gives throughput, but at low load waking the
// second thread dominates the latency of an answer. So while a TUN queue is idle its thread
// parks it with the receive loop that the tunnel's packets come from. That loop polls both
// descriptors, and releases the queue when load rises.

const (
	// smallBatch is the batch size from which a queue is not idle.
	smallBatch = 4
	// idleGap is the shortest time between reads of an idle queue.
	idleGap = 30 * time.Microsecond
	// idleAfter is how long a queue must be idle before it is parked.
	idleAfter = 10 * time.Millisecond
	// busyAfter is the number of reads in a row, less than idleGap apart, after which a
	// parked queue is released.
	busyAfter = 16
)

// load measures the packet rate of a TUN queue.
type load struct {
	busyAt    time.Time // last time that the queue was not idle
	lastRead  time.Time // of a parked queue
	shortGaps int       // reads in a row less than idleGap apart
}

// idle records a read of n packets, which began at since and returned at now, and reports whether
// to park the queue.
func (l *load) idle(n int, since, now time.Time) bool {
	if n >= smallBatch || now.Sub(since) < idleGap {
		l.busyAt = now
	}
	return now.Sub(l.busyAt) >= idleAfter
}

// busyAgain records a read of n packets from a parked queue, and reports whether to release it.
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

// handoff is the state of a parked outbound.
type handoff struct {
	released chan struct{} // capacity 1; receives a value on release
	key      int32         // in rxLoop.queues
}

// park passes the queue to the receive loop and blocks until it is released or ctx is done. It
// returns at once if the loop cannot adopt the queue.
func (o *outbound) park(ctx context.Context) {
	l := o.tunnel.rxLoop.Load()
	if l == nil || !l.adopt(o) {
		return
	}
	select {
	case <-o.handoff.released:
	case <-ctx.Done():
		l.revoke(o)
		<-o.handoff.released
	}
}

// noteReceiver records the receive loop that a small batch came from.
func (t *Tunnel) noteReceiver(l *rxLoop) {
	if l.receiver != nil && t.rxLoop.Load() != l {
		t.rxLoop.Store(l)
	}
}

// rxLoop is a receiver's thread with the TUN queues that it has adopted.
type rxLoop struct {
	receiver   underlay.Watcher // nil if it cannot poll other descriptors
	parked     atomic.Int32     // len(queues)
	epoch      time.Time
	lastBusyNs atomic.Int64 // when a batch of at least smallBatch came, nanoseconds after epoch

	// mu guards the rest, and every use of an adopted queue. serveParked locks it only if
	// there is one.
	mu     sync.Mutex
	key    int32 // last key assigned
	queues map[int32]*outbound
}

func newRxLoop(receiver underlay.Receiver) *rxLoop {
	watcher, _ := receiver.(underlay.Watcher)
	return &rxLoop{receiver: watcher, epoch: time.Now(), queues: make(map[int32]*outbound)}
}

// adopt adds a queue to the loop. It fails if the queue cannot be shared or is closed, or the
// receiver is busy.
func (l *rxLoop) adopt(o *outbound) bool {
	queue, ok := o.queue.(tun.PollableQueue)
	if !ok || time.Since(l.epoch)-time.Duration(l.lastBusyNs.Load()) < idleAfter {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.key++
	if queue.Control(func(fd int) error { return l.receiver.Watch(fd, l.key) }) != nil {
		return false
	}
	o.handoff.key = l.key
	l.queues[l.key] = o
	l.parked.Store(int32(len(l.queues)))
	return true
}

// release returns a queue to its own thread. The caller holds mu.
func (l *rxLoop) release(o *outbound) {
	_ = o.queue.(tun.PollableQueue).Control(l.receiver.Unwatch) // epoll has already dropped a closed descriptor
	delete(l.queues, o.handoff.key)
	l.parked.Store(int32(len(l.queues)))
	o.handoff.released <- struct{}{}
}

// revoke releases a queue unless it already was.
func (l *rxLoop) revoke(o *outbound) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.queues[o.handoff.key] == o {
		l.release(o)
	}
}

// releaseAll releases all queues.
func (l *rxLoop) releaseAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.queues {
		l.release(o)
	}
}

// serveParked forwards a batch of an adopted queue, after the receiver read received packets. It
// releases all queues if those are many.
func (l *rxLoop) serveParked(received int, now time.Time) {
	if received >= smallBatch {
		l.lastBusyNs.Store(int64(now.Sub(l.epoch)))
	}
	switch {
	case l.parked.Load() == 0:
	case received >= smallBatch:
		l.releaseAll()
	default:
		l.serveNext(now)
	}
}

func (l *rxLoop) serveNext(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key, ok := l.receiver.Ready()
	o := l.queues[key]
	if !ok || o == nil {
		return
	}
	n, err := o.queue.(tun.PollableQueue).TryRead(o.batch)
	if err == nil {
		err = o.forward(n)
	}
	// An error is left to the queue's own thread.
	if err != nil || o.load.busyAgain(n, now) || o.tunnel.rxLoop.Load() != l {
		l.release(o)
	}
}
