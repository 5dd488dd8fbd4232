package mss

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
)

const (
	flagFIN = 0x01
	flagRST = 0x04
)

// segment returns a TCP packet from 10.0.0.1 to 10.0.0.2 with a correct checksum. The options are
// padded to a multiple of four bytes.
func segment(flags byte, options []byte, payload ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, kindEnd)
	}
	tcp := append([]byte{
		0x9c, 0x40, 0x00, 0x50, // ports 40000, 80
		0x12, 0x34, 0x56, 0x78, // sequence number
		0x00, 0x00, 0x00, 0x00, // acknowledgement number
		byte((ipv4.TCPHeaderLen + len(options)) / 4 << 4), flags, 0xfa, 0xf0, // data offset, flags, window
		0x00, 0x00, 0x00, 0x00, // checksum, urgent pointer
	}, options...)
	tcp = append(tcp, payload...)
	return packet(tcp)
}

// packet adds an IPv4 header to a TCP segment, and sets the checksum.
func packet(tcp []byte) []byte {
	h := ipv4.Header{TotalLen: 20 + len(tcp), ID: 1, DF: true, TTL: 64, Protocol: ipv4.ProtocolTCP, Source: [4]byte{10, 0, 0, 1}, Destination: [4]byte{10, 0, 0, 2}}
	b := make([]byte, h.TotalLen)
	h.Put(b)
	copy(b[20:], tcp)
	binary.BigEndian.PutUint16(b[36:], checksum(b))
	return b
}

