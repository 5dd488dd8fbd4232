package fastpath

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// decapsulate returns the inner packet that userspace would deliver, or nil if it would
// drop the outer packet or take it for a probe.
func decapsulate(t Tunnel, p []byte) []byte {
	b := packet.New(len(p))
	b.Set(p)
	outer, d := encap.ParseOuter(b)
	if d != drop.None {
		return nil
	}
	_, kind, d := encap.Decapsulate(b, outer, t.Local, t.Remote)
	if d != drop.None || kind != encap.KindData {
		return nil
	}
	return b.Bytes()
}

// eligibleForDecap decides with package encap whether ipip_decap must redirect a packet.
func eligibleForDecap(t Tunnel, p []byte) bool {
	in := decapsulate(t, p)
	if in == nil || p[0] != 0x45 || in[0] != 0x45 || len(in)+ipv4.HeaderLen != len(p) || len(in) > t.MTU {
		return false
	}
	inner, err := ipv4.Parse(in)
	if err != nil {
		return false
	}
	if inner.Source() == t.Local || inner.Protocol() == ipv4.ProtocolIPIP && inner.Destination() == t.Remote { // a probe, or looks like one
		return false
	}
	if inner.FragmentOffset() != 0 {
		return true
	}
	switch inner.Protocol() {
	case ipv4.ProtocolTCP:
		return !t.ClampTCPMSS || len(inner.Payload()) > 13 && inner.Payload()[13]&2 == 0
	case ipv4.ProtocolICMP:
		return inner.Source() != t.EchoSource || inner.Destination() != t.EchoDestination
	}
	return true
}

// checkDecap runs ipip_decap and compares the result with package encap.
func checkDecap(l *lab, t Tunnel, p []byte) (verdict int) {
	l.t.Helper()
	before := l.counters()
	verdict, out := l.run(l.Decap, p)
	after := l.counters()
	if l.checkVerdict(verdict, eligibleForDecap(t, p), p, out, before == after) {
		return verdict
	}
	in := decapsulate(t, p)
	if !bytes.Equal(out, in) {
		l.t.Fatalf("decapsulated\n%x into\n%x, want\n%x", p, out, in)
	}
	if after.LastReceived == 0 {
		l.t.Fatal("last_received is not set")
	}
	before.RxPackets++
	before.RxBytes += uint64(len(in))
	before.LastReceived = after.LastReceived
	if before != after {
		l.t.Fatalf("counted %+v, want %+v", after, before)
	}
	return verdict
}

// outerPacket returns the packet that the remote sends with p inside.
func outerPacket(tos uint8, p []byte) []byte {
	return inner(ipv4.Header{TOS: tos, ID: 9, Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local}, p)
}

