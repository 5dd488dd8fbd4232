package fastpath

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/test/routesets"
)

// captureLab begins to capture the tunnel of a lab as c says, and returns its Link.
func captureLab(t testing.TB, l *lab, tunnel Tunnel, c Capture) *Link {
	t.Helper()
	link := &Link{f: &FastPath{objects: l.objects, links: map[*Link]bool{}}, slot: slot, counts: make([]counters, l.cpus)}
	link.f.links[link] = true
	if err := link.OpenCapture(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.CloseCapture)
	tunnel.Capture = c
	l.enable(tunnel)
	return link
}

// seenPacket is a Captured, with the outer packet of AsReceived.
type seenPacket struct {
	Captured
	received []byte
}

func captured(t testing.TB, l *Link) (all []seenPacket) {
	t.Helper()
	_, err := l.Captured(func() bool { return true }, func(p *Captured) {
		seen := seenPacket{Captured: *p}
		p.AsReceived(func(outer []byte) { seen.received = bytes.Clone(outer) })
		seen.Outer = bytes.Clone(p.Outer)
		all = append(all, seen)
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// A capture has the outer and the inner packet, of any length, up to Snaplen bytes of the latter.
func TestLink_Captured(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.MTU, tunnel.PathMTU = 3900, 4000 // BPF_PROG_TEST_RUN takes a page
	l := newLab(t, tunnel)
	for _, snaplen := range []int{1, 20, 64, 128, 129, 1500, 2048, 2049, 65535} {
		link := captureLab(t, l, tunnel, Capture{Snaplen: snaplen})
		for _, n := range []int{0, 8, 99, 100, 101, 1400, 2020, 2021, 3000} {
			in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(n))
			began := time.Now()
			verdict, out := l.run(l.Encap, in)
			in = inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(n))
			received := outerPacket(0, in)
			if v, _ := l.run(l.Decap, received); verdict != redirect || v != redirect {
				t.Fatalf("verdicts %d and %d", verdict, v)
			}
			all := captured(t, link)
			if len(all) != 2 {
				t.Fatalf("snaplen %d, %d bytes: %d packets are captured", snaplen, len(in), len(all))
			}
			for i, want := range [][]byte{out, received} {
				p, kept := &all[i], min(len(want), 20+snaplen)
				if p.Outbound != (i == 0) || p.Why != NotDropped || p.Length != len(want) || !bytes.Equal(p.Outer, want[:kept]) || !bytes.Equal(p.Inner(), want[20:kept]) || !bytes.Equal(p.received, want[:kept]) {
					t.Fatalf("snaplen %d, packet %d: %+v, want %x", snaplen, i, p, want[:kept])
				}
				if p.At.Before(began.Add(-time.Second)) || p.At.After(time.Now().Add(time.Second)) {
					t.Errorf("at %v, and it is %v", p.At, time.Now())
				}
			}
		}
		link.CloseCapture()
	}
}

// The programs capture no packet that they leave to userspace, none of a tunnel without a capture, and with Drops none
// that they carry.
func TestLink_Captured_others(t *testing.T) {
	l := newLab(t, defaultTunnel())
	in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8))
	for name, x := range map[string]struct {
		capture Capture
		packet  []byte
	}{
		"a fragment":         {Capture{Snaplen: 100}, outerPacket(0, withMF(in))[:30]},
		"no capture":         {Capture{}, outerPacket(0, in)},
		"only dropped ones":  {Capture{Snaplen: 100, Drops: true}, outerPacket(0, in)},
		"a reflect probe":    {Capture{Snaplen: 100}, outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}, nil))},
		"an empty probe":     {Capture{Snaplen: 100}, outerPacket(0, nil)},
		"an inner TTL of 0":  {Capture{Snaplen: 100}, outerPacket(0, sum(slices.Concat(in[:8], []byte{0}, in[9:])))},
		"of another address": {Capture{Snaplen: 100}, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: innerA, Destination: local}, in)},
	} {
		link := captureLab(t, l, defaultTunnel(), x.capture)
		l.run(l.Decap, x.packet)
		if all := captured(t, link); len(all) > 0 {
			t.Errorf("%s: %+v", name, all)
		}
		if n, drops, err := link.NotCaptured(); n+drops > 0 || err != nil {
			t.Errorf("%s: %d, %d had no room: %v", name, n, drops, err)
		}
		link.CloseCapture()
	}
}

// withMF returns p as a first fragment.
func withMF(p []byte) []byte {
	p = bytes.Clone(p)
	p[6] |= 0x20
	return sum(p)
}

