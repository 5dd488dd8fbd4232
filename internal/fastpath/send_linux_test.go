package fastpath

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"ipipd/encap"
	"ipipd/internal/ipv4"
)

// plainToSend says, in the words of encap, whether a packet that the host sends is
// one that the kernel is to carry.
func plainToSend(t Tunnel, p []byte) bool {
	inner, err := ipv4.Parse(p)
	if err != nil || inner.HeaderLen() != ipv4.HeaderLen || inner.TotalLen() != len(p) {
		return false
	}
	outer := outerOf(t)
	return inner.Protocol() != ipv4.ProtocolIPIP &&
		len(p)+encap.Overhead <= t.PathMTU &&
		outer.Encapsulate(buffer(p), inner, 1) == encap.DropNone
}

// checkSend runs send and holds it against encap.
func checkSend(l *lab, t Tunnel, p []byte) (verdict int) {
	l.t.Helper()
	before := l.counters()
	verdict, out := l.run(l.Send, p)
	after := l.counters()
	if l.leftAlone(verdict, plainToSend(t, p), p, out, before == after) {
		return verdict
	}
	b := buffer(p)
	parsed, err := ipv4.Parse(b.Bytes())
	if err != nil {
		l.t.Fatal(err)
	}
	got, err := ipv4.Parse(out)
	if err != nil {
		l.t.Fatalf("%v: %x", err, out)
	}
	outer := outerOf(t)
	if d := outer.Encapsulate(b, parsed, got.ID()); d != encap.DropNone {
		l.t.Fatal(d)
	}
	if !bytes.Equal(out, b.Bytes()) {
		l.t.Fatalf("encapsulated\n%x into\n%x, want\n%x", p, out, b.Bytes())
	}
	if (got.ID() == 0) != got.DF() {
		l.t.Fatalf("ID %d with DF %v", got.ID(), got.DF())
	}
	before.TxPackets++
	before.TxBytes += uint64(len(p))
	if before != after {
		l.t.Fatalf("counted %+v, want %+v", after, before)
	}
	return verdict
}

func TestSendEncapsulatesAsUserspaceDoes(t *testing.T) {
	for _, x := range []struct {
		name string
		set  func(*Tunnel)
	}{
		{"RouterOS's defaults", func(*Tunnel) {}},
		{"dscp 46", func(t *Tunnel) { t.DSCP = 46 }},
		{"dscp 0", func(t *Tunnel) { t.DSCP = 0 }},
		{"dont-fragment inherit", func(t *Tunnel) { t.DontFragmentInherit = true }},
		{"ttl inherit", func(t *Tunnel) { t.TTL = 0 }},
		{"ttl 3", func(t *Tunnel) { t.TTL = 3 }},
	} {
		t.Run(x.name, func(t *testing.T) {
			tunnel := plainTunnel()
			x.set(&tunnel)
			l := newLab(t, tunnel)
			for tos := range 256 {
				for _, df := range []bool{false, true} {
					p := inner(ipv4.Header{TOS: uint8(tos), DF: df, ID: 77, Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
					if checkSend(l, tunnel, p) != redirect {
						t.Fatalf("a plain packet is left to userspace: TOS %#x, DF %v", tos, df)
					}
				}
			}
		})
	}
}

func TestIdentifiersFollowEachOtherInTheUpperHalf(t *testing.T) {
	tunnel := plainTunnel()
	l := newLab(t, tunnel) // which begins two before the end
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
	for _, want := range []uint16{0xfffe, 0xffff, 0x8000, 0x8001} {
		_, out := l.run(l.Send, p)
		if got, _ := ipv4.Parse(out); got.ID() != want {
			t.Errorf("ID %#x, want %#x", got.ID(), want)
		}
	}
}

// What the inner packet was marked with is for the inner packet's route.
func TestTheMarkOfTheInnerPacketIsTakenOff(t *testing.T) {
	l := newLab(t, plainTunnel())
	var in, out struct { // struct __sk_buff
		_, _, Mark uint32
		_          [180]byte
	}
	in.Mark = 77
	frame := make([]byte, etherLen)
	frame[12] = 8
	frame = append(frame, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))...)
	got, err := l.Send.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, 256), Context: in, ContextOut: &out})
	if err != nil || int(got) != redirect || out.Mark != 0 {
		t.Errorf("verdict %d, %v, mark %d", got, err, out.Mark)
	}
}

