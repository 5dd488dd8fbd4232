package tunnel

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

func TestLoadIdle(t *testing.T) {
	start := time.Unix(1, 0)
	var p load
	for _, tt := range []struct {
		packets int
		after   time.Duration // from start to the end of the read
		waited  time.Duration
		want    bool
	}{
		{1, 0, time.Second, true}, // first read of an unused interface
		{smallBatch, time.Second, time.Second, false},
		{1, time.Second + idleAfter - 1, idleGap, false},
		{1, time.Second + idleAfter, idleGap, true},
		{1, 2 * time.Second, idleGap - 1, false},
		{smallBatch - 1, 2*time.Second + idleAfter - 1, time.Millisecond, false},
		{smallBatch - 1, 2*time.Second + idleAfter, time.Millisecond, true},
	} {
		now := start.Add(tt.after)
		if got := p.idle(tt.packets, now.Add(-tt.waited), now); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestLoadBusyAgain(t *testing.T) {
	now := time.Unix(1, 0)
	var p load
	if p.busyAgain(smallBatch-1, now) {
		t.Error("few packets, and none before")
	}
	if !p.busyAgain(smallBatch, now.Add(time.Second)) {
		t.Error("many packets at a time are not enough")
	}
	for i := range 3 * busyAfter {
		gap := idleGap - 1
		if i%busyAfter == busyAfter-1 {
			gap = idleGap // once in a while
		}
		if now = now.Add(gap); p.busyAgain(1, now) {
			t.Fatalf("after %d packets, with a long gap now and then", i)
		}
	}
	for i := range busyAfter {
		now = now.Add(idleGap - 1)
		if shortGaps := p.busyAgain(1, now); shortGaps != (i == busyAfter-1) {
			t.Errorf("after %d short gaps: %v", i+1, shortGaps)
		}
	}
	if p.idle(1, now, now.Add(idleAfter-1)) || !p.idle(1, now, now.Add(idleAfter)) {
		t.Error("it is not parked again after idleAfter")
	}
}

// watcher is an underlay.Watcher on which the keys in ready are readable.
type watcher struct {
	underlay.Receiver
	watched map[int]int32
	ready   []int32
}

func (w *watcher) Watch(fd int, key int32) error { w.watched[fd] = key; return nil }
func (w *watcher) Unwatch(fd int) error          { delete(w.watched, fd); return nil }

func (w *watcher) Ready() (key int32, ok bool) {
	if len(w.ready) == 0 {
		return 0, false
	}
	key, w.ready = w.ready[0], w.ready[1:]
	return key, true
}

// shared is a SharedQueue from which each TryRead returns one of batches, and then err.
type shared struct {
	batches [][][]byte
	err     error
}

const sharedFD = 7

func (s *shared) Control(f func(fd int) error) error        { return f(sharedFD) }
func (s *shared) Read(batch []*packet.Buffer) (int, error)  { return s.TryRead(batch) }
func (s *shared) Write(batch []*packet.Buffer) (int, error) { return len(batch), nil }

func (s *shared) TryRead(batch []*packet.Buffer) (n int, err error) {
	if len(s.batches) == 0 {
		return 0, s.err
	}
	for i, p := range s.batches[0] {
		batch[i].SetLen(copy(batch[i].Space(), p))
	}
	n, s.batches = len(s.batches[0]), s.batches[1:]
	return n, nil
}

// parkedQueue returns a receive loop that has adopted a tunnel's queue.
func parkedQueue(t *testing.T) (*rxLoop, *watcher, *outbound, *shared, *memoryTx) {
	t.Helper()
	a, _ := pair(t, nil)
	w, q, tx := &watcher{watched: make(map[int]int32)}, new(shared), new(memoryTx)
	b := newRxLoop(w)
	b.epoch = b.epoch.Add(-time.Hour) // so long without packets
	a.noteReceiver(b)
	o := a.newOutbound(q, tx, idCounter{at: 1, first: 1, end: 9})
	if !b.adopt(o) || w.watched[sharedFD] != o.handoff.key {
		t.Fatalf("not adopted; watched are %v", w.watched)
	}
	return b, w, o, q, tx
}

// memoryTx is a transmitter that records the inner packets.
type memoryTx struct{ sent [][]byte }

func (m *memoryTx) Write(batch []*packet.Buffer, _ *underlay.Path) (sent, refused int, err error) {
	for _, b := range batch {
		m.sent = append(m.sent, bytes.Clone(b.Bytes()[20:]))
	}
	return len(batch), 0, nil
}

func wasReleased(o *outbound) bool {
	select {
	case <-o.handoff.released:
		return true
	default:
		return false
	}
}

func TestRxLoopServeParked(t *testing.T) {
	b, w, o, q, tx := parkedQueue(t)
	now := time.Now()
	b.serveParked(0, now) // nothing to read
	var want [][]byte
	for i := range 3 {
		p := datagram(100+i, nil)
		want = append(want, p)
		q.batches = append(q.batches, [][]byte{p})
		w.ready = append(w.ready, o.handoff.key)
		now = now.Add(time.Millisecond)
		b.serveParked(i%2, now)
	}
	if len(tx.sent) != 3 {
		t.Fatalf("%d packets were sent", len(tx.sent))
	}
	for i := range want {
		if !bytes.Equal(tx.sent[i], want[i]) {
			t.Errorf("packet %d is %x, not %x", i, tx.sent[i], want[i])
		}
	}
	if wasReleased(o) {
		t.Error("it released the queue")
	}
}

func TestRxLoopRelease(t *testing.T) {
	p := datagram(100, nil)
	for name, work := range map[string]func(b *rxLoop, w *watcher, o *outbound, q *shared){
		"it receives much": func(b *rxLoop, w *watcher, o *outbound, q *shared) {
			b.serveParked(smallBatch, time.Now())
			if b.adopt(o) {
				t.Error("it adopts a queue while it is busy")
			}
		},
		"the host sends much": func(b *rxLoop, w *watcher, o *outbound, q *shared) {
			q.batches, w.ready = [][][]byte{{p, p, p, p}}, []int32{o.handoff.key}
			b.serveParked(0, time.Now())
		},
		"the interface is gone": func(b *rxLoop, w *watcher, o *outbound, q *shared) {
			q.err, w.ready = errors.New("gone"), []int32{o.handoff.key}
			b.serveParked(0, time.Now())
		},
		"the tunnel's packets come by another": func(b *rxLoop, w *watcher, o *outbound, q *shared) {
			o.tunnel.noteReceiver(newRxLoop(w))
			q.batches, w.ready = [][][]byte{{p}}, []int32{o.handoff.key}
			b.serveParked(0, time.Now())
		},
		"it ends": func(b *rxLoop, w *watcher, o *outbound, q *shared) { b.releaseAll() },
		"the tunnel ends": func(b *rxLoop, w *watcher, o *outbound, q *shared) {
			b.revoke(o)
			b.revoke(o)
			w.ready = []int32{o.handoff.key}
			b.serveParked(0, time.Now())
		},
	} {
		t.Run(name, func(t *testing.T) {
			b, w, o, q, tx := parkedQueue(t)
			work(b, w, o, q)
			if !wasReleased(o) || wasReleased(o) {
				t.Error("it was not released exactly once")
			}
			if len(w.watched) != 0 || b.parked.Load() != 0 {
				t.Errorf("it still has %d, and watches %v", b.parked.Load(), w.watched)
			}
			if left := len(q.batches); left > 0 {
				t.Errorf("%d batches were left, %d packets sent", left, len(tx.sent))
			}
		})
	}
}

// park blocks until the queue is released, or the tunnel ends.
func TestOutboundPark_tunnelEnds(t *testing.T) {
	b, _, o, _, _ := parkedQueue(t)
	b.revoke(o)
	<-o.handoff.released
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.park(ctx)
	}()
	eventually(t, "it is parked", func() bool { return b.parked.Load() == 1 })
	cancel()
	<-done
	if b.parked.Load() != 0 {
		t.Error("the receiver still has it")
	}
}

func TestRxLoopAdopt_notShareable(t *testing.T) {
	a, _ := pair(t, nil)
	b := newRxLoop(&watcher{watched: make(map[int]int32)})
	b.epoch = b.epoch.Add(-time.Hour)
	if b.adopt(a.newOutbound(a.device.Queues()[0], new(memoryTx), idCounter{})) {
		t.Error("it is")
	}
	a.noteReceiver(newRxLoop(a.socket.Receivers()[0]))
	if a.rxLoop.Load() != nil {
		t.Error("nor to a receiver that cannot wait for it")
	}
}

func TestRxLoopAdopt_closedQueue(t *testing.T) {
	a, _ := pair(t, nil)
	b := newRxLoop(&watcher{watched: make(map[int]int32)})
	b.epoch = b.epoch.Add(-time.Hour)
	if b.adopt(a.newOutbound(closedQueue{new(shared)}, new(memoryTx), idCounter{})) || b.parked.Load() != 0 {
		t.Error("it is")
	}
}

type closedQueue struct{ *shared }

func (closedQueue) Control(func(int) error) error { return os.ErrClosed }
