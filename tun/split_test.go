package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
)

var timestamps = []byte{1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4}

func TestSplitter_golden(t *testing.T) {
	super := []byte{
		0x45, 0x02, 0x00, 0x2d, // ihl 5, ECT(0), total length 45
		0xff, 0xff, 0x40, 0x00, // ID 65535, DF
		0x40, 0x06, 0x00, 0x00, // TTL 64, TCP, checksum (ignored)
		10, 9, 0, 2, 10, 9, 0, 1,
		0x14, 0x51, 0x9c, 0x40, // ports
		0xff, 0xff, 0xff, 0xfe, // seq: wraps
		0x00, 0x00, 0x00, 0x01, // ack
		0x50, 0x99, 0x01, 0x00, // offset 5, CWR ACK PSH FIN, window
		0x00, 0x00, 0x00, 0x00,
		'a', 'b', 'c', 'd', 'e',
	}
	want := [][]byte{{
		0x45, 0x02, 0x00, 0x2a, 0xff, 0xff, 0x40, 0x00, 0x40, 0x06, 0x26, 0xb8, 10, 9, 0, 2, 10, 9, 0, 1,
		0x14, 0x51, 0x9c, 0x40, 0xff, 0xff, 0xff, 0xfe, 0x00, 0x00, 0x00, 0x01,
		0x50, 0x90, 0x01, 0x00, 0x88, 0x4a, 0x00, 0x00, 'a', 'b', // CWR ACK
	}, {
		0x45, 0x02, 0x00, 0x2a, 0x00, 0x00, 0x40, 0x00, 0x40, 0x06, 0x26, 0xb8, 10, 9, 0, 2, 10, 9, 0, 1,
		0x14, 0x51, 0x9c, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,
		0x50, 0x10, 0x01, 0x00, 0x86, 0xc7, 0x00, 0x00, 'c', 'd', // ACK
	}, {
		0x45, 0x02, 0x00, 0x29, 0x00, 0x01, 0x40, 0x00, 0x40, 0x06, 0x26, 0xb8, 10, 9, 0, 2, 10, 9, 0, 1,
		0x14, 0x51, 0x9c, 0x40, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x01,
		0x50, 0x19, 0x01, 0x00, 0x85, 0x21, 0x00, 0x00, 'e', // ACK PSH FIN
	}}
	if diff := cmp.Diff(want, splitAll(t, super, 2)); diff != "" {
		t.Error(diff)
	}
}

// slowFinish computes both checksums of p.
func slowFinish(p []byte) {
	start := int(p[0]&15) * 4
	at := start + ipv4.OffUDPChecksum
	if p[9] == ipv4.ProtocolTCP {
		at = start + ipv4.OffTCPChecksum
	}
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], ^slowSum(0, p[:start]))
	binary.BigEndian.PutUint16(p[at:], 0)
	sum := ^slowSum(slowPseudo(p, start), p[start:])
	if sum == 0 && p[9] == ipv4.ProtocolUDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(p[at:], sum)
}

// slowSplit is a reference implementation of splitter.
func slowSplit(p []byte, size int) (segments [][]byte) {
	start := int(p[0]&15) * 4
	headers := start + ipv4.UDPHeaderLen
	if p[9] == ipv4.ProtocolTCP {
		headers = start + int(p[start+ipv4.OffTCPDataOffset]>>4)*4
	}
	payload := p[headers:]
	for i := 0; i*size < len(payload); i++ {
		body := payload[i*size : min((i+1)*size, len(payload))]
		s := append(bytes.Clone(p[:headers]), body...)
		binary.BigEndian.PutUint16(s[2:], uint16(len(s)))
		binary.BigEndian.PutUint16(s[4:], binary.BigEndian.Uint16(p[4:])+uint16(i))
		if p[9] == ipv4.ProtocolTCP {
			binary.BigEndian.PutUint32(s[start+4:], binary.BigEndian.Uint32(p[start+4:])+uint32(i*size))
			if i > 0 {
				s[start+ipv4.OffTCPFlags] &= ^byte(ipv4.TCPFlagCWR)
			}
			if (i+1)*size < len(payload) {
				s[start+ipv4.OffTCPFlags] &= ^byte(ipv4.TCPFlagFIN | ipv4.TCPFlagPSH)
			}
		} else {
			binary.BigEndian.PutUint16(s[start+4:], uint16(len(s)-start))
		}
		slowFinish(s)
		segments = append(segments, s)
	}
	return segments
}

