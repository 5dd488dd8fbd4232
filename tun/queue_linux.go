package tun

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/packet"
)

// queue is one file descriptor of a device with IFF_VNET_HDR.
type queue struct {
	device *device
	reader reader
	writer writer
}

func newQueue(d *device, fd, mtu int, o offload) *queue {
	q := &queue{device: d}
	q.reader = reader{fd: fd, poller: d.guard.Poller(fd), direct: min(mtu, packet.MaxSize)}
	q.writer = writer{fd: fd, coalescer: coalescer{uso: o.uso}}
	return q
}

func (q *queue) Read(batch []*packet.Buffer) (n int, err error) {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return 0, os.ErrClosed
	}
	return q.reader.read(q.device, batch, true)
}

func (q *queue) TryRead(batch []*packet.Buffer) (n int, err error) {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return 0, os.ErrClosed
	}
	return q.reader.read(q.device, batch, false)
}

func (q *queue) Control(f func(fd int) error) error {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return os.ErrClosed
	}
	return f(q.reader.fd)
}

func (q *queue) Write(batch []*packet.Buffer) (n int, err error) {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return 0, os.ErrClosed
	}
	return q.writer.write(batch)
}

// maxInvalid is how many packets in a row the kernel may have no vnetHeader for,
// which it then throws away (EINVAL), before the queue is taken to have failed.
const maxInvalid = 1000

// reader is a queue's way in. One goroutine at a time uses it.
//
// A packet is read into its Buffer, but only its first direct bytes; what
// follows goes to where it would stand in scratch. So an ordinary packet is not
// copied at all, and a superpacket, which has to be cut up and so copied, is whole
// in scratch after its small first part has been put there too.
type reader struct {
	fd      int
	poller  fdguard.Poller
	direct  int // the largest packet expected that is no superpacket, in bytes
	vnetHdr [vnetHeaderLen]byte
	iov     [3]unix.Iovec
	// segments are those of the superpacket in scratch that are not out yet.
	segments splitter
	scratch  [packet.MaxSize + 1]byte
}

func (r *reader) read(d *device, batch []*packet.Buffer, wait bool) (n int, err error) {
	gone, bad := false, 0
	for n < len(batch) {
		if r.segments.more() {
			n = r.nextSegments(batch, n)
			continue
		}
		got, errno := r.readOne(batch[n])
		switch {
		case errno == 0:
			if got {
				n++
			}
		case errno == unix.EINTR:
		case n > 0:
			return n, nil
		case d.guard.Closed():
			return 0, os.ErrClosed
		case errno == unix.EAGAIN && !wait:
			return 0, nil
		case errno == unix.EAGAIN && !gone:
			gone = r.poller.PollSpin()
		case errno == unix.EINVAL && bad < maxInvalid:
			bad++
		default:
			return 0, fmt.Errorf("interface %s is gone: %w", d.Name(), os.NewSyscallError("readv", errno))
		}
	}
	return n, nil
}

// nextSegments fills batch from n on with what is left of a superpacket, and
// returns how far.
func (r *reader) nextSegments(batch []*packet.Buffer, n int) int {
	for n < len(batch) && r.segments.more() {
		b := batch[n]
		b.SetLen(r.segments.segment(b.Space()))
		b.Checksum = packet.ChecksumValid
		n++
	}
	return n
}

// one reads one packet. got says that it is in b; if it is a superpacket, it is
// in segments instead.
func (r *reader) readOne(b *packet.Buffer) (got bool, errno unix.Errno) {
	head, first, rest := r.buffers(b)
	setIovec(&r.iov[0], head)
	setIovec(&r.iov[1], first)
	setIovec(&r.iov[2], rest)
	n, errno := readv(r.fd, r.iov[:])
	if errno != 0 {
		return false, errno
	}
	return r.finish(b, n-vnetHeaderLen), 0
}

// parts are where the next packet is read to.
func (r *reader) buffers(b *packet.Buffer) (head, first, rest []byte) {
	space := b.Space()
	direct := min(r.direct, len(space))
	return r.vnetHdr[:], space[:direct], r.scratch[direct:]
}

