package tun

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
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

// maxInvalid is how many reads in a row may fail with EINVAL before the queue is considered
// failed. With EINVAL the kernel drops a packet that virtio_net_hdr cannot describe.
const maxInvalid = 1000

// reader is the receive half of a queue. One goroutine at a time uses it.
//
// readv puts the first direct bytes of a packet into the Buffer and the rest at the same
// offset of scratch, so that an ordinary packet is never copied. A superpacket becomes
// contiguous in scratch by copying those first bytes there.
type reader struct {
	fd      int
	poller  fdguard.Poller
	direct  int // the largest packet seen that is no superpacket, at least the MTU; in bytes
	vnetHdr [vnet.HeaderLen]byte
	iov     [3]unix.Iovec
	// segments has the remaining segments of the superpacket in scratch.
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

// nextSegments fills batch[n:] with remaining segments, and returns the new n.
func (r *reader) nextSegments(batch []*packet.Buffer, n int) int {
	for n < len(batch) && r.segments.more() {
		b := batch[n]
		b.SetLen(r.segments.segment(b.Space()))
		b.Checksum = packet.ChecksumValid
		n++
	}
	return n
}

// readOne reads one packet. got reports that it is in b; a superpacket goes into r.segments
// instead.
func (r *reader) readOne(b *packet.Buffer) (got bool, errno unix.Errno) {
	head, first, rest := r.buffers(b)
	setIovec(&r.iov[0], head)
	setIovec(&r.iov[1], first)
	setIovec(&r.iov[2], rest)
	n, errno := readv(r.fd, r.iov[:])
	if errno != 0 {
		return false, errno
	}
	return r.finish(b, n-vnet.HeaderLen), 0
}

// buffers returns the memory that readv fills, in order.
func (r *reader) buffers(b *packet.Buffer) (head, first, rest []byte) {
	space := b.Space()
	direct := min(r.direct, len(space))
	return r.vnetHdr[:], space[:direct], r.scratch[direct:]
}

// finish is readOne after readv: n bytes of packet are in buffers(b), after the vnet.Header.
func (r *reader) finish(b *packet.Buffer, n int) (got bool) {
	if n <= 0 {
		return false
	}
	space := b.Space()
	direct := min(r.direct, len(space))
	h := vnet.Decode(&r.vnetHdr)
	switch h.GSOType &^ vnet.GSOECN {
	case vnet.GSOTCPv4, vnet.GSOUDP:
		copy(r.scratch[:], space[:min(n, direct)])
		if r.segments.start(r.scratch[:n], int(h.GSOSize)) {
			return false
		}
		// Not splittable: passed on as it is, for the data path to count.
	case vnet.GSONone:
		if n > direct { // the MTU was raised
			r.direct = min(n, packet.MaxSize)
		}
	}
	if n > direct {
		// A packet larger than the Buffer is truncated; see Queue.Read.
		n = direct + copy(space[direct:], r.scratch[direct:n])
	}
	b.SetLen(n)
	switch {
	case h.Flags&vnet.NeedsChecksum != 0:
		if h.GSOType == vnet.GSONone && ipv4.CompleteChecksum(b.Bytes(), int(h.CsumStart), int(h.CsumOffset)) {
			b.Checksum = packet.ChecksumValid
		}
	case h.Flags&vnet.DataValid != 0:
		b.Checksum = packet.ChecksumValid
	}
	return true
}

// writer is the transmit half of a queue.
type writer struct {
	mu        sync.Mutex // held for a whole batch
	fd        int
	coalescer coalescer
	vnetHdr   [vnet.HeaderLen]byte
	iov       [1 + maxTCPSegments]unix.Iovec
	// segments and scratch are for UDP superpackets if the kernel has no working USO.
	segments splitter
	scratch  [packet.MaxSize]byte
}

func (w *writer) write(batch []*packet.Buffer) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.coalescer.plan(batch)
	var last unix.Errno // converted to an error, which allocates, only once
	for i := range w.coalescer.outputs {
		o := &w.coalescer.outputs[i]
		var errno unix.Errno
		switch super := batch[o.head].SegmentSize != 0; {
		case super && o.transport.Payload == 0:
			err = errNotSplittable
			continue
		case super && o.transport.Protocol == ipv4.ProtocolUDP && !w.coalescer.uso:
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

// writeOutput writes one output: the head, then the payloads of the other packets.
func (w *writer) writeOutput(batch []*packet.Buffer, o *output) unix.Errno {
	h := w.coalescer.header(batch, o)
	h.Encode(&w.vnetHdr)
	setIovec(&w.iov[0], w.vnetHdr[:])
	setIovec(&w.iov[1], batch[o.head].Bytes())
	iovs := 2
	for i := w.coalescer.next[o.head]; i != none; i = w.coalescer.next[i] {
		setIovec(&w.iov[iovs], batch[i].Bytes()[o.transport.Payload:])
		iovs++
	}
	return w.writev(iovs)
}

// writeSegments splits a superpacket and writes each segment. errno is the last error.
func (w *writer) writeSegments(b *packet.Buffer) (errno unix.Errno) {
	w.vnetHdr = [vnet.HeaderLen]byte{}
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

func (w *writer) writev(n int) unix.Errno {
	for {
		if errno := writev(w.fd, w.iov[:n]); errno != unix.EINTR {
			return errno
		}
	}
}