func TestSendLeavesToUserspaceWhatIsNotPlain(t *testing.T) {
	base := ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}
	with := func(change func(*ipv4.Header)) ipv4.Header { h := base; change(&h); return h }
	change := func(f func(b []byte) []byte) []byte { return f(inner(base, udp(40))) }
	packets := map[string][]byte{
		"IPv6":                       change(func(b []byte) []byte { b[0] = 0x60; return b }),
		"options":                    change(func(b []byte) []byte { b[0] = 0x46; return sum(b) }),
		"a header that is too short": change(func(b []byte) []byte { b[0] = 0x44; return b }),
		"something behind the end":   change(func(b []byte) []byte { return append(b, 0) }),
		"cut short":                  change(func(b []byte) []byte { return b[:len(b)-1] }),
		"TTL 0":                      change(func(b []byte) []byte { b[8] = 0; return sum(b) }),
		"a tunnel's packet":          inner(with(func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolIPIP }), inner(base, udp(0))),
		"from the remote":            inner(with(func(h *ipv4.Header) { h.Source = remote }), udp(0)),
		"from local to remote":       inner(with(func(h *ipv4.Header) { h.Source, h.Destination = local, remote }), udp(0)),
		"one byte too long":          inner(base, udp(1481-28)),
	}
	l := newLab(t, plainTunnel())
	for name, p := range packets {
		if got := checkSend(l, plainTunnel(), p); got != next {
			t.Errorf("%s: verdict %d, want it left to userspace", name, got)
		}
	}
	for name, p := range map[string][]byte{
		"as long as it can be": inner(base, udp(1480-28)),
		"a first fragment":     inner(with(func(h *ipv4.Header) { h.MF = true }), udp(0)),
		"a later fragment":     inner(with(func(h *ipv4.Header) { h.FragmentOffset = 8 }), udp(0)),
		"nothing in it":        inner(base, nil),
		"to the remote":        inner(with(func(h *ipv4.Header) { h.Destination = remote }), udp(0)),
	} {
		if got := checkSend(l, plainTunnel(), p); got != redirect {
			t.Errorf("%s: verdict %d, want it carried", name, got)
		}
	}
}

func TestSendCarriesNothingWithoutTheFlagOrTheTunnel(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.Send = false
	l := newLab(t, tunnel)
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
	if got, _ := l.run(l.Send, p); got != next {
		t.Errorf("not running, and the verdict is %d", got)
	}
	if err := l.Paths.Delete(uint32(loopback)); err != nil {
		t.Fatal(err)
	}
	if got, _ := l.run(l.Send, p); got != next {
		t.Errorf("no such tunnel, and the verdict is %d", got)
	}
}

// storm is how many hostile packets each program gets.
const storm = 20000

func TestSendHoldsInAStormOfBrokenPackets(t *testing.T) {
	tunnel := plainTunnel()
	tunnel.DontFragmentInherit, tunnel.TTL = true, 0
	l := newLab(t, tunnel)
	r := rand.New(rand.NewPCG(1, 2))
	carried := 0
	for range storm {
		h := ipv4.Header{
			TOS: uint8(r.Uint32()), DF: r.IntN(2) == 0, TTL: uint8(r.IntN(3)), MF: r.IntN(8) == 0,
			Protocol: pick[uint8](r, ipv4.ProtocolUDP, ipv4.ProtocolTCP, ipv4.ProtocolICMP, ipv4.ProtocolIPIP),
			Source:   pick(r, innerA, innerA, local, remote), Destination: pick(r, innerB, innerB, remote),
		}
		if checkSend(l, tunnel, mutate(r, inner(h, make([]byte, r.IntN(1480))), 0)) == redirect {
			carried++
		}
	}
	if carried < storm/20 || carried > storm*19/20 {
		t.Errorf("%d of %d were carried: the storm is too weak or too strong", carried, storm)
	}
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// mutate breaks a packet, more often than not, in a few bytes of its headers, or
// in its length. at is where the inner header begins.
func mutate(r *rand.Rand, b []byte, at int) []byte {
	for range r.IntN(3) {
		i := r.IntN(min(len(b), at+ipv4.HeaderLen+14))
		b[i] = pick(r, b[i]^1<<r.IntN(8), uint8(r.Uint32()), 0, 0xff)
	}
	switch r.IntN(8) {
	case 0:
		b = b[:max(20, len(b)-r.IntN(30))]
	case 1:
		b = append(b, make([]byte, r.IntN(30))...)
	}
	// Mostly the checksums are right nevertheless, or little would be looked at.
	if r.IntN(4) != 0 && len(b) >= at+ipv4.HeaderLen {
		sum(b[at:])
	}
	if r.IntN(8) != 0 {
		sum(b)
	}
	return b
}
