package tunnel

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/underlay"
	"ipipd/tun"
)

// Two threads of a tunnel, one for each direction, are for much traffic. Where little
// comes, and most of it answers what came the other way, the second one is a thread
// more to be woken before an answer leaves, which is most of the time that it takes. So
// while a queue of the device is calm its thread lends it to that of the receiver which
// the tunnel's packets come by. That waits for both, and gives the queue back as soon as
// there is more to do.

const (
	// smallBatch packets at a time, and fewer, are calm.
	smallBatch = 4
	// idleGap is how far from each other packets come that are calm.
	idleGap = 30 * time.Microsecond
	// idleAfter is how long it has to be calm before a queue is lent.
	idleAfter = 10 * time.Millisecond
	// busyAfter is how often in a row there may be less than idleGap between the packets
	// of a lent queue.
	busyAfter = 16
)

// load is how fast the packets of a queue come.
type load struct {
	busy    time.Time // when it last was not calm
	last    time.Time // when a lent queue was last read
	hurried int
}

// idle reports whether a queue is to be lent, of which n packets were read at that time
// by a call that began at since.
func (p *load) idle(n int, since, now time.Time) bool {
	if n >= smallBatch || now.Sub(since) < idleGap {
		p.busy = now
	}
	return now.Sub(p.busy) >= idleAfter
}

// busyAgain reports whether a lent queue is to be given back, of which n packets were read at
// that time.
func (p *load) busyAgain(n int, now time.Time) bool {
	if now.Sub(p.last) < idleGap {
		p.hurried++
	} else {
		p.hurried = 0
	}
	p.last = now
	if n < smallBatch && p.hurried < busyAfter {
		return false
	}
	p.busy, p.hurried = now, 0
	return true
}

// handoff is what an outbound knows of being lent.
type handoff struct {
	back chan struct{} // has something when it was given back
	key  int32         // of the borrower's
}

// park has the receiver's thread do the work, and returns when that is over.
func (o *outbound) park(ctx context.Context) {
	b := o.tunnel.rxLoop.Load()
	if b == nil || !b.adopt(o) {
		return
	}
	select {
	case <-o.handoff.back:
	case <-ctx.Done():
		b.revoke(o)
		<-o.handoff.back
	}
}

// noteReceiver notes by which receiver few packets came.
func (t *Tunnel) noteReceiver(b *rxLoop) {
	if b.receiver != nil && t.rxLoop.Load() != b {
		t.rxLoop.Store(b)
	}
}

// rxLoop is a receiver's thread with the queues that it reads besides.
type rxLoop struct {
	receiver underlay.Watcher // nil if it cannot wait for anything else
	lent     atomic.Int32     // how many queues it has
	epoch    time.Time
	busy     atomic.Int64 // when more than few packets were received, in nanoseconds after epoch

	// mu is held while a lent queue is used. It is taken only while there is one.
	mu     sync.Mutex
	key    int32
	queues map[int32]*outbound
}

func newRxLoop(receiver underlay.Receiver) *rxLoop {
	watcher, _ := receiver.(underlay.Watcher)
	return &rxLoop{receiver: watcher, epoch: time.Now(), queues: make(map[int32]*outbound)}
}

// adopt takes over a queue, if it can be.
func (b *rxLoop) adopt(o *outbound) bool {
	queue, ok := o.queue.(tun.PollableQueue)
	if !ok || time.Since(b.epoch)-time.Duration(b.busy.Load()) < idleAfter {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.key++
	if queue.Control(func(fd int) error { return b.receiver.Watch(fd, b.key) }) != nil {
		return false
	}
	o.handoff.key = b.key
	b.queues[b.key] = o
	b.lent.Store(int32(len(b.queues)))
	return true
}

// release is for a caller who holds mu.
func (b *rxLoop) release(o *outbound) {
	_ = o.queue.(tun.PollableQueue).Control(b.receiver.Unwatch) // if it is closed, it is forgotten
	delete(b.queues, o.handoff.key)
	b.lent.Store(int32(len(b.queues)))
	o.handoff.back <- struct{}{}
}

// revoke gives a queue back if that has not been done.
func (b *rxLoop) revoke(o *outbound) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.queues[o.handoff.key] == o {
		b.release(o)
	}
}

// releaseAll gives everything back.
func (b *rxLoop) releaseAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.queues {
		b.release(o)
	}
}

// serve does what there is to do for lent queues, after that many packets were received.
func (b *rxLoop) serve(received int, now time.Time) {
	if received >= smallBatch {
		b.busy.Store(int64(now.Sub(b.epoch)))
	}
	switch {
	case b.lent.Load() == 0:
	case received >= smallBatch:
		b.releaseAll()
	default:
		b.serveOne(now)
	}
}

func (b *rxLoop) serveOne(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key, ok := b.receiver.Ready()
	o := b.queues[key]
	if !ok || o == nil {
		return
	}
	n, err := o.queue.(tun.PollableQueue).TryRead(o.batch)
	if err == nil {
		err = o.carry(n)
	}
	// Who else than its thread could say what the error means?
	if err != nil || o.load.busyAgain(n, now) || o.tunnel.rxLoop.Load() != b {
		b.release(o)
	}
}
