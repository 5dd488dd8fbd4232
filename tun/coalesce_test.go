package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

// tcpSegments returns n in-order segments of a TCP flow, with size bytes of payload each.
// change, if not nil, edits segment i.
func tcpSegments(n, size int, change func(i int, s *spec)) (packets [][]byte) {
	for i := range n {
		s := spec{tcp: true, df: true, id: uint16(100 + i), seq: uint32(1000 + i*size), ack: 7, window: 500,
			options: timestamps, payload: patternBytes(size, i*size)}
		if change != nil {
			change(i, &s)
		}
		packets = append(packets, s.build())
	}
	return packets
}

// groups returns which packets of a batch are written together, by index.
func groups(t testing.TB, batch []*packet.Buffer) (groups [][]int) {
	t.Helper()
	for _, w := range writeAll(t, &coalescer{uso: true}, batch) {
		groups = append(groups, w.packets)
	}
	return groups
}

func TestCoalescer_tcp(t *testing.T) {
	packets := tcpSegments(5, 1000, func(i int, s *spec) {
		if i == 4 {
			s.payload, s.flags = s.payload[:300], ipv4.TCPFlagACK|ipv4.TCPFlagPSH
		}
	})
	out := writeAll(t, &coalescer{}, buffers(packets...))
	if len(out) != 1 {
		t.Fatalf("%d outputs", len(out))
	}
	want := vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOTCPv4, HdrLen: 52, GSOSize: 1000, CsumStart: 20, CsumOffset: 16}
	if out[0].header != want {
		t.Errorf("header %+v, want %+v", out[0].header, want)
	}
	super := out[0].bytes
	if slowSum(0, super[:20]) != 0xffff || int(binary.BigEndian.Uint16(super[2:])) != 52+4300 {
		t.Errorf("IP header: %x", super[:20])
	}
	if got, want := binary.BigEndian.Uint16(super[36:]), slowPseudo(super, 20); got != want {
		t.Errorf("checksum field %#04x, want the pseudo-header's sum %#04x", got, want)
	}
	if diff := cmp.Diff(packets, splitAll(t, super, 1000)); diff != "" {
		t.Error(diff)
	}
}

func TestCoalescer_udp(t *testing.T) {
	var packets [][]byte
	for i := range 70 {
		packets = append(packets, spec{id: uint16(i), payload: patternBytes(64, i)}.build())
	}
	out := writeAll(t, &coalescer{uso: true}, buffers(packets...))
	if len(out) != 2 || len(out[0].packets) != maxUDPSegments {
		t.Fatalf("%d outputs, the first of %d", len(out), len(out[0].packets))
	}
	want := vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOUDP, HdrLen: 28, GSOSize: 64, CsumStart: 20, CsumOffset: 6}
	if out[0].header != want {
		t.Errorf("header %+v, want %+v", out[0].header, want)
	}
	got := append(splitAll(t, out[0].bytes, 64), splitAll(t, out[1].bytes, 64)...)
	if diff := cmp.Diff(packets, got); diff != "" {
		t.Error(diff)
	}
	if out := writeAll(t, &coalescer{}, buffers(packets...)); len(out) != len(packets) {
		t.Errorf("%d outputs on a kernel without USO", len(out))
	}
}