func TestSplitter_reference(t *testing.T) {
	for _, s := range []spec{
		{tcp: true, payload: patternBytes(65535-40, 0), df: true},
		{tcp: true, payload: patternBytes(4000, 0), options: timestamps, id: 0xfffe, tos: 3, flags: 0xff},
		{tcp: true, payload: patternBytes(4001, 0), ipOption: []byte{1, 1, 1, 0}, seq: 0xfffffc00},
		{tcp: true, payload: patternBytes(1, 0), flags: ipv4.TCPFlagACK | ipv4.TCPFlagPSH},
		{payload: patternBytes(65535-28, 0)},
		{payload: patternBytes(3001, 0), ipOption: []byte{1, 1, 1, 0}, df: true},
	} {
		p := s.build()
		for _, size := range []int{100, 999, 1428, 1460, 65000} {
			got, want := splitAll(t, p, size), slowSplit(p, size)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%+v by %d: %s", s, size, diff)
			}
			for _, segment := range got {
				if !slowValid(segment) {
					t.Errorf("bad length or checksum: %x", segment)
				}
			}
		}
	}
}

func TestSplitter_zeroUDPChecksum(t *testing.T) {
	// The payload makes the checksum 0: it is what the sum lacks to 0xffff.
	p := spec{payload: make([]byte, 2)}.build()
	binary.BigEndian.PutUint16(p[28:], binary.BigEndian.Uint16(p[26:]))
	segment := splitAll(t, p, 100)[0]
	if sum := binary.BigEndian.Uint16(segment[26:]); sum != 0xffff {
		t.Errorf("checksum %#04x", sum)
	}
}

func TestSplitterStart_malformed(t *testing.T) {
	tcp := spec{tcp: true, payload: patternBytes(100, 0)}.build()
	change := func(at int, value byte) []byte {
		p := bytes.Clone(tcp)
		p[at] = value
		return p
	}
	for name, p := range map[string][]byte{
		"empty":         {},
		"IPv6":          change(0, 0x65),
		"short header":  change(0, 0x44),
		"long header":   spec{payload: patternBytes(30, 0)}.build()[:20:20],
		"other length":  change(3, 1),
		"fragment":      change(7, 1),
		"more to come":  change(6, 0x20),
		"other":         change(9, 1),
		"UDP length":    change(9, 17),
		"data offset":   change(32, 0x40),
		"data offset 2": change(32, 0xf0)[:50],
		"no payload":    spec{tcp: true}.build(),
	} {
		var s splitter
		if s.start(p, 10) || s.more() {
			t.Errorf("%s: split", name)
		}
	}
	var s splitter
	if s.start(tcp, 0) || s.more() {
		t.Error("split with size 0")
	}
}

// A truncated segment is malformed by its total length.
func TestSplitterSegment_truncated(t *testing.T) {
	p := spec{tcp: true, payload: patternBytes(3000, 0)}.build()
	var s splitter
	s.start(p, 1000)
	for n := 0; s.more(); n++ {
		small := make([]byte, 900)
		if got := small[:s.segment(small)]; int(binary.BigEndian.Uint16(got[2:])) <= len(got) {
			t.Errorf("segment %d is not malformed", n)
		}
	}
}

func FuzzSplitter(f *testing.F) {
	f.Add(spec{tcp: true, payload: patternBytes(3000, 0)}.build(), uint16(1448))
	f.Add(spec{tcp: true, payload: patternBytes(300, 0), options: timestamps, flags: 0xff, ipOption: []byte{7, 4, 4, 0}}.build(), uint16(7))
	f.Add(spec{payload: patternBytes(3000, 0)}.build(), uint16(1000))
	f.Fuzz(func(t *testing.T, p []byte, size uint16) {
		var s splitter
		if len(p)/(int(size)+1) > 2000 || !s.start(p, int(size)) {
			return
		}
		before := bytes.Clone(p)
		got, want := splitAll(t, p, int(size)), slowSplit(p, int(size))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		for _, segment := range got {
			if !slowValid(segment) {
				t.Errorf("bad length or checksum: %x", segment)
			}
		}
		if !bytes.Equal(p, before) {
			t.Error("the superpacket was changed")
		}
	})
}
