package tun

import "ipipd/internal/packet"

// splitScratch is the part of a Scratch for superpackets that are split.
type splitScratch struct {
	// segments has the segments, not yet returned, of the superpacket that was read last.
	segments splitter
	// outgoing and write are for superpackets that are written as segments.
	outgoing splitter
	write    []byte
}

// Pending reports that the last Read has left segments of a superpacket. Before this Scratch is used
// for another Queue they must be taken, by Read, which returns them first, by Segments or by Discard.
func (s *splitScratch) Pending() bool { return s.segments.more() }

// Segments fills batch[:n] with pending segments.
func (s *splitScratch) Segments(batch []*packet.Buffer) (n int) {
	for n < len(batch) && s.Pending() {
		b := batch[n]
		b.SetLen(s.segments.segment(b.Space()))
		b.Checksum = packet.ChecksumValid
		n++
	}
	return n
}

// Discard drops what is Pending.
func (s *splitScratch) Discard() { s.segments = splitter{} }

// segment returns the next of the outgoing segments, valid until the next call.
func (s *splitScratch) segment() []byte {
	if s.write == nil {
		s.write = make([]byte, packet.MaxSize)
	}
	return s.write[:s.outgoing.segment(s.write)]
}
