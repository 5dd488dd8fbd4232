package capture

import (
	"fmt"
	"io"
	"time"

	"ipipd/internal/drop"
)

// flushBytes is how many bytes are gathered before they are written.
const flushBytes = 64 << 10

// Header is what a file says before its packets.
type Header struct {
	// Program and Comment are about the file.
	Program, Comment string
	// Tunnel is the name of the tunnel, Description its properties.
	Tunnel, Description string
	Names               []Name
}

// Result counts the packets of a capture.
type Result struct {
	Packets uint64 // written
	Missed  uint64 // not written: there was no room, or too many belong to no tunnel
}

// Stream writes what is in a Ring as a pcapng file. One goroutine uses it.
type Stream struct {
	ring     *Ring
	w        io.Writer
	out      blocks
	start    int64
	packets  uint64 // written
	bytes    uint64 // of the file
	noTunnel bool   // noTunnelInterface is in the file
	written  [interfaces]uint64
	told     [interfaces]uint64 // missed packets that are in an epb_dropcount
}

// NewStream returns the Stream of a Ring, and writes what comes before the packets.
func NewStream(w io.Writer, r *Ring, h Header, now time.Time) (*Stream, error) {
	s := &Stream{ring: r, w: w, start: now.UnixNano()}
	s.out.section(h.Program, h.Comment)
	s.out.iface(h.Tunnel+" (inner)", h.Description, r.options.Snaplen)
	s.out.iface(h.Tunnel+" (outer)", h.Description, r.options.Snaplen)
	s.out.names(h.Names)
	return s, s.flush()
}

// Copy takes packets out of the ring and writes them. n is how many slots it took; more: there may be more.
func (s *Stream) Copy() (n int, more bool, err error) {
	for len(s.out) < flushBytes && n < ringSlots && !s.Full() {
		slot := s.ring.next()
		if slot == nil {
			return n, false, s.flush()
		}
		if !slot.discard {
			s.add(&slot.record)
		}
		s.ring.release(slot)
		n++
	}
	return n, !s.Full(), s.flush()
}

// Lost writes a record that n packets were dropped, of which nothing but the reason is known.
func (s *Stream) Lost(why drop.Reason, n uint64, at time.Time) error {
	s.add(&record{at: at.UnixNano(), where: pointOf(why), why: why, lost: uint32(n)})
	return s.flush()
}

// Full reports whether Options.Count is reached.
func (s *Stream) Full() bool {
	return s.ring.options.Count > 0 && s.packets >= s.ring.options.Count
}

func (s *Stream) add(r *record) {
	iface := r.where.iface()
	s.need(iface)
	var missed uint64
	if r.missed > s.told[iface] {
		missed, s.told[iface] = r.missed-s.told[iface], r.missed
	}
	s.out.packet(uint32(iface), r, comment(r), missed)
	s.written[iface]++
	s.packets++
}

// need adds noTunnelInterface to the file when it is first used.
func (s *Stream) need(iface int) {
	if iface == noTunnelInterface && !s.noTunnel {
		s.noTunnel = true
		s.out.iface("no tunnel (outer)", "packets that belong to no tunnel of the process", s.ring.options.Snaplen)
	}
}

// comment returns the comment of a packet; "" if it was not dropped.
func comment(r *record) string {
	if r.why == drop.None {
		return ""
	}
	text := r.why.Error() + "; remedy: " + r.why.Remedy()
	switch {
	case r.lost == 1:
		return "1 packet " + text
	case r.lost > 1:
		return fmt.Sprintf("%d packets %s", r.lost, text)
	}
	return text
}

// End writes what is left in the ring, and the statistics. No packet may be put into the ring any more.
func (s *Stream) End(now time.Time) (Result, error) {
	var err error
	for more := true; more && err == nil; {
		_, more, err = s.Copy()
	}
	result := Result{Packets: s.packets}
	for iface, written := range s.written {
		missed, comment := s.ring.missed[iface].Load(), ""
		result.Missed += missed
		if iface == noTunnelInterface && written+missed == 0 {
			continue
		}
		switch {
		case missed > 0 && iface == noTunnelInterface:
			comment = fmt.Sprintf("%d packets were not written: more than %d in a second, or the capture was too slow", missed, strangersPerSecond)
		case missed > 0:
			comment = fmt.Sprintf("%d packets were not written: the reader was too slow, or the capture was not to slow the tunnel", missed)
		}
		s.need(iface)
		s.out.statistics(uint32(iface), comment, s.start, now.UnixNano(), written, missed)
	}
	if err == nil {
		err = s.flush()
	}
	return result, err
}

func (s *Stream) flush() error {
	if len(s.out) == 0 {
		return nil
	}
	_, err := s.w.Write(s.out)
	s.bytes += uint64(len(s.out))
	s.out = s.out[:0]
	return err
}
