package fastpath

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// decapsulate is what userspace makes of an outer packet; nil if that is not an
// inner packet for the host.
func decapsulate(t Tunnel, p []byte) []byte {
	b := packet.New(len(p))
	b.Set(p)
	outer, d := encap.ParseOuter(b)
	if d != encap.DropNone {
		return nil
	}
	kind, d := encap.Decapsulate(b, outer, t.Local, t.Remote)
	if d != encap.DropNone || kind != encap.KindData {
		return nil
	}
	return b.Bytes()
}

// plainToReceive says, in the words of encap, whether an outer packet is one that
// the kernel is to carry.
func plainToReceive(t Tunnel, p []byte) bool {
	in := decapsulate(t, p)
	if in == nil || p[0] != 0x45 || in[0] != 0x45 || len(in)+ipv4.HeaderLen != len(p) || len(in) > t.MTU {
		return false
	}
	inner, err := ipv4.Parse(in)
	if err != nil {
		return false
	}
	if inner.Source() == t.Local { // a probe, or none, with any destination
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

// checkReceive runs receive and holds it against encap.
func checkReceive(l *lab, t Tunnel, p []byte) (verdict int) {
	l.t.Helper()
	before := l.counters()
	verdict, out := l.run(l.Receive, p)
	after := l.counters()
	if l.leftAlone(verdict, plainToReceive(t, p), p, out, before == after) {
		return verdict
	}
	in := decapsulate(t, p)
	if !bytes.Equal(out, in) {
		l.t.Fatalf("decapsulated\n%x into\n%x, want\n%x", p, out, in)
	}
	if after.Heard == 0 {
		l.t.Fatal("the peer was not heard")
	}
	before.RxPackets++
	before.RxBytes += uint64(len(in))
	before.Heard = after.Heard
	if before != after {
		l.t.Fatalf("counted %+v, want %+v", after, before)
	}
	return verdict
}

// received makes the outer packet in which the peer sends p.
func received(tos uint8, p []byte) []byte {
	return inner(ipv4.Header{TOS: tos, ID: 9, Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local}, p)
}

func TestReceiveMergesECNAsUserspaceDoes(t *testing.T) {
	l := newLab(t, plainTunnel())
	for outer := range 256 {
		for in := range 256 {
			if in>>2 != outer>>2 && in>>2 != 0x3f {
				continue // all codepoints, with two DSCPs
			}
			p := received(uint8(outer), inner(ipv4.Header{TOS: uint8(in), Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
			want := redirect
			if _, ok := encap.DecapsulatedECN(ipv4.ECN(in&3), ipv4.ECN(outer&3)); !ok {
				want = next
			}
			if got := checkReceive(l, plainTunnel(), p); got != want {
				t.Errorf("outer TOS %#x, inner %#x: verdict %d, want %d", outer, in, got, want)
			}
		}
	}
}

// RFC 1624 exists because two updates of a checksum differ where the sum is zero.
func TestECNIsMergedWithEveryHeaderChecksum(t *testing.T) {
	l := newLab(t, plainTunnel())
	for id := 0; id < 1<<16; id += 1 {
		if id > 600 && id < 1<<16-600 && id%13 != 0 {
			continue
		}
		p := received(uint8(ipv4.CE), inner(ipv4.Header{TOS: uint8(ipv4.ECT0), ID: uint16(id), Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(0)))
		if checkReceive(l, plainTunnel(), p) != redirect {
			t.Fatalf("ID %d is left to userspace", id)
		}
	}
}

func TestReceiveLeavesToUserspaceWhatIsNotPlain(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.EchoSource, tunnel.EchoDestination = innerB, innerA
	l := newLab(t, tunnel)
	base := ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}
	with := func(change func(*ipv4.Header)) ipv4.Header { h := base; change(&h); return h }
	change := func(f func(b []byte) []byte) []byte { return f(received(0, inner(base, udp(40)))) }
	inside := func(f func(b []byte)) []byte {
		return change(func(b []byte) []byte { f(b[20:]); sum(b[20:]); return b })
	}
	transport := func(protocol uint8, payload []byte) []byte {
		return received(0, inner(with(func(h *ipv4.Header) { h.Protocol = protocol }), payload))
	}
	reflect := inner(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}, nil)
	for name, p := range map[string][]byte{
		"an empty probe":                    received(0, nil),
		"a reflect probe":                   received(0, reflect),
		"a reflect probe from behind a NAT": received(0, inner(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: innerB}, nil)),
		"the tunnel in itself":              received(0, received(0, inner(base, udp(0)))),
		"the tunnel in itself, a fragment":  received(0, inner(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local, FragmentOffset: 8}, make([]byte, 24))),
		"what looks like a reflect probe":   received(0, inner(with(func(h *ipv4.Header) { h.Source, h.Destination = local, remote }), udp(0))),
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
		"longer than the TUN's MTU":         received(0, inner(base, udp(1481-28))),
		"CE on Not-ECT":                     received(uint8(ipv4.CE), inner(base, udp(0))),
		"a SYN":                             transport(ipv4.ProtocolTCP, tcp(0x02)),
		"a SYN-ACK":                         transport(ipv4.ProtocolTCP, tcp(0x12)),
		"a TCP header that is cut short":    transport(ipv4.ProtocolTCP, tcp(0)[:10]),
		"the first fragment with a SYN":     received(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.MF = ipv4.ProtocolTCP, true }), tcp(2))),
	} {
		if got := checkReceive(l, tunnel, p); got != next {
			t.Errorf("%s: verdict %d, want it left to userspace", name, got)
		}
	}
	for name, p := range map[string][]byte{
		"TCP":                         transport(ipv4.ProtocolTCP, tcp(0x18)),
		"as long as it can be":        received(0, inner(base, udp(1480-28))),
		"a tunnel in the tunnel":      transport(ipv4.ProtocolIPIP, inner(base, udp(0))),
		"another tunnel in it":        received(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.Destination = ipv4.ProtocolIPIP, local }), inner(base, udp(0)))),
		"ICMP of others":              received(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.Source = ipv4.ProtocolICMP, remote }), make([]byte, 8))),
		"a first fragment":            received(0, inner(with(func(h *ipv4.Header) { h.MF = true }), udp(0))),
		"a later fragment of TCP":     received(0, inner(with(func(h *ipv4.Header) { h.Protocol, h.FragmentOffset = ipv4.ProtocolTCP, 8 }), tcp(2))),
		"outer DF":                    change(func(b []byte) []byte { b[6] |= 0x40; return sum(b) }),
		"nothing in the inner packet": received(0, inner(base, nil)),
	} {
		if got := checkReceive(l, tunnel, p); got != redirect {
			t.Errorf("%s: verdict %d, want it carried", name, got)
		}
	}
}