// All combinations of outer and inner ECN (RFC 6040), as userspace handles them.
func TestObject_decapECN(t *testing.T) {
	l := newLab(t, defaultTunnel())
	for outer := range 256 {
		for in := range 256 {
			if in>>2 != outer>>2 && in>>2 != 0x3f {
				continue // all codepoints, with two DSCPs
			}
			p := outerPacket(uint8(outer), inner(ipv4.Header{TOS: uint8(in), Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
			want := redirect
			if _, ok := encap.DecapsulatedECN(ipv4.ECN(in&3), ipv4.ECN(outer&3)); !ok {
				want = next
			}
			if got := checkDecap(l, defaultTunnel(), p); got != want {
				t.Errorf("outer TOS %#x, inner %#x: verdict %d, want %d", outer, in, got, want)
			}
		}
	}
}

// The incremental checksum update must be right for every sum: RFC 1624 corrects RFC 1141
// for a sum of zero.
func TestObject_decapECNChecksum(t *testing.T) {
	l := newLab(t, defaultTunnel())
	for id := 0; id < 1<<16; id += 1 {
		if id > 600 && id < 1<<16-600 && id%13 != 0 {
			continue
		}
		p := outerPacket(uint8(ipv4.CE), inner(ipv4.Header{TOS: uint8(ipv4.ECT0), ID: uint16(id), Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(0)))
		if checkDecap(l, defaultTunnel(), p) != redirect {
			t.Fatalf("ID %d is left to userspace", id)
		}
	}
}

func TestObject_decapPassesToUserspace(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.EchoSource, tunnel.EchoDestination = innerB, innerA
	l := newLab(t, tunnel)
	base := ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}
	with := func(change func(*ipv4.Header)) ipv4.Header { h := base; change(&h); return h }
	change := func(f func(b []byte) []byte) []byte { return f(outerPacket(0, inner(base, udp(40)))) }
	inside := func(f func(b []byte)) []byte {
		return change(func(b []byte) []byte { f(b[20:]); sum(b[20:]); return b })
	}
	transport := func(protocol uint8, payload []byte) []byte {
		return outerPacket(0, inner(with(func(h *ipv4.Header) { h.Protocol = protocol }), payload))
	}
	reflect := inner(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}, nil)
	for name, p := range map[string][]byte{
		"an empty probe":                    outerPacket(0, nil),
		"a reflect probe":                   outerPacket(0, reflect),
		"a reflect probe to behind a NAT":   outerPacket(0, inner(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: innerA, Destination: remote}, nil)),
		"a reflect probe from behind a NAT": outerPacket(0, inner(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: innerB}, nil)),
		"the tunnel in itself":              outerPacket(0, outerPacket(0, inner(base, udp(0)))),
		"the tunnel in itself, a fragment":  outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local, FragmentOffset: 8}, make([]byte, 24))),
		"what looks like a reflect probe":   outerPacket(0, inner(with(func(h *ipv4.Header) { h.Source, h.Destination = local, remote }), udp(0))),
		"an echo reply":                     transport(ipv4.ProtocolICMP, make([]byte, 8)),
		"an unknown peer":                   change(func(b []byte) []byte { b[15]++; return sum(b) }),
		"another destination":               change(func(b []byte) []byte { b[19]++; return sum(b) }),
		"the addresses exchanged":           inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}, inner(base, udp(0))),
		"outer IPv6":                        change(func(b []byte) []byte { b[0] = 0x65; return b }),
		"outer options":                     change(func(b []byte) []byte { b[0] = 0x46; return sum(b) }),
		"outer first fragment":              change(func(b []byte) []byte { b[6] |= 0x20; return sum(b) }),
		"outer later fragment":              change(func(b []byte) []byte { b[7] = 1; return sum(b) }),
		"outer protocol":                    change(func(b []byte) []byte { b[9] = 47; return sum(b) }),
		"outer checksum":                    change(func(b []byte) []byte { b[10]++; return b }),
		"outer length too long":             change(func(b []byte) []byte { b[3]++; return sum(b) }),
		"outer length too short":            change(func(b []byte) []byte { b[3]--; return sum(b) }),
		"padding":                           change(func(b []byte) []byte { return append(b, 0, 0) }),
		"inner IPv6":                        inside(func(b []byte) { b[0] = 0x60 }),
		"inner options":                     inside(func(b []byte) { b[0] = 0x46 }),
		"inner header too short":            change(func(b []byte) []byte { b[20] = 0x44; return b }),
		"inner length too long":             inside(func(b []byte) { b[3]++ }),
		"inner length too short":            inside(func(b []byte) { b[3]-- }),
		"inner checksum":                    change(func(b []byte) []byte { b[30]++; return b }),
		"inner TTL 0":                       inside(func(b []byte) { b[8] = 0 }),
		"longer than the TUN's MTU":         outerPacket(0, inner(base, udp(1481-28))),
		"CE on Not-ECT":                     outerPacket(uint8(ipv4.CE), inner(base, udp(0))),
		"a SYN":                             transport(ipv4.ProtocolTCP, tcp(0x02)),
		"a SYN-ACK":                         transport(ipv4.ProtocolTCP, tcp(0x12)),
		"a TCP header that is cut short":    transport(ipv4.ProtocolTCP, tcp(0)[:10]),
		"the first fragment with a SYN":     outerPacket(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.MF = ipv4.ProtocolTCP, true }), tcp(2))),
	} {
		if got := checkDecap(l, tunnel, p); got != next {
			t.Errorf("%s: verdict %d, want it left to userspace", name, got)
		}
	}
	for name, p := range map[string][]byte{
		"TCP":                         transport(ipv4.ProtocolTCP, tcp(0x18)),
		"as long as it can be":        outerPacket(0, inner(base, udp(1480-28))),
		"a tunnel in the tunnel":      transport(ipv4.ProtocolIPIP, inner(base, udp(0))),
		"another tunnel in it":        outerPacket(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.Destination = ipv4.ProtocolIPIP, local }), inner(base, udp(0)))),
		"ICMP of others":              outerPacket(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.Source = ipv4.ProtocolICMP, remote }), make([]byte, 8))),
		"a first fragment":            outerPacket(0, inner(with(func(h *ipv4.Header) { h.MF = true }), udp(0))),
		"a later fragment of TCP":     outerPacket(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.FragmentOffset = ipv4.ProtocolTCP, 8 }), tcp(2))),
		"outer DF":                    change(func(b []byte) []byte { b[6] |= 0x40; return sum(b) }),
		"nothing in the inner packet": outerPacket(0, inner(base, nil)),
	} {
		if got := checkDecap(l, tunnel, p); got != redirect {
			t.Errorf("%s: verdict %d, want it redirected", name, got)
		}
	}
}

