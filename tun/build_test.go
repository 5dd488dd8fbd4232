package tun

import (
	"encoding/binary"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

// spec describes a TCP or UDP packet for build. The zero value is a UDP datagram without
// payload; with tcp set, a TCP segment.
type spec struct {
	tcp      bool
	flow     byte // last byte of the source address
	to       byte // and of the destination
	ports    [2]uint16
	tos      byte
	id       uint16
	df       bool
	ttl      byte // 0 stands for 64
	seq, ack uint32
	flags    byte // 0 stands for ACK
	window   uint16
	options  []byte // TCP options
	ipOption []byte
	payload  []byte
	// partial: a partial checksum, the pseudo-header's sum.
	partial bool
}

var (
	hostA = [4]byte{10, 9, 0, 2}
	hostB = [4]byte{10, 9, 0, 1}
)

const (
	portA = 5201
	portB = 40000
)

// build returns the packet. It fills the buffer with 0xa5 first, so that a byte not written
// shows, and computes the checksums without the code under test.
func (s spec) build() []byte {
	header := ipv4.TCPHeaderLen + len(s.options)
	protocol := byte(ipv4.ProtocolTCP)
	if !s.tcp {
		header, protocol = ipv4.UDPHeaderLen, ipv4.ProtocolUDP
	}
	start := ipv4.HeaderLen + len(s.ipOption)
	p := make([]byte, start+header+len(s.payload))
	for i := range p {
		p[i] = 0xa5
	}
	if s.ttl == 0 {
		s.ttl = 64
	}
	source, destination := hostA, hostB
	source[3] += s.flow
	destination[3] += s.to
	h := ipv4.Header{TOS: s.tos, TotalLen: len(p), ID: s.id, DF: s.df, TTL: s.ttl, Protocol: protocol,
		Source: source, Destination: destination}
	h.PutOptions(p, s.ipOption)
	t := p[start:]
	binary.BigEndian.PutUint16(t, portA+s.ports[0])
	binary.BigEndian.PutUint16(t[2:], portB+s.ports[1])
	at := ipv4.OffUDPChecksum
	if s.tcp {
		at = ipv4.OffTCPChecksum
		if s.flags == 0 {
			s.flags = ipv4.TCPFlagACK
		}
		binary.BigEndian.PutUint32(t[ipv4.OffTCPSeq:], s.seq)
		binary.BigEndian.PutUint32(t[ipv4.OffTCPAck:], s.ack)
		t[ipv4.OffTCPDataOffset] = byte(header/4) << 4
		t[ipv4.OffTCPFlags] = s.flags
		binary.BigEndian.PutUint16(t[ipv4.OffTCPWindow:], s.window)
		binary.BigEndian.PutUint16(t[ipv4.OffTCPUrgent:], 0)
		copy(t[ipv4.TCPHeaderLen:], s.options)
	} else {
		binary.BigEndian.PutUint16(t[ipv4.OffUDPLength:], uint16(len(t)))
	}
	copy(t[header:], s.payload)
	binary.BigEndian.PutUint16(t[at:], 0)
	sum := slowPseudo(p, start)
	if !s.partial {
		sum = ^slowSum(sum, t)
		if sum == 0 && !s.tcp {
			sum = 0xffff
		}
	}
	binary.BigEndian.PutUint16(t[at:], sum)
	return p
}

// slowPseudo returns the sum of the pseudo-header of p, whose TCP or UDP header is at start.
func slowPseudo(p []byte, start int) uint16 {
	pseudo := append([]byte(nil), p[12:20]...)
	pseudo = append(pseudo, 0, p[9])
	return slowSum(0, binary.BigEndian.AppendUint16(pseudo, uint16(len(p)-start)))
}

// slowSum returns the one's complement sum of sum and b, word by word (RFC 1071).
func slowSum(sum uint16, b []byte) uint16 {
	for i := 0; i < len(b); i += 2 {
		word := uint16(b[i]) << 8
		if i+1 < len(b) {
			word |= uint16(b[i+1])
		}
		next := sum + word
		if next < sum {
			next++
		}
		sum = next
	}
	return sum
}

// slowValid reports whether the total length and the checksums of p are correct.
func slowValid(p []byte) bool {
	start := int(p[0]&15) * 4
	if int(binary.BigEndian.Uint16(p[2:])) != len(p) || slowSum(0, p[:start]) != 0xffff {
		return false
	}
	return slowSum(slowPseudo(p, start), p[start:]) == 0xffff
}

// patternBytes returns n bytes of a non-repeating pattern, from offset from on.
func patternBytes(n, from int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte((from+i)*7 + (from+i)>>8)
	}
	return b
}

// buffers returns a batch with copies of packets.
func buffers(packets ...[]byte) []*packet.Buffer {
	batch := make([]*packet.Buffer, len(packets))
	for i, p := range packets {
		batch[i] = packet.New(len(p))
		batch[i].Set(p)
	}
	return batch
}

// written is one write to the kernel: the vnet.Header and the packet behind it.
type written struct {
	header  vnet.Header
	bytes   []byte
	packets []int // indexes in the batch
}

// writeAll returns the writes that c makes of batch.
func writeAll(t testing.TB, c *coalescer, batch []*packet.Buffer) (out []written) {
	t.Helper()
	c.plan(batch)
	for i := range c.outputs {
		o := &c.outputs[i]
		w := written{header: c.header(batch, o), packets: []int{int(o.head)}}
		w.bytes = append(w.bytes, batch[o.head].Bytes()...)
		for j := c.next[o.head]; j != none; j = c.next[j] {
			w.bytes = append(w.bytes, batch[j].Bytes()[o.transport.Payload:]...)
			w.packets = append(w.packets, int(j))
		}
		if len(w.packets) != int(o.count) || len(w.bytes) != o.length {
			t.Fatalf("output %d: %d packets, %d bytes; want %d, %d", i, len(w.packets), len(w.bytes), o.count, o.length)
		}
		out = append(out, w)
	}
	return out
}

// splitAll returns the segments of a superpacket.
func splitAll(t testing.TB, p []byte, size int) (segments [][]byte) {
	t.Helper()
	var s splitter
	if !s.start(p, size) {
		t.Fatalf("not split: %x", p[:min(len(p), 64)])
	}
	for s.more() {
		dst := make([]byte, s.transport.Payload+size)
		for i := range dst {
			dst[i] = 0xa5
		}
		segments = append(segments, dst[:s.segment(dst)])
	}
	return segments
}