// Only what splitting restores is coalesced. Each case changes the third of four segments so
// that it cannot be merged with the first two, or the fourth cannot be merged with it.
func TestCoalescer_unmergeable(t *testing.T) {
	apart := [][]int{{0, 1}, {2}, {3}}
	for _, c := range []struct {
		name   string
		change func(s *spec)
		want   [][]int
	}{
		{"nothing", func(*spec) {}, [][]int{{0, 1, 2, 3}}},
		{"TOS", func(s *spec) { s.tos = 4 }, apart},
		{"ECN mark", func(s *spec) { s.tos = 3 }, apart},
		{"TTL", func(s *spec) { s.ttl = 63 }, apart},
		{"DF", func(s *spec) { s.df = false }, apart},
		{"a gap", func(s *spec) { s.seq++ }, apart},
		{"a retransmission", func(s *spec) { s.seq -= 2000 }, apart},
		{"acknowledgement", func(s *spec) { s.ack++ }, apart},
		{"window", func(s *spec) { s.window++ }, apart},
		{"options", func(s *spec) { s.options = append(bytes.Clone(timestamps[:11]), 9) }, apart},
		{"no options", func(s *spec) { s.options = nil }, apart},
		{"longer", func(s *spec) { s.payload = patternBytes(1001, 0) }, apart},
		{"shorter", func(s *spec) { s.payload = s.payload[:999] }, [][]int{{0, 1, 2}, {3}}},
		{"no payload", func(s *spec) { s.payload = nil }, apart},
		{"PSH", func(s *spec) { s.flags = ipv4.TCPFlagACK | ipv4.TCPFlagPSH }, [][]int{{0, 1, 2}, {3}}},
		{"FIN", func(s *spec) { s.flags = ipv4.TCPFlagACK | ipv4.TCPFlagFIN }, [][]int{{0, 1, 2}, {3}}},
		{"SYN", func(s *spec) { s.flags = ipv4.TCPFlagACK | 2 }, apart},
		{"RST", func(s *spec) { s.flags = ipv4.TCPFlagACK | 4 }, apart},
		{"URG", func(s *spec) { s.flags = ipv4.TCPFlagACK | 0x20 }, apart},
		{"ECE", func(s *spec) { s.flags = ipv4.TCPFlagACK | ipv4.TCPFlagECE }, apart},
		{"CWR", func(s *spec) { s.flags = ipv4.TCPFlagACK | ipv4.TCPFlagCWR }, apart},
		{"no ACK", func(s *spec) { s.flags = ipv4.TCPFlagPSH }, apart},
		{"IP options", func(s *spec) { s.ipOption = []byte{1, 1, 1, 0} }, apart},
		{"UDP", func(s *spec) { s.tcp = false }, apart},
		{"other source", func(s *spec) { s.flow = 9 }, apart},
		{"other destination", func(s *spec) { s.to = 9 }, apart},
		{"other source port", func(s *spec) { s.ports[0] = 9 }, apart},
		{"other destination port", func(s *spec) { s.ports[1] = 9 }, apart},
	} {
		packets := tcpSegments(4, 1000, func(i int, s *spec) {
			if i == 2 {
				c.change(s)
			}
		})
		got := groups(t, buffers(packets...))
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

func TestCoalescer_wrongChecksum(t *testing.T) {
	for name, at := range map[string]int{"TTL of the header": 8, "payload": 600, "checksum": 36} {
		for wrong := range 3 {
			packets := tcpSegments(3, 1000, nil)
			packets[wrong][at] ^= 0x10
			before := bytes.Clone(packets[wrong])
			for _, w := range writeAll(t, &coalescer{}, buffers(packets...)) {
				for _, i := range w.packets {
					if i == wrong && (len(w.packets) > 1 || !bytes.Equal(w.bytes, before) || w.header != vnet.Header{}) {
						t.Errorf("%s of packet %d: written with %v", name, wrong, w.packets)
					}
				}
			}
		}
	}
}

// A checksum known to be valid, or partial, is not verified.
func TestCoalescer_knownChecksum(t *testing.T) {
	packets := tcpSegments(3, 1000, nil)
	packets[1][600]++
	batch := buffers(packets...)
	batch[1].Checksum = packet.ChecksumValid
	if got := groups(t, batch); len(got) != 1 {
		t.Errorf("a valid one: %v", got)
	}
	packets = tcpSegments(3, 1000, func(_ int, s *spec) { s.partial = true })
	batch = buffers(packets...)
	for _, b := range batch {
		b.Checksum = packet.ChecksumPartial
	}
	if got := groups(t, batch); len(got) != 1 {
		t.Errorf("partial ones: %v", got)
	}
}

// A UDP datagram without a checksum is not merged, as that would add one.
func TestCoalescer_zeroUDPChecksum(t *testing.T) {
	var packets [][]byte
	for i := range 3 {
		p := spec{id: uint16(i), payload: patternBytes(64, i)}.build()
		p[26], p[27] = 0, 0
		packets = append(packets, p)
	}
	for _, w := range writeAll(t, &coalescer{uso: true}, buffers(packets...)) {
		if len(w.packets) != 1 || w.header != (vnet.Header{}) || w.bytes[26]|w.bytes[27] != 0 {
			t.Errorf("%v: %+v %x", w.packets, w.header, w.bytes)
		}
	}
}

// The ID must increase by one only without DF (RFC 6864, section 4.1).
func TestCoalescer_ipID(t *testing.T) {
	for df, want := range map[bool][][]int{true: {{0, 1, 2}}, false: {{0, 1}, {2}}} {
		packets := tcpSegments(3, 100, func(i int, s *spec) {
			if s.df = df; i == 2 {
				s.id = 0
			}
		})
		if diff := cmp.Diff(want, groups(t, buffers(packets...))); diff != "" {
			t.Errorf("DF %v: %s", df, diff)
		}
	}
}

func TestCoalescer_interleavedFlows(t *testing.T) {
	const flows = maxOpenFlows
	var packets [][]byte
	for i := range 4 {
		for flow := range flows {
			s := spec{tcp: true, df: true, flow: byte(flow), seq: uint32(i * 100), payload: patternBytes(100, i)}
			packets = append(packets, s.build())
		}
	}
	got := groups(t, buffers(packets...))
	if len(got) != flows {
		t.Fatalf("%d outputs of %d flows", len(got), flows)
	}
	for flow, group := range got {
		if diff := cmp.Diff([]int{flow, flow + flows, flow + 2*flows, flow + 3*flows}, group); diff != "" {
			t.Error(diff)
		}
	}
}

// Without sequence numbers only addresses and ports keep UDP flows apart.
func TestCoalescer_udpFlows(t *testing.T) {
	for name, other := range map[string]spec{
		"source": {flow: 1}, "destination": {to: 1}, "source port": {ports: [2]uint16{1, 0}}, "destination port": {ports: [2]uint16{0, 1}},
	} {
		var packets [][]byte
		for i := range 6 {
			s := spec{}
			if i%2 != 0 {
				s = other
			}
			s.df, s.payload = true, patternBytes(100, i)
			packets = append(packets, s.build())
		}
		if diff := cmp.Diff([][]int{{0, 2, 4}, {1, 3, 5}}, groups(t, buffers(packets...))); diff != "" {
			t.Errorf("another %s: %s", name, diff)
		}
	}
}

// A fragment or truncated packet may belong to any flow between its addresses: no later
// packet of such a flow is written before it.
func TestCoalescer_fragmentOrder(t *testing.T) {
	packets := tcpSegments(4, 100, nil)
	fragment := bytes.Clone(packets[3])
	binary.BigEndian.PutUint16(fragment[6:], 0x2000)
	late := bytes.Clone(packets[3])
	binary.BigEndian.PutUint16(late[6:], 20)
	for name, p := range map[string][]byte{"first fragment": fragment, "later fragment": late, "truncated": packets[3][:30]} {
		got := groups(t, buffers(packets[0], packets[1], p, packets[2], packets[3]))
		if diff := cmp.Diff([][]int{{0, 1}, {2}, {3, 4}}, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	ping := bytes.Clone(packets[3])
	ping[9] = 1
	if got := groups(t, buffers(packets[0], packets[1], ping, packets[2])); len(got) != 2 {
		t.Errorf("a ping closed a TCP flow: %v", got)
	}
}

func TestCoalescer_limits(t *testing.T) {
	for _, w := range writeAll(t, &coalescer{}, buffers(tcpSegments(70, 1428, nil)...)) {
		if len(w.bytes) > packet.MaxSize {
			t.Errorf("%d bytes", len(w.bytes))
		}
	}
	for _, w := range writeAll(t, &coalescer{}, buffers(tcpSegments(2*maxTCPSegments, 1, nil)...)) {
		if len(w.packets) != maxTCPSegments {
			t.Errorf("%d packets", len(w.packets))
		}
	}
}

func TestCoalescerHeader_superpacket(t *testing.T) {
	tcp := spec{tcp: true, options: timestamps, payload: patternBytes(4000, 0), partial: true}
	udp := spec{payload: patternBytes(4000, 0), partial: true}
	cwr := tcp
	cwr.flags = ipv4.TCPFlagACK | ipv4.TCPFlagCWR
	options := tcp
	options.ipOption = []byte{1, 1, 1, 0}
	for _, c := range []struct {
		name string
		spec spec
		size uint16
		want vnet.Header
	}{
		{"TCP", tcp, 1000, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOTCPv4, HdrLen: 52, GSOSize: 1000, CsumStart: 20, CsumOffset: 16}},
		{"TCP with CWR", cwr, 1000, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOTCPv4 | vnet.GSOECN, HdrLen: 52, GSOSize: 1000, CsumStart: 20, CsumOffset: 16}},
		{"TCP with IP options", options, 1000, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOTCPv4, HdrLen: 56, GSOSize: 1000, CsumStart: 24, CsumOffset: 16}},
		{"TCP that is one segment", tcp, 4000, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSONone, HdrLen: 52, GSOSize: 0, CsumStart: 20, CsumOffset: 16}},
		{"TCP, only partial", tcp, 0, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSONone, HdrLen: 52, GSOSize: 0, CsumStart: 20, CsumOffset: 16}},
		{"UDP", udp, 1000, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOUDP, HdrLen: 28, GSOSize: 1000, CsumStart: 20, CsumOffset: 6}},
		{"UDP, only partial", udp, 0, vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSONone, HdrLen: 28, GSOSize: 0, CsumStart: 20, CsumOffset: 6}},
	} {
		p := c.spec.build()
		batch := buffers(p)
		batch[0].Checksum, batch[0].SegmentSize = packet.ChecksumPartial, c.size
		out := writeAll(t, &coalescer{uso: true}, batch)
		if len(out) != 1 || out[0].header != c.want || !bytes.Equal(out[0].bytes, p) {
			t.Errorf("%s: %+v, want %+v", c.name, out[0].header, c.want)
		}
	}
}

