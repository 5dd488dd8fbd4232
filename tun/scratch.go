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

// Pending reports that the last Read has left segments of a superpacket. The next Read with this
// Scratch must be of the same Queue, and returns them first.
func (s *Scratch) Pending() bool { return s.segments.more() }

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