// Without RX_CLAMP_MSS a SYN is redirected.
func TestObject_decapSYNWithoutClamping(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.ClampTCPMSS = false
	l := newLab(t, tunnel)
	p := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolTCP, Source: innerB, Destination: innerA}, tcp(2)))
	if got := checkDecap(l, tunnel, p); got != redirect {
		t.Errorf("verdict %d", got)
	}
}

// With tunnels over two devices the program is attached to both. A packet received on the
// other tunnel's device takes the IP stack with its rp_filter.
func TestObject_decapUnderlay(t *testing.T) {
	tunnel := defaultTunnel()
	p := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	for underlay, want := range map[int]int{loopback: redirect, loopback + 1: next} {
		tunnel.UnderlayIfindex = underlay
		l := newLab(t, tunnel)
		if got, _ := l.run(l.Decap, p); got != want {
			t.Errorf("underlay %d: verdict %d, want %d", underlay, got, want)
		}
	}
}

// Without RX_ENABLED all packets pass to userspace.
func TestObject_decapDisabled(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.RxEnabled = false
	l := newLab(t, tunnel)
	p := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	if got, _ := l.run(l.Decap, p); got != next {
		t.Errorf("verdict %d", got)
	}
}

// Frames with another destination MAC (skb->pkt_type) pass.
func TestObject_decapOtherHost(t *testing.T) {
	l := newLab(t, defaultTunnel())
	p := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	for first, want := range map[byte]int{0: redirect, 2: next, 1: next, 0xff: next} { // the loopback's is zero
		frame := append(make([]byte, etherLen), p...)
		frame[0], frame[12] = first, 8
		if got, err := l.Decap.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame))}); err != nil || int(int32(got)) != want {
			t.Errorf("first byte %#x: verdict %d, %v, want %d", first, int32(got), err, want)
		}
	}
}

func TestObject_decapRandomPackets(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.EchoSource, tunnel.EchoDestination = innerB, innerA
	l := newLab(t, tunnel)
	r := rand.New(rand.NewPCG(3, 4))
	redirected := 0
	for range fuzzRounds {
		in := inner(ipv4.Header{
			TOS: uint8(r.Uint32()), TTL: uint8(r.IntN(4)), MF: r.IntN(8) == 0, FragmentOffset: pick(r, 0, 0, 0, 8),
			Protocol: pick[uint8](r, ipv4.ProtocolUDP, ipv4.ProtocolTCP, ipv4.ProtocolICMP, ipv4.ProtocolIPIP),
			Source:   pick(r, innerB, innerB, local, remote), Destination: pick(r, innerA, innerA, local, remote),
		}, make([]byte, r.IntN(1490)))
		if checkDecap(l, tunnel, mutate(r, outerPacket(uint8(r.Uint32()), in), ipv4.HeaderLen)) == redirect {
			redirected++
		}
	}
	if redirected < fuzzRounds/20 || redirected > fuzzRounds*19/20 {
		t.Errorf("%d of %d were redirected: too few or too many of the random packets", redirected, fuzzRounds)
	}
}
