package tun

import "encoding/binary"

// splitter cuts a superpacket into the segments it stands for, one at a time, as
// the kernel's TCP and UDP segmentation does (inet_gso_segment, tcp_gso_segment,
// __udp_gso_segment):
//
//   - the IP ID counts up by one from segment to segment;
//   - the TCP sequence number goes on by the payload before it;
//   - CWR is on the first segment only (RFC 3168, section 6.1.2), FIN and PSH on
//     the last only;
//   - TOS with its ECN mark, DF, TTL and options are those of the superpacket.
//
// It reads the superpacket until the last segment is out, and never writes to it.
type splitter struct {
	p         []byte
	transport transport
	size      int // payload of each segment but the last
	next      int // where in p the next segment's payload starts
	id        uint16
}

// start makes p the superpacket. It is false if p is nothing that can be split:
// not IPv4, not TCP or UDP, or with headers that do not fit its length.
func (s *splitter) start(p []byte, size int) bool {
	t, ok := parseTransport(p)
	if !ok || size <= 0 {
		return false
	}
	*s = splitter{p: p, transport: t, size: size, next: t.payload, id: binary.BigEndian.Uint16(p[ipID:])}
	// A segment without payload is still one.
	return t.payload < len(p)
}

// more reports whether segments are left.
func (s *splitter) more() bool { return s.next < len(s.p) }

// segment writes the next segment to dst, checksums included, and returns its
// length. Of a segment that dst has no room for it writes what fits: then its
// header tells more than is there, and whoever reads it will refuse it.
func (s *splitter) segment(dst []byte) int {
	t := &s.transport
	first, end := s.next == t.payload, min(s.next+s.size, len(s.p))
	length := t.payload + end - s.next
	if length > len(dst) {
		n := copy(dst, s.p)
		s.next, s.id = end, s.id+1
		return n
	}
	dst = dst[:length]
	copy(dst, s.p[:t.payload])
	copy(dst[t.payload:], s.p[s.next:end])

	binary.BigEndian.PutUint16(dst[ipID:], s.id)
	if t.protocol == protocolTCP {
		seq := binary.BigEndian.Uint32(s.p[t.start+tcpSeq:]) + uint32(s.next-t.payload)
		binary.BigEndian.PutUint32(dst[t.start+tcpSeq:], seq)
		if !first {
			dst[t.start+tcpFlags] &^= flagCWR
		}
		if end < len(s.p) {
			dst[t.start+tcpFlags] &^= flagFIN | flagPSH
		}
	}
	t.putLengths(dst, length)
	t.putChecksum(dst)
	s.next, s.id = end, s.id+1
	return length
}