func TestASYNIsCarriedWhereNothingIsClamped(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.ClampTCPMSS = false
	l := newLab(t, tunnel)
	p := received(0, inner(ipv4.Header{Protocol: ipv4.ProtocolTCP, Source: innerB, Destination: innerA}, tcp(2)))
	if got := checkReceive(l, tunnel, p); got != redirect {
		t.Errorf("verdict %d", got)
	}
}

// With tunnels over two devices the program hangs on both. What enters by the
// other's takes the IP stack, and its rp_filter.
func TestReceiveUnderlay(t *testing.T) {
	tunnel := plainTunnel()
	p := received(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	for underlay, want := range map[int]int{loopback: redirect, loopback + 1: next} {
		tunnel.Underlay = underlay
		l := newLab(t, tunnel)
		if got, _ := l.run(l.Receive, p); got != want {
			t.Errorf("underlay %d: verdict %d, want %d", underlay, got, want)
		}
	}
}

func TestReceiveCarriesNothingWithoutTheFlag(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.Receive = false
	l := newLab(t, tunnel)
	p := received(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	if got, _ := l.run(l.Receive, p); got != next {
		t.Errorf("verdict %d", got)
	}
}

// Whom a frame is for the kernel knows from its Ethernet address.
func TestReceiveLeavesFramesForOthersAlone(t *testing.T) {
	l := newLab(t, plainTunnel())
	p := received(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(8)))
	for first, want := range map[byte]int{0: redirect, 2: next, 1: next, 0xff: next} { // the loopback's is zero
		frame := append(make([]byte, etherLen), p...)
		frame[0], frame[12] = first, 8
		if got, err := l.Receive.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame))}); err != nil || int(int32(got)) != want {
			t.Errorf("first byte %#x: verdict %d, %v, want %d", first, int32(got), err, want)
		}
	}
}

func TestReceiveHoldsInAStormOfHostilePackets(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.EchoSource, tunnel.EchoDestination = innerB, innerA
	l := newLab(t, tunnel)
	r := rand.New(rand.NewPCG(3, 4))
	carried := 0
	for range storm {
		in := inner(ipv4.Header{
			TOS: uint8(r.Uint32()), TTL: uint8(r.IntN(4)), MF: r.IntN(8) == 0, FragmentOffset: pick(r, 0, 0, 0, 8),
			Protocol: pick[uint8](r, ipv4.ProtocolUDP, ipv4.ProtocolTCP, ipv4.ProtocolICMP, ipv4.ProtocolIPIP),
			Source:   pick(r, innerB, innerB, local, remote), Destination: pick(r, innerA, innerA, local, remote),
		}, make([]byte, r.IntN(1490)))
		if checkReceive(l, tunnel, mutate(r, received(uint8(r.Uint32()), in), ipv4.HeaderLen)) == redirect {
			carried++
		}
	}
	if carried < storm/20 || carried > storm*19/20 {
		t.Errorf("%d of %d were carried: the storm is too weak or too strong", carried, storm)
	}
}
