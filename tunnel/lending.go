package tunnel

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/tun"
)

// Two threads of a tunnel, one for each direction, are for much traffic. Where little
// comes, and most of it answers what came the other way, the second one is a thread
// more to be woken before an answer leaves, which is most of the time that it takes. So
// while a queue of the device is calm its thread lends it to that of the receiver which
// the tunnel's packets come by. That waits for both, and gives the queue back as soon as
// there is more to do.

const (
	// few packets at a time, and fewer, are calm.
	few = 4
	// calmGap is how far from each other packets come that are calm.
	calmGap = 30 * time.Microsecond
	// calmFor is how long it has to be calm before a queue is lent.
	calmFor = 10 * time.Millisecond
	// hurries is how often in a row there may be less than calmGap between the packets
	// of a lent queue.
	hurries = 16
)

// pace is how fast the packets of a queue come.
type pace struct {
	busy    time.Time // when it last was not calm
	last    time.Time // when a lent queue was last read
	hurried int
}

// calm reports whether a queue is to be lent, of which n packets were read at that time
// by a call that began at since.
func (p *pace) calm(n int, since, now time.Time) bool {
	if n >= few || now.Sub(since) < calmGap {
		p.busy = now
	}
	return now.Sub(p.busy) >= calmFor
}

// hurry reports whether a lent queue is to be given back, of which n packets were read at
// that time.
func (p *pace) hurry(n int, now time.Time) bool {
	if now.Sub(p.last) < calmGap {
		p.hurried++
	} else {
		p.hurried = 0
	}
	p.last = now
	if n < few && p.hurried < hurries {
		return false
	}
	p.busy, p.hurried = now, 0
	return true
}

// loan is what an outbound knows of being lent.
type loan struct {
	back chan struct{} // has something when it was given back
	key  int32         // of the borrower's
}

// lend has the receiver's thread do the work, and returns when that is over.
func (o *outbound) lend(ctx context.Context) {
	b := o.tunnel.borrower.Load()
	if b == nil || !b.borrow(o) {
		return
	}
	select {
	case <-o.loan.back:
	case <-ctx.Done():
		b.reclaim(o)
		<-o.loan.back
	}
}

// lendTo notes by which receiver few packets came.
func (t *Tunnel) lendTo(b *borrower) {
	if b.receiver != nil && t.borrower.Load() != b {
		t.borrower.Store(b)
	}
}

// borrower is a receiver's thread with the queues that it reads besides.
type borrower struct {
	receiver encap.Watcher // nil if it cannot wait for anything else
	lent     atomic.Int32  // how many queues it has
	epoch    time.Time
	busy     atomic.Int64 // when more than few packets were received, in nanoseconds after epoch

	// mu is held while a lent queue is used. It is taken only while there is one.
	mu     sync.Mutex
	key    int32
	queues map[int32]*outbound
}

func newBorrower(receiver encap.Receiver) *borrower {
	watcher, _ := receiver.(encap.Watcher)
	return &borrower{receiver: watcher, epoch: time.Now(), queues: make(map[int32]*outbound)}
}

// borrow takes over a queue, if it can be.
func (b *borrower) borrow(o *outbound) bool {
	queue, ok := o.queue.(tun.SharedQueue)
	if !ok || time.Since(b.epoch)-time.Duration(b.busy.Load()) < calmFor {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.key++
	if queue.Control(func(fd int) error { return b.receiver.Watch(fd, b.key) }) != nil {
		return false
	}
	o.loan.key = b.key
	b.queues[b.key] = o
	b.lent.Store(int32(len(b.queues)))
	return true
}

// giveBack is for a caller who holds mu.
func (b *borrower) giveBack(o *outbound) {
	_ = o.queue.(tun.SharedQueue).Control(b.receiver.Unwatch) // if it is closed, it is forgotten
	delete(b.queues, o.loan.key)
	b.lent.Store(int32(len(b.queues)))
	o.loan.back <- struct{}{}
}

// reclaim gives a queue back if that has not been done.
func (b *borrower) reclaim(o *outbound) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.queues[o.loan.key] == o {
		b.giveBack(o)
	}
}

// returnAll gives everything back.
func (b *borrower) returnAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.queues {
		b.giveBack(o)
	}
}

// serve does what there is to do for lent queues, after that many packets were received.
func (b *borrower) serve(received int, now time.Time) {
	if received >= few {
		b.busy.Store(int64(now.Sub(b.epoch)))
	}
	switch {
	case b.lent.Load() == 0:
	case received >= few:
		b.returnAll()
	default:
		b.serveOne(now)
	}
}

func (b *borrower) serveOne(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key, ok := b.receiver.Ready()
	o := b.queues[key]
	if !ok || o == nil {
		return
	}
	n, err := o.queue.(tun.SharedQueue).TryRead(o.batch)
	if err == nil {
		err = o.carry(n)
	}
	// Who else than its thread could say what the error means?
	if err != nil || o.pace.hurry(n, now) || o.tunnel.borrower.Load() != b {
		b.giveBack(o)
	}
}