// take is one for the n bytes of a packet that are in parts(b).
func (r *reader) finish(b *packet.Buffer, n int) (got bool) {
	if n <= 0 {
		return false
	}
	space := b.Space()
	direct := min(r.direct, len(space))
	var h vnetHeader
	h.decode(&r.vnetHdr)
	switch h.gsoType &^ vnetECN {
	case vnetTCPv4, vnetUDP:
		copy(r.scratch[:], space[:min(n, direct)])
		if r.segments.start(r.scratch[:n], int(h.gsoSize)) {
			return false
		}
		// Not IPv4. It goes on as it is, to be counted as that.
	case vnetNone:
		if n > direct { // the MTU was raised
			r.direct = min(n, packet.MaxSize)
		}
	}
	if n > direct {
		// What does not fit is lost: the packet tells a length that is not there.
		n = direct + copy(space[direct:], r.scratch[direct:n])
	}
	b.SetLen(n)
	switch {
	case h.flags&vnetNeedsChecksum != 0:
		if h.gsoType == vnetNone && finishChecksum(b.Bytes(), int(h.csumStart), int(h.csumOffset)) {
			b.Checksum = packet.ChecksumValid
		}
	case h.flags&vnetDataValid != 0:
		b.Checksum = packet.ChecksumValid
	}
	return true
}

// writer is a queue's way out. Its lock is taken once for a batch.
type writer struct {
	mu        sync.Mutex
	fd        int
	coalescer coalescer
	vnetHdr   [vnetHeaderLen]byte
	iov       [1 + maxTCPSegments]unix.Iovec
	// segments and scratch are for superpackets that the kernel does not take.
	segments splitter
	scratch  [packet.MaxSize]byte
}

func (w *writer) write(batch []*packet.Buffer) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.coalescer.plan(batch)
	var last unix.Errno // made an error once, not for each packet
	for i := range w.coalescer.outputs {
		o := &w.coalescer.outputs[i]
		var errno unix.Errno
		switch super := batch[o.head].SegmentSize != 0; {
		case super && o.transport.payload == 0:
			err = errNotSplittable
			continue
		case super && o.transport.protocol == protocolUDP && !w.coalescer.uso:
			errno = w.writeSegments(batch[o.head])
		default:
			errno = w.writeOutput(batch, o)
		}
		if errno != 0 {
			last = errno
			continue
		}
		n += int(o.count)
	}
	if last != 0 {
		err = os.NewSyscallError("writev", last)
	}
	return n, err
}

// output writes one output: its head with all its headers, and the payloads of
// the others behind that.
func (w *writer) writeOutput(batch []*packet.Buffer, o *output) unix.Errno {
	h := w.coalescer.header(batch, o)
	h.encode(&w.vnetHdr)
	setIovec(&w.iov[0], w.vnetHdr[:])
	setIovec(&w.iov[1], batch[o.head].Bytes())
	parts := 2
	for i := w.coalescer.next[o.head]; i != none; i = w.coalescer.next[i] {
		setIovec(&w.iov[parts], batch[i].Bytes()[o.transport.payload:])
		parts++
	}
	return w.writev(parts)
}

// split writes the segments of a superpacket one by one.
func (w *writer) writeSegments(b *packet.Buffer) (errno unix.Errno) {
	w.vnetHdr = [vnetHeaderLen]byte{}
	setIovec(&w.iov[0], w.vnetHdr[:])
	if !w.segments.start(b.Bytes(), int(b.SegmentSize)) {
		return unix.EINVAL
	}
	for w.segments.more() {
		setIovec(&w.iov[1], w.scratch[:w.segments.segment(w.scratch[:])])
		if e := w.writev(2); e != 0 {
			errno = e
		}
	}
	return errno
}

func (w *writer) writev(parts int) unix.Errno {
	for {
		if errno := writev(w.fd, w.iov[:parts]); errno != unix.EINTR {
			return errno
		}
	}
}
