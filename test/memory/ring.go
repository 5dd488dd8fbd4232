package memory

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
)

// capacity is the number of packets that a ring holds.
const capacity = 1024

// ring is a bounded queue of copies of packets. Slots are reused.
type ring struct {
	mu     sync.Mutex
	change sync.Cond
	slots  [capacity]slot
	first  int // the oldest
	n      int
	closed bool
	// pipe, made by the first fd, has a byte while n > 0. mark is that byte.
	pipe *[2]int
	mark [1]byte
}

type slot struct {
	bytes   []byte
	offload packet.Offload
}

func newRing() *ring {
	r := &ring{}
	r.change.L = &r.mu
	return r
}

// push appends a copy of p. If the ring is full it blocks with wait set, else ok is false.
// After close it returns os.ErrClosed.
func (r *ring) push(p []byte, offload packet.Offload, wait bool) (ok bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for wait && r.n == capacity && !r.closed {
		r.change.Wait()
	}
	switch {
	case r.closed:
		return false, os.ErrClosed
	case r.n == capacity:
		return false, nil
	}
	s := &r.slots[(r.first+r.n)%capacity]
	s.bytes = append(s.bytes[:0], p...)
	s.offload = offload
	r.n++
	if r.n == 1 {
		r.setReadableLocked()
	}
	r.change.Broadcast()
	return true, nil
}

// fd returns a descriptor that is readable while there are packets.
func (r *ring) fd() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pipe == nil {
		r.pipe = new([2]int)
		if err := unix.Pipe(r.pipe[:]); err != nil {
			panic(err)
		}
		if r.n > 0 {
			r.setReadableLocked()
		}
	}
	return r.pipe[0]
}

// setReadableLocked makes the pipe readable.
func (r *ring) setReadableLocked() {
	if r.pipe != nil {
		_, _ = unix.Write(r.pipe[1], r.mark[:])
	}
}

// clearReadableLocked takes the byte out of the pipe again.
func (r *ring) clearReadableLocked() {
	if r.pipe != nil {
		_, _ = unix.Read(r.pipe[0], r.mark[:])
	}
}

// pop fills batch with the oldest packets. It waits for the first until deadline, or forever
// if that is zero. After close it returns os.ErrClosed, and queued packets are lost.
func (r *ring) pop(batch []*packet.Buffer, deadline time.Time) (n int, err error) {
	if len(batch) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.n == 0 && !r.closed && (deadline.IsZero() || time.Now().Before(deadline)) {
		r.change.Wait()
	}
	return r.takeLocked(batch)
}

// tryPop is pop without waiting: n is 0 if there is no packet.
func (r *ring) tryPop(batch []*packet.Buffer) (n int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.takeLocked(batch)
}

// takeLocked is tryPop with mu held.
func (r *ring) takeLocked(batch []*packet.Buffer) (n int, err error) {
	if r.closed {
		return 0, os.ErrClosed
	}
	for n < len(batch) && r.n > 0 {
		s := &r.slots[r.first]
		b := batch[n]
		// A packet too long for its Buffer is truncated, as by read(2).
		b.SetLen(copy(b.Space(), s.bytes))
		b.Offload = s.offload
		r.first = (r.first + 1) % capacity
		r.n--
		if r.n == 0 {
			r.clearReadableLocked()
		}
		n++
	}
	r.change.Broadcast()
	return n, nil
}

// popWithin pops one packet into a new Buffer, or returns nil after d.
func (r *ring) popWithin(d time.Duration) *packet.Buffer {
	deadline := time.Now().Add(d) // before the timer, so that it has passed when the timer fires
	timer := time.AfterFunc(d, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.change.Broadcast()
	})
	defer timer.Stop()
	b := packet.New(packet.MaxSize)
	if n, err := r.pop([]*packet.Buffer{b}, deadline); n == 0 || err != nil {
		return nil
	}
	return b
}

func (r *ring) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed && r.pipe != nil {
		_, _ = unix.Close(r.pipe[0]), unix.Close(r.pipe[1])
		r.pipe = nil
	}
	r.closed = true
	r.change.Broadcast()
}

func (r *ring) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}
