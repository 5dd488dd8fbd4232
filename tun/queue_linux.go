package tun

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

// queue is one file descriptor of a device with IFF_VNET_HDR.
//
// readv puts the first direct bytes of a packet into the Buffer and the rest at the same
// offset of the Scratch, so that an ordinary packet is never copied. A superpacket becomes
// contiguous in the Scratch by copying those first bytes there.
type queue struct {
	device *device
	fd     int
	uso    bool // the kernel accepts UDP superpackets
	direct int  // the largest packet read that is no superpacket, at least the MTU; in bytes
}

// maxInvalid is how many reads in a row may fail with EINVAL before the queue is considered
// failed. With EINVAL the kernel drops a packet that virtio_net_hdr cannot describe.
const maxInvalid = 1000

func (q *queue) FD() int { return q.fd }

func (q *queue) Read(s *Scratch, batch []*packet.Buffer) (n int, err error) {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return 0, os.ErrClosed
	}
	for invalid := 0; n < len(batch); {
		if s.Pending() {
			n += s.Segments(batch[n:])
			continue
		}
		got, errno := q.readOne(s, batch[n])
		switch {
		case errno == 0:
			if got {
				n++
			}
		case errno == unix.EINTR:
		case n > 0:
			return n, nil
		case errno == unix.EAGAIN:
			return 0, nil
		case errno == unix.EINVAL && invalid < maxInvalid:
			invalid++
		default:
			return 0, fmt.Errorf("interface %s is gone: %w", q.device.Name(), os.NewSyscallError("readv", errno))
		}
	}
	return n, nil
}

// readOne reads one packet. got reports that it is in b; a superpacket's segments are pending
// instead.
func (q *queue) readOne(s *Scratch, b *packet.Buffer) (got bool, errno unix.Errno) {
	head, first, rest := q.readBuffers(s, b)
	setIovec(&s.iovecs[0], head)
	setIovec(&s.iovecs[1], first)
	setIovec(&s.iovecs[2], rest)
	n, errno := readv(q.fd, s.iovecs[:3])
	if errno != 0 {
		return false, errno
	}
	return q.finish(s, b, n-vnet.HeaderLen), 0
}

// readBuffers returns the memory that readv fills, in order.
func (q *queue) readBuffers(s *Scratch, b *packet.Buffer) (head, first, rest []byte) {
	space := b.Space()
	direct := min(q.direct, len(space))
	return s.vnetHdr[:], space[:direct], s.readSpace()[direct:]
}

// finish is readOne after readv: n bytes of packet are in readBuffers(s, b), after the vnet.Header.
func (q *queue) finish(s *Scratch, b *packet.Buffer, n int) (got bool) {
	if n <= 0 {
		return false
	}
	space := b.Space()
	direct := min(q.direct, len(space))
	h := vnet.Decode(&s.vnetHdr)
	switch h.GSOType &^ vnet.GSOECN {
	case vnet.GSOTCPv4, vnet.GSOUDP:
		copy(s.read, space[:min(n, direct)])
		if s.segments.start(s.read[:n], int(h.GSOSize)) {
			return false
		}
		s.Discard()
		// Not splittable: passed on as it is, for the data path to count.
	case vnet.GSONone:
		if n > direct { // the MTU was raised
			q.direct = min(n, packet.MaxSize)
		}
	}
	if n > direct {
		// A packet larger than the Buffer is truncated; see Queue.Read.
		n = direct + copy(space[direct:], s.read[direct:n])
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

func (q *queue) Write(s *Scratch, batch []*packet.Buffer) (n int, err error) {
	defer q.device.guard.Release()
	if !q.device.guard.Acquire() {
		return 0, os.ErrClosed
	}
	c := &s.coalescer
	c.uso = q.uso
	c.plan(batch)
	var last unix.Errno // converted to an error, which allocates, only once
	for i := range c.outputs {
		o := &c.outputs[i]
		var errno unix.Errno
		switch super := batch[o.head].SegmentSize != 0; {
		case super && o.transport.Payload == 0:
			err = errNotSplittable
			continue
		case super && o.transport.Protocol == ipv4.ProtocolUDP && !q.uso:
			errno = q.writeSegments(s, batch[o.head])
		default:
			errno = q.writeOutput(s, batch, o)
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
func (q *queue) writeOutput(s *Scratch, batch []*packet.Buffer, o *output) unix.Errno {
	c, iov := &s.coalescer, &s.iovecs
	h := c.header(batch, o)
	h.Encode(&s.vnetHdr)
	setIovec(&iov[0], s.vnetHdr[:])
	setIovec(&iov[1], batch[o.head].Bytes())
	iovs := 2
	for i := c.next[o.head]; i != none; i = c.next[i] {
		setIovec(&iov[iovs], batch[i].Bytes()[o.transport.Payload:])
		iovs++
	}
	return q.writev(iov[:iovs])
}

// writeSegments splits a superpacket and writes each segment. errno is the last error.
func (q *queue) writeSegments(s *Scratch, b *packet.Buffer) (errno unix.Errno) {
	s.vnetHdr = [vnet.HeaderLen]byte{}
	setIovec(&s.iovecs[0], s.vnetHdr[:])
	if !s.outgoing.start(b.Bytes(), int(b.SegmentSize)) {
		return unix.EINVAL
	}
	for s.outgoing.more() {
		setIovec(&s.iovecs[1], s.segment())
		if e := q.writev(s.iovecs[:2]); e != 0 {
			errno = e
		}
	}
	return errno
}

func (q *queue) writev(iov []unix.Iovec) unix.Errno {
	for {
		if errno := writev(q.fd, iov); errno != unix.EINTR {
			return errno
		}
	}
}