// checksum computes the TCP checksum word by word (RFC 9293, section 3.1), independent of the
// code under test.
func checksum(p []byte) uint16 {
	header := int(p[0]&15) * 4
	tcp := p[header:]
	sum := uint32(6) + uint32(len(tcp))
	add := func(b []byte, skip int) {
		for i := 0; i < len(b); i += 2 {
			if i == skip {
				continue
			}
			word := uint32(b[i]) << 8
			if i+1 < len(b) {
				word |= uint32(b[i+1])
			}
			sum += word
		}
	}
	add(p[12:20], -1)
	add(tcp, ipv4.OffTCPChecksum)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func clamp(t testing.TB, b []byte, mtu int, partial bool) bool {
	t.Helper()
	p, err := ipv4.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return Clamp(p, mtu, partial)
}

func TestClamp_syn(t *testing.T) {
	b := []byte{
		0x45, 0x00, 0x00, 0x3c, 0x1c, 0x46, 0x40, 0x00, // 60 bytes, DF
		0x40, 0x06, 0x0a, 0x74, // TTL 64, TCP, header checksum
		0x0a, 0x00, 0x00, 0x01, // 10.0.0.1
		0x0a, 0x00, 0x00, 0x02, // 10.0.0.2
		0x9c, 0x40, 0x00, 0x50, // ports 40000, 80
		0x12, 0x34, 0x56, 0x78, // sequence number
		0x00, 0x00, 0x00, 0x00, // acknowledgement number
		0xa0, 0x02, 0xfa, 0xf0, // 40 bytes of header, SYN, window
		0x33, 0xcf, 0x00, 0x00, // checksum, urgent pointer
		0x02, 0x04, 0x05, 0xb4, // MSS 1460
		0x04, 0x02, // SACK permitted
		0x08, 0x0a, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, // timestamps
		0x01,             // no operation
		0x03, 0x03, 0x07, // window scale
	}
	want := append([]byte(nil), b...)
	want[42], want[43] = 0x05, 0xa0 // MSS 1440
	want[36], want[37] = 0x33, 0xe3 // the checksum grows by what the MSS shrinks
	if !clamp(t, b, 1480, false) {
		t.Error("Clamp says that it changed nothing")
	}
	if diff := cmp.Diff(want, b); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if clamp(t, b, 1480, false) {
		t.Error("Clamp changed it a second time")
	}
}

func TestClamp_options(t *testing.T) {
	mss := func(v uint16) []byte { return []byte{kindMSS, lenMSS, byte(v >> 8), byte(v)} }
	timestamps := []byte{8, 10, 0, 0, 0, 1, 0, 0, 0, 0}
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	const syn = ipv4.TCPFlagSYN
	for _, c := range []struct {
		rule    string
		flags   byte
		options []byte
		mtu     int
		want    []byte // options afterwards; nil: unchanged
	}{
		{"SYN", syn, mss(1460), 1480, mss(1440)},
		{"SYN-ACK", syn | ipv4.TCPFlagACK, mss(1460), 1480, mss(1440)},
		{"it is lowered and not raised", syn, mss(1000), 1480, nil},
		{"the right value stays", syn, mss(1440), 1480, nil},
		{"one more does not", syn, mss(1441), 1480, mss(1440)},
		{"zero is not raised", syn, mss(0), 1480, nil},
		{"65535", syn, mss(65535), 65515, mss(65475)},
		{"an MTU beyond any MSS", syn, mss(65535), 70000, nil},
		{"the smallest MTU", syn, mss(536), 68, mss(28)},
		{"an MTU with no room", syn, mss(536), 40, nil},
		{"a nonsensical MTU", syn, mss(536), -1, nil},
		{"the option is not added", syn, timestamps, 1480, nil},
		{"no options", syn, nil, 1480, nil},
		{"no SYN", ipv4.TCPFlagACK, mss(1460), 1480, nil},
		{"FIN", flagFIN | ipv4.TCPFlagACK, mss(1460), 1480, nil},
		{"RST", flagRST, mss(1460), 1480, nil},
		{"at an odd offset", syn, join([]byte{kindNop}, mss(1460)), 1480, join([]byte{kindNop}, mss(1440))},
		{"behind others", syn, join(timestamps, []byte{kindNop, kindNop}, mss(1460)), 1480, join(timestamps, []byte{kindNop, kindNop}, mss(1440))},
		{"behind an odd one", syn, join([]byte{3, 3, 7}, mss(1460)), 1480, join([]byte{3, 3, 7}, mss(1440))},
		{"twice", syn, join(mss(1460), mss(8960)), 1480, join(mss(1440), mss(1440))},
		{"twice, one of them small", syn, join(mss(500), []byte{kindNop}, mss(8960)), 1480, join(mss(500), []byte{kindNop}, mss(1440))},
		{"behind the end of options it is no option", syn, join([]byte{kindEnd, kindNop, kindNop, kindNop}, mss(1460)), 1480, nil},
		{"in front of the end", syn, join(mss(1460), []byte{kindEnd, 2, 0, 0}), 1480, join(mss(1440), []byte{kindEnd, 2, 0, 0})},
		{"malformed: MSS of length 3", syn, []byte{kindMSS, 3, 0x05, kindNop}, 1480, nil},
		{"malformed: MSS of length 6", syn, []byte{kindMSS, 6, 0x05, 0xb4, 0, 0, 0, 0}, 1480, nil},
		{"malformed: length 0", syn, join([]byte{8, 0}, mss(1460)), 1480, nil},
		{"malformed: length 1", syn, join([]byte{8, 1}, mss(1460)), 1480, nil},
		{"malformed: beyond the end", syn, join(mss(1460), []byte{8, 10, 0, 0}), 1480, nil},
		{"malformed: cut off after the kind", syn, join(mss(1460), []byte{kindNop, kindNop, kindNop, 8}), 1480, nil},
		{"malformed: MSS cut off", syn, []byte{kindNop, kindNop, kindMSS, lenMSS}, 1480, nil},
	} {
		for _, partial := range []bool{false, true} {
			b := segment(c.flags, c.options, 1, 2, 3)
			if partial {
				binary.BigEndian.PutUint16(b[36:], 0x1234)
			}
			want := append([]byte(nil), b...)
			if c.want != nil {
				copy(want[40:], c.want)
				if !partial {
					binary.BigEndian.PutUint16(want[36:], checksum(want))
				}
			}
			if got := clamp(t, b, c.mtu, partial); got != (c.want != nil) {
				t.Errorf("%s: changed: %v", c.rule, got)
			}
			if diff := cmp.Diff(want, b); diff != "" {
				t.Errorf("%s, partial %v (-want +got):\n%s", c.rule, partial, diff)
			}
		}
	}
}

func TestClamp_tcpHeader(t *testing.T) {
	for _, c := range []struct {
		rule   string
		change func(b []byte, h *ipv4.Header)
		want   bool
	}{
		{"a whole packet", func([]byte, *ipv4.Header) {}, true},
		{"the first fragment", func(_ []byte, h *ipv4.Header) { h.DF, h.MF = false, true }, true},
		{"a later fragment", func(_ []byte, h *ipv4.Header) { h.DF, h.FragmentOffset = false, 8 }, false},
		{"UDP", func(_ []byte, h *ipv4.Header) { h.Protocol = ipv4.ProtocolUDP }, false},
		{"cut off within the options", func(_ []byte, h *ipv4.Header) { h.TotalLen = 43 }, false},
		{"cut off before the options", func(_ []byte, h *ipv4.Header) { h.TotalLen = 40 }, false},
		{"cut off before the flags", func(_ []byte, h *ipv4.Header) { h.TotalLen = 33 }, false},
		{"no payload", func(_ []byte, h *ipv4.Header) { h.TotalLen = 20 }, false},
		{"a data offset below 20 bytes", func(b []byte, _ *ipv4.Header) { b[32] = 4 << 4 }, false},
		{"a data offset beyond the end", func(b []byte, _ *ipv4.Header) { b[32] = 15 << 4 }, false},
	} {
		b := segment(ipv4.TCPFlagSYN, []byte{kindMSS, lenMSS, 0x05, 0xb4})
		p, err := ipv4.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		h := p.Header()
		c.change(b, &h)
		h.Put(b)
		before := append([]byte(nil), b...)
		if got := clamp(t, b, 1480, false); got != c.want {
			t.Errorf("%s: changed: %v", c.rule, got)
		}
		if !c.want {
			if diff := cmp.Diff(before, b); diff != "" {
				t.Errorf("%s (-want +got):\n%s", c.rule, diff)
			}
		}
	}
}

func TestClamp_ipOptions(t *testing.T) {
	tcp := segment(ipv4.TCPFlagSYN, []byte{kindMSS, lenMSS, 0x05, 0xb4})[20:]
	b := make([]byte, 24+len(tcp))
	h := ipv4.Header{TotalLen: len(b), TTL: 64, Protocol: ipv4.ProtocolTCP, Source: [4]byte{10, 0, 0, 1}, Destination: [4]byte{10, 0, 0, 2}}
	h.PutOptions(b, []byte{0x94, 0x04, 0x00, 0x00}) // router alert
	copy(b[24:], tcp)
	if !clamp(t, b, 1480, false) || b[46] != 0x05 || b[47] != 0xa0 || binary.BigEndian.Uint16(b[24+ipv4.OffTCPChecksum:]) != checksum(b) {
		t.Errorf("% x", b)
	}
}

func TestClamp_wrongChecksum(t *testing.T) {
	b := segment(ipv4.TCPFlagSYN, []byte{kindMSS, lenMSS, 0x05, 0xb4})
	sum := binary.BigEndian.Uint16(b[36:])
	binary.BigEndian.PutUint16(b[36:], sum^0x0100)
	if !clamp(t, b, 1480, false) || binary.BigEndian.Uint16(b[36:]) == checksum(b) {
		t.Error("a damaged packet looks whole after the clamp")
	}
}

// All checksums, with the field at an even and an odd offset: wrong one's complement arithmetic
// shows at 0 and 0xffff.
func TestClamp_checksums(t *testing.T) {
	for _, options := range [][]byte{{kindMSS, lenMSS, 0xff, 0xff}, {kindNop, kindMSS, lenMSS, 0xff, 0xff}} {
		b := segment(ipv4.TCPFlagSYN, options)
		clamped := append([]byte(nil), b...)
		if !clamp(t, clamped, 1480, false) {
			t.Fatal("not clamped")
		}
		for urgent := range 0x10000 { // reaches every checksum
			binary.BigEndian.PutUint16(b[38:], uint16(urgent))
			binary.BigEndian.PutUint16(b[36:], checksum(b))
			got := append([]byte(nil), b...)
			clamp(t, got, 1480, false)
			if sum, want := binary.BigEndian.Uint16(got[36:]), checksum(got); sum != want {
				t.Fatalf("options % x, checksum %#04x: updated to %#04x, want %#04x", options, checksum(b), sum, want)
			}
		}
	}
}

func TestClamp_allocs(t *testing.T) {
	b := segment(ipv4.TCPFlagSYN, []byte{kindNop, kindMSS, lenMSS, 0x05, 0xb4})
	p, err := ipv4.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(1000, func() {
		b[43], b[44] = 0x05, 0xb4
		if !Clamp(p, 1480, false) {
			t.Fatal("not clamped")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzClamp builds a segment from options. Clamp may lower well-formed MSS options, must keep the
// checksum correct, and must change nothing else.
func FuzzClamp(f *testing.F) {
	f.Add(byte(ipv4.TCPFlagSYN), []byte{kindMSS, lenMSS, 0x05, 0xb4}, []byte{}, uint16(1480), false)
	f.Add(byte(ipv4.TCPFlagSYN|ipv4.TCPFlagACK), []byte{kindNop, kindMSS, lenMSS, 0x05, 0xb4, kindEnd}, []byte{1}, uint16(1400), false)
	f.Add(byte(ipv4.TCPFlagSYN), []byte{8, 10, 0, 0, 0, 0, 0, 0, 0, 0, kindMSS, lenMSS, 0xff, 0xff}, []byte{1, 2}, uint16(65515), true)
	f.Add(byte(ipv4.TCPFlagSYN), []byte{kindMSS, lenMSS, 0x05, 0xb4, 8, 0}, []byte{}, uint16(68), false)
	f.Add(byte(ipv4.TCPFlagACK), []byte{kindMSS, lenMSS, 0x05, 0xb4}, []byte{}, uint16(1480), false)
	f.Fuzz(func(t *testing.T, flags byte, options, payload []byte, mtu uint16, partial bool) {
		b := segment(flags, append([]byte(nil), options[:min(len(options), 40)]...), payload[:min(len(payload), 1000)]...)
		if partial {
			binary.BigEndian.PutUint16(b[36:], 0x1234)
		}
		before := append([]byte(nil), b...)
		changed := clamp(t, b, int(mtu), partial)

		if sum := binary.BigEndian.Uint16(b[36:]); partial && sum != 0x1234 {
			t.Fatalf("a partial checksum became %#04x", sum)
		} else if !partial && sum != checksum(b) {
			t.Fatalf("the checksum became %#04x, want %#04x", sum, checksum(b))
		}
		// Revert the allowed changes; the rest must be unchanged.
		undone := append([]byte(nil), b...)
		copy(undone[36:38], before[36:38])
		end := 20 + int(b[32]>>4)*4
		lowered := false
		for i := 40; i < end; {
			kind, n := b[i], 1
			if kind == kindEnd {
				break
			}
			if kind != kindNop {
				if i+1 >= end || b[i+1] < 2 || i+int(b[i+1]) > end {
					if changed {
						t.Fatal("changed in spite of malformed options")
					}
					break
				}
				n = int(b[i+1])
			}
			if kind == kindMSS && n == lenMSS {
				was, is := binary.BigEndian.Uint16(before[i+2:]), binary.BigEndian.Uint16(b[i+2:])
				if is > was {
					t.Fatalf("an MSS was raised from %d to %d", was, is)
				}
				if is < was && (int(is) != int(mtu)-40 || flags&ipv4.TCPFlagSYN == 0) {
					t.Fatalf("an MSS was lowered from %d to %d at MTU %d, flags %#02x", was, is, mtu, flags)
				}
				if changed && int(is) > int(mtu)-40 {
					t.Fatalf("an MSS of %d was left at MTU %d", is, mtu)
				}
				lowered = lowered || is < was
				copy(undone[i+2:i+4], before[i+2:i+4])
			}
			i += n
		}
		if diff := cmp.Diff(before, undone); diff != "" {
			t.Fatalf("changed beside the MSS and the checksum:\n%s", diff)
		}
		if changed != lowered {
			t.Fatalf("changed: %v, lowered: %v", changed, lowered)
		}
	})
}

// FuzzClamp_anyPacket takes arbitrary bytes: no panic, and no change outside of the TCP segment.
func FuzzClamp_anyPacket(f *testing.F) {
	f.Add(segment(ipv4.TCPFlagSYN, []byte{kindMSS, lenMSS, 0x05, 0xb4}), 1480, false)
	f.Add(segment(ipv4.TCPFlagSYN, []byte{kindNop, kindMSS, lenMSS})[:43], 1480, true)
	f.Fuzz(func(t *testing.T, b []byte, mtu int, partial bool) {
		p, err := ipv4.Parse(b)
		if err != nil {
			return
		}
		before := append([]byte(nil), b...)
		changed := Clamp(p, mtu, partial)
		if header := p.HeaderLen(); cmp.Diff(before[:header], b[:header]) != "" || cmp.Diff(before[p.TotalLen():], b[p.TotalLen():]) != "" {
			t.Fatal("changed outside of the TCP segment")
		}
		if !changed && cmp.Diff(before, b) != "" {
			t.Fatal("changed, and says that it did not")
		}
	})
}

func BenchmarkClamp_syn(b *testing.B) {
	raw := segment(ipv4.TCPFlagSYN, []byte{kindMSS, lenMSS, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, kindNop, 3, 3, 7})
	p, err := ipv4.Parse(raw)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		raw[42], raw[43] = 0x05, 0xb4
		Clamp(p, 1480, false)
	}
}

// The common case: no SYN.
func BenchmarkClamp_data(b *testing.B) {
	raw := segment(ipv4.TCPFlagACK, []byte{kindNop, kindNop, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0}, make([]byte, 1428)...)
	p, err := ipv4.Parse(raw)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		Clamp(p, 1480, false)
	}
}
