package tun

import (
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

// Scratch is the memory with which any number of Queues are read and written, by one goroutine at a
// time. The zero value is ready for use; what is large is allocated when first needed.
type Scratch struct {
	// segments are those not yet read of the superpacket in read.
	segments splitter
	read     []byte
	// outgoing and write are for superpackets that are written as segments.
	outgoing  splitter
	write     []byte
	coalescer coalescer
	vnetHdr   [vnet.HeaderLen]byte
	iovecs    iovecs
}

// Pending reports that the last Read has left segments of a superpacket. Before this Scratch is used
// for another Queue they must be taken, by Read, which returns them first, by Segments or by Discard.
func (s *Scratch) Pending() bool { return s.segments.more() }

// Segments fills batch[:n] with pending segments.
func (s *Scratch) Segments(batch []*packet.Buffer) (n int) {
	for n < len(batch) && s.Pending() {
		b := batch[n]
		b.SetLen(s.segments.segment(b.Space()))
		b.Checksum = packet.ChecksumValid
		n++
	}
	return n
}

// Discard drops what is Pending.
func (s *Scratch) Discard() { s.segments = splitter{} }

// readSpace is where a superpacket is read to.
func (s *Scratch) readSpace() []byte {
	if s.read == nil {
		s.read = make([]byte, packet.MaxSize+1)
	}
	return s.read
}

// segment returns the next of the outgoing segments, valid until the next call.
func (s *Scratch) segment() []byte {
	if s.write == nil {
		s.write = make([]byte, packet.MaxSize)
	}
	return s.write[:s.outgoing.segment(s.write)]
}
