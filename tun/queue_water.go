//go:build linux || darwin

package tun

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
)

// waterQueue has a goroutine that reads, as not every water.Interface has a file descriptor to poll:
// it passes the packets on by a channel, with a byte in a pipe for each.
type waterQueue struct {
	file    io.ReadWriteCloser
	packets chan []byte
	free    chan []byte // memory for packets
	pipe    [2]int
	mu      sync.RWMutex // guards the rest, and pipe[0] while it is in use
	closed  bool
	err     error // that ended the goroutine; set before pipe[1] is closed
}

// waterQueueLen is how many packets wait to be read beside those in the kernel's queue.
const waterQueueLen = 16

func (q *waterQueue) start(file io.ReadWriteCloser) error {
	q.file = file
	q.packets, q.free = make(chan []byte, waterQueueLen), make(chan []byte, waterQueueLen)
	for range waterQueueLen {
		q.free <- make([]byte, packet.MaxSize)
	}
	syscall.ForkLock.RLock() // no fork between pipe and close-on-exec
	defer syscall.ForkLock.RUnlock()
	if err := unix.Pipe(q.pipe[:]); err != nil {
		return os.NewSyscallError("pipe", err)
	}
	for _, fd := range q.pipe {
		unix.CloseOnExec(fd)
	}
	if err := unix.SetNonblock(q.pipe[0], true); err != nil {
		return err
	}
	go q.pump()
	return nil
}

// pump reads until the file is closed or fails. It waits in the Go runtime's netpoller.
func (q *waterQueue) pump() {
	defer unix.Close(q.pipe[1])
	for p := range q.free {
		n, err := q.file.Read(p[:cap(p)])
		if err == nil {
			q.packets <- p[:n]
			_, err = unix.Write(q.pipe[1], []byte{0}) // EPIPE: closed
		}
		if err != nil {
			q.mu.Lock()
			q.err = asClosed(err)
			q.mu.Unlock()
			return
		}
	}
}

// close is called once, after the file was closed.
func (q *waterQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	close(q.free)
	_ = unix.Close(q.pipe[0])
}

func (q *waterQueue) FD() int { return q.pipe[0] }

func (q *waterQueue) Read(_ *Scratch, batch []*packet.Buffer) (n int, err error) {
	q.mu.RLock()
	defer q.mu.RUnlock()
	if q.closed {
		return 0, os.ErrClosed
	}
	var ready [waterQueueLen]byte
	got, err := unix.Read(q.pipe[0], ready[:min(len(ready), len(batch))])
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return 0, nil
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case got == 0 && len(batch) > 0: // the goroutine has ended
		return 0, q.err
	}
	for _, b := range batch[:got] {
		p := <-q.packets
		b.SetLen(copy(b.Space(), p))
		q.free <- p
	}
	return got, nil
}

func (q *waterQueue) Write(s *Scratch, batch []*packet.Buffer) (n int, err error) {
	for _, b := range batch {
		if e := q.writeOne(s, b); errors.Is(e, os.ErrClosed) {
			return n, os.ErrClosed
		} else if e != nil {
			err = e
		} else {
			n++
		}
	}
	return n, err
}

// writeOne does the segmentation and the checksum of a packet here.
func (q *waterQueue) writeOne(s *Scratch, b *packet.Buffer) error {
	p := b.Bytes()
	if b.SegmentSize != 0 {
		if !s.outgoing.start(p, int(b.SegmentSize)) {
			return errNotSplittable
		}
		for s.outgoing.more() {
			if _, err := q.file.Write(s.segment()); err != nil {
				return asClosed(err)
			}
		}
		return nil
	}
	if b.Checksum == packet.ChecksumPartial {
		if t, ok := parseTransport(p); ok {
			t.putChecksum(p)
		}
	}
	_, err := q.file.Write(p)
	return asClosed(err)
}

// asClosed converts the errors of reading or writing after Close to os.ErrClosed.
func asClosed(err error) error {
	if errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
		return os.ErrClosed
	}
	return err
}