// An inner packet whose ECN is merged is captured as it was received, and as it is delivered.
func TestLink_Captured_ECN(t *testing.T) {
	l := newLab(t, defaultTunnel())
	link := captureLab(t, l, defaultTunnel(), Capture{Snaplen: 100})
	p := outerPacket(uint8(ipv4.CE), inner(ipv4.Header{TOS: uint8(ipv4.ECT0), Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	_, out := l.run(l.Decap, p)
	all := captured(t, link)
	if len(all) != 1 || !bytes.Equal(all[0].received, p) || !bytes.Equal(all[0].Inner(), out) || bytes.Equal(out, p[20:]) {
		t.Errorf("%+v, want\n%x and\n%x", all, p, out)
	}
}

// A packet whose source may not send is captured with the reason of its drop, whatever is in it.
func TestLink_Captured_drops(t *testing.T) {
	g := address(routesets.Address(1))
	tunnel := manyTunnel()
	l, _ := newManyLab(t, tunnel, routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	stranger := ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address("203.0.113.9"), Destination: local}
	remote := ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: g, Destination: local}
	spoofed := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: address("192.0.2.77"), Destination: innerA}, udp(8))
	for _, drops := range []bool{false, true} {
		link := captureLab(t, l, tunnel, Capture{Snaplen: 1000, Drops: drops})
		for name, p := range map[string][]byte{
			"of a stranger": inner(stranger, spoofed), "empty": inner(stranger, nil), "a few bytes": inner(stranger, []byte{1, 2, 3}), "of a remote": inner(remote, spoofed),
		} {
			if got, _ := l.run(l.Decap, p); got != dropped {
				t.Fatalf("%s: verdict %d", name, got)
			}
			all := captured(t, link)
			if len(all) != 1 || all[0].Why != ReversePath || all[0].Outbound || all[0].Length != len(p) || !bytes.Equal(all[0].received, p) {
				t.Errorf("%s: %+v, want %x", name, all, p)
			}
		}
		link.CloseCapture()
	}
}

// A ring buffer that is not read takes the packets that it has room for, and the others are counted.
func TestLink_NotCaptured(t *testing.T) {
	g := address(routesets.Address(1))
	tunnel := manyTunnel()
	tunnel.MTU = 3000
	l, _ := newManyLab(t, tunnel, routesets.Table(map[netip.Prefix][]fib.Route{netip.MustParsePrefix("10.0.0.0/8"): {{Hops: []fib.Hop{{Gateway: g}}}}}))
	link := captureLab(t, l, tunnel, Capture{Snaplen: 3000}) // each takes 64 KiB of it
	carried := inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: g, Destination: local}, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(2100)))
	dropped := inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: address("203.0.113.9"), Destination: local}, carried[20:])
	const each = 100
	for range each {
		l.run(l.Decap, carried)
		l.run(l.Decap, dropped)
	}
	n, drops, err := link.NotCaptured()
	if err != nil {
		t.Fatal(err)
	}
	if all := captured(t, link); len(all)+int(n+drops) != 2*each || len(all) == 0 || n == 0 || drops == 0 {
		t.Errorf("%d are captured, %d and %d were not, of %d", len(all), n, drops, 2*each)
	}
	if n, drops, err := link.NotCaptured(); n+drops > 0 || err != nil {
		t.Errorf("%d and %d again: %v", n, drops, err)
	}
	for end := time.Now().Add(time.Minute); ; { // a tick passes
		l.run(l.Decap, carried)
		if len(captured(t, link)) > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nothing is captured afterwards")
		}
	}
	link.CloseCapture()
	l.run(l.Decap, carried)
	if n, err := link.Captured(func() bool { return true }, func(*Captured) { t.Error("a packet after the end") }); n > 0 || err != nil {
		t.Error(n, err)
	}
	if n, drops, err := link.NotCaptured(); n+drops > 0 || err != nil {
		t.Errorf("%d and %d after the end: %v", n, drops, err)
	}
}

// Without a descriptor left there is no ring, and the error says so.
func TestExplainCapture(t *testing.T) {
	var unavailable *Unavailable
	if err := explainCapture(unix.EMFILE); !errors.As(err, &unavailable) || unavailable.Why != "no file descriptor is left for a ring buffer: raise the limit (LimitNOFILE=, ulimit -n)" {
		t.Error(err)
	}
}

// The time of a packet in each program, with a capture and without: the median of runs of one packet, which they change.
func BenchmarkObject(b *testing.B) {
	in := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(1400))
	out := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(1400)))
	for name, c := range map[string]Capture{"off": {}, "128": {Snaplen: 128}, "65535": {Snaplen: 65535}} {
		l := newLab(b, defaultTunnel())
		link := captureLab(b, l, defaultTunnel(), c)
		for what, x := range map[string]struct {
			program *ebpf.Program
			packet  []byte
		}{"encap": {l.Encap, in}, "decap": {l.Decap, out}} {
			b.Run(what+"/"+name, func(b *testing.B) {
				frame := append(make([]byte, etherLen), x.packet...)
				frame[12] = 8
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					_, each, err := x.program.Benchmark(frame, 1, nil)
					if err != nil {
						b.Fatal(err)
					}
					if took = append(took, each); i%16 == 0 {
						if _, err := link.Captured(func() bool { return true }, func(*Captured) {}); err != nil {
							b.Fatal(err)
						}
					}
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2]), "ns/packet")
			})
		}
	}
}
