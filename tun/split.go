package tun

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
)

// splitter splits a superpacket into its segments, one at a time, like the kernel's GSO
// (inet_gso_segment, tcp_gso_segment, __udp_gso_segment):
//
//   - the IP ID increases by one per segment;
//   - the TCP sequence number increases by the payload length;
//   - CWR is on the first segment only (RFC 3168, section 6.1.2), FIN and PSH on
//     the last only;
//   - TOS (DSCP and ECN), DF, TTL and options are copied.
//
// It keeps a reference to the superpacket until the last segment, and never writes to it.
type splitter struct {
	p         []byte
	transport transport
	gsoSize   int // payload of each segment but the last
	next      int // offset in p of the next segment's payload
	id        uint16
}

// start begins splitting p; size is the payload of each segment in bytes. It returns false
// if p is not well-formed TCP or UDP in IPv4, or has no payload.
func (s *splitter) start(p []byte, size int) bool {
	t, ok := parseTransport(p)
	if !ok || size <= 0 {
		return false
	}
	*s = splitter{p: p, transport: t, gsoSize: size, next: t.Payload, id: binary.BigEndian.Uint16(p[ipv4.OffID:])}
	return t.Payload < len(p)
}

// more reports whether segments are left.
func (s *splitter) more() bool { return s.next < len(s.p) }

// segment writes the next segment, with complete checksums, to dst and returns its length.
// A segment larger than dst is truncated: its total length then exceeds the bytes written,
// so that the data path drops it as malformed.
func (s *splitter) segment(dst []byte) int {
	t := &s.transport
	first, end := s.next == t.Payload, min(s.next+s.gsoSize, len(s.p))
	length := t.Payload + end - s.next
	if length > len(dst) {
		n := copy(dst, s.p)
		s.next, s.id = end, s.id+1
		return n
	}
	dst = dst[:length]
	copy(dst, s.p[:t.Payload])
	copy(dst[t.Payload:], s.p[s.next:end])

	binary.BigEndian.PutUint16(dst[ipv4.OffID:], s.id)
	if t.Protocol == ipv4.ProtocolTCP {
		seq := binary.BigEndian.Uint32(s.p[t.Start+ipv4.OffTCPSeq:]) + uint32(s.next-t.Payload)
		binary.BigEndian.PutUint32(dst[t.Start+ipv4.OffTCPSeq:], seq)
		if !first {
			dst[t.Start+ipv4.OffTCPFlags] &^= ipv4.TCPFlagCWR
		}
		if end < len(s.p) {
			dst[t.Start+ipv4.OffTCPFlags] &^= ipv4.TCPFlagFIN | ipv4.TCPFlagPSH
		}
	}
	t.putLengths(dst, length)
	t.putChecksum(dst)
	s.next, s.id = end, s.id+1
	return length
}