func TestCoalescer_superpacketOrder(t *testing.T) {
	packets := tcpSegments(5, 1000, nil)
	batch := buffers(packets...)
	batch[2].Checksum, batch[2].SegmentSize = packet.ChecksumPartial, 500
	if diff := cmp.Diff([][]int{{0, 1}, {2}, {3, 4}}, groups(t, batch)); diff != "" {
		t.Error(diff)
	}
}

// FuzzCoalescer builds a batch from a script, four bytes per packet, and splits what is
// written: every packet is restored, and each flow is in order.
func FuzzCoalescer(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 0, 1, 7, 3, 0, 0, 0, 0, 0, 2, 9, 0, 0, 3, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		var (
			packets [][]byte
			states  [8]spec
		)
		for ; len(script) >= 4 && len(packets) < 200; script = script[4:] {
			op := script[:4]
			s := &states[op[0]&7]
			s.flow, s.tcp, s.df = op[0]&3, op[0]&4 == 0, op[0]&8 != 0
			s.flags, s.ipOption, s.tos = ipv4.TCPFlagACK, nil, 0
			s.payload = patternBytes(100, int(s.seq))
			switch op[1] & 15 { // most values change nothing
			case 1:
				s.flags = op[2]
			case 2:
				s.payload = patternBytes(int(op[2]), int(s.seq))
			case 3:
				s.seq += uint32(op[2])
			case 4:
				s.ack++
			case 5:
				s.tos = op[2]
			case 6:
				s.ipOption = []byte{1, 1, 1, 0}
			case 7:
				s.id += uint16(op[2])
			}
			p := s.build()
			if op[1]&15 == 8 {
				p[int(op[2])%len(p)] ^= op[3]
			}
			s.id++
			s.seq += uint32(len(s.payload))
			packets = append(packets, p)
		}
		var (
			c    = coalescer{uso: true}
			seen = make([]bool, len(packets))
			last = map[string]int{}
		)
		for _, w := range writeAll(t, &c, buffers(packets...)) {
			for _, i := range w.packets {
				if seen[i] {
					t.Fatalf("packet %d twice", i)
				}
				seen[i] = true
				flow := string(packets[i][9:10]) + string(packets[i][12:24])
				if before, ok := last[flow]; ok && before > i {
					t.Fatalf("packet %d was written after %d", before, i)
				}
				last[flow] = i
			}
			if len(w.packets) == 1 {
				if !bytes.Equal(w.bytes, packets[w.packets[0]]) || w.header != (vnet.Header{}) {
					t.Fatal("an unmerged packet was changed")
				}
				continue
			}
			segments := splitAll(t, w.bytes, int(w.header.GSOSize))
			if len(segments) != len(w.packets) {
				t.Fatalf("%d packets became %d segments", len(w.packets), len(segments))
			}
			for j, i := range w.packets {
				want := packets[i]
				if !slowValid(want) {
					t.Fatalf("a packet with a wrong checksum was coalesced: %x", want)
				}
				if want[6]&dontFragment != 0 { // the ID is meaningless (RFC 6864)
					copy(want[4:6], segments[j][4:6])
				}
				slowFinish(want) // a checksum may be 0 or 0xffff, which are equal
				if !bytes.Equal(segments[j], want) {
					t.Fatalf("segment %d:\n%x, was\n%x", j, segments[j], want)
				}
			}
		}
		for i := range seen {
			if !seen[i] {
				t.Fatalf("packet %d is lost", i)
			}
		}
	})
}
