package tunnel

import (
	"errors"
	"os"
	"sync"

	"ipipd/internal/capture"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/tun"
)

// worker is one of the threads that move packets. They and their buffers belong to the process: a
// tunnel adds file descriptors to them. There are Engine.threads pairs of workers, one that reads TUN
// queues and one that reads receivers; see worker_linux.go.
type worker struct {
	buffers // used with mu held
	waiter  // how it waits for descriptors, by operating system

	mu sync.Mutex // held while sources are read, never while the worker waits

	sourcesMu sync.Mutex // guards the rest; never held for long
	sources   map[int32]source
	lastKey   int32
}

// source is what a worker reads: a TUN queue (outbound), or a receiver (inbound).
type source interface {
	// carry reads one batch, without waiting for one, and forwards it. n is how many packets were read.
	carry(b *buffers) (n int, err error)
	// failed is called, in a goroutine of its own, with the error of carry that ended the source,
	// unless that is os.ErrClosed.
	failed(err error)
}

// buffers is the memory that a worker moves packets with. One goroutine at a time uses it.
type buffers struct {
	index   int // of the pair of workers; each tunnel's queue of that index is written to
	sender  underlay.Sender
	scratch tun.Scratch
	icmp    []*packet.Buffer // one, for ICMP errors to inner senders
	small   []*packet.Buffer // batches of packets of smallSize and of 64 KiB, allocated when needed
	large   []*packet.Buffer
	run     []*packet.Buffer   // the packets of a batch that are written together
	paths   []*underlay.Path   // of each packet of run, with many remotes; else one
	next    [batchSize]next    // where each packet of a batch goes, with many remotes
	owners  [batchSize]*Tunnel // the tunnel of each packet of a received batch
	held    []capture.Held     // of each packet of a captured run; allocated when needed
}

// smallSize is the largest MTU, in bytes, for which a worker needs no buffers of 64 KiB.
const smallSize = 2048

// outbound returns buffers to read inner packets of t into. If its MTU is large or unknown, each
// holds a packet of 64 KiB.
func (b *buffers) outbound(t *Tunnel) []*packet.Buffer {
	if t.MTU() > smallSize || t.iface.Load().Moved {
		if b.large == nil {
			b.large = packet.NewBatch(batchSize/4, packet.MaxSize)
		}
		return b.large
	}
	if b.small == nil {
		b.small = packet.NewBatch(batchSize, smallSize)
	}
	return b.small
}

// inbound returns buffers to receive outer packets into.
func (b *buffers) inbound() []*packet.Buffer {
	if b.large == nil {
		b.large = packet.NewBatch(batchSize, packet.MaxSize)
	}
	return b.large
}

func newWorker(index int, sender underlay.Sender) *worker {
	return &worker{
		buffers: buffers{index: index, sender: sender, icmp: packet.NewBatch(1, icmpSize), run: make([]*packet.Buffer, 0, batchSize)},
		sources: make(map[int32]source),
	}
}

// add registers a source and returns its key, for watch and remove.
func (w *worker) add(s source) (key int32) {
	w.sourcesMu.Lock()
	defer w.sourcesMu.Unlock()
	w.lastKey++
	w.sources[w.lastKey] = s
	return w.lastKey
}

// remove ends reading from a source. When it returns the worker does not use it any more, and its file
// descriptors may be closed. It takes fds, which must be open, out of the epoll set; closing takes out others.
func (w *worker) remove(key int32, fds ...int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forget(key)
	for _, fd := range fds {
		w.unwatch(fd)
	}
}

func (w *worker) forget(key int32) {
	w.sourcesMu.Lock()
	defer w.sourcesMu.Unlock()
	delete(w.sources, key)
}

// carryLocked has a source read one batch. It returns false if that has failed: the source must not be waited for again.
func (w *worker) carryLocked(key int32) (n int, ok bool) {
	w.sourcesMu.Lock()
	s := w.sources[key]
	w.sourcesMu.Unlock()
	if s == nil { // removed since; the descriptor's number may be another's by now
		return 0, true
	}
	n, err := s.carry(&w.buffers)
	if err == nil {
		return n, true
	}
	w.forget(key)
	w.scratch.Discard()
	if errors.Is(err, os.ErrClosed) {
		return n, true
	}
	go s.failed(err)
	return n, false
}
