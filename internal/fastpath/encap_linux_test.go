package fastpath

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// eligibleForEncap decides with package encap whether ipip_encap must redirect a packet.
func eligibleForEncap(t Tunnel, p []byte) bool {
	inner, err := ipv4.Parse(p)
	if err != nil || inner.HeaderLen() != ipv4.HeaderLen || inner.TotalLen() != len(p) {
		return false
	}
	outer := outerOf(t)
	return inner.Protocol() != ipv4.ProtocolIPIP &&
		len(p)+encap.Overhead <= t.PathMTU &&
		outer.Encapsulate(buffer(p), inner, 1) == drop.None
}

// checkEncap runs ipip_encap and compares the result with package encap.
func checkEncap(l *lab, t Tunnel, p []byte) (verdict int) {
	l.t.Helper()
	before := l.counters()
	verdict, out := l.run(l.Encap, p)
	after := l.counters()
	if l.checkVerdict(verdict, eligibleForEncap(t, p), p, out, before == after) {
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
	if d := outer.Encapsulate(b, parsed, got.ID()); d != drop.None {
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

// Every TOS and DF, with each setting, gives the bytes that userspace would send.
func TestObject_encap(t *testing.T) {
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
			tunnel := defaultTunnel()
			x.set(&tunnel)
			l := newLab(t, tunnel)
			for tos := range 256 {
				for _, df := range []bool{false, true} {
					p := inner(ipv4.Header{TOS: uint8(tos), DF: df, ID: 77, Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
					if checkEncap(l, tunnel, p) != redirect {
						t.Fatalf("an eligible packet is left to userspace: TOS %#x, DF %v", tos, df)
					}
				}
			}
		})
	}
}

// IDs are consecutive, from 0x8000 to 0xffff.
func TestObject_encapIDs(t *testing.T) {
	tunnel := defaultTunnel()
	l := newLab(t, tunnel) // whose next ID is 0xfffe
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
	for _, want := range []uint16{0xfffe, 0xffff, 0x8000, 0x8001} {
		_, out := l.run(l.Encap, p)
		if got, _ := ipv4.Parse(out); got.ID() != want {
			t.Errorf("ID %#x, want %#x", got.ID(), want)
		}
	}
}

// The mark of the inner packet must not affect the route of the outer one.
func TestObject_encapClearsMark(t *testing.T) {
	l := newLab(t, defaultTunnel())
	var in, out struct { // struct __sk_buff
		_, _, Mark uint32
		_          [180]byte
	}
	in.Mark = 77
	frame := make([]byte, etherLen)
	frame[12] = 8
	frame = append(frame, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))...)
	got, err := l.Encap.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, 256), Context: in, ContextOut: &out})
	if err != nil || int(got) != redirect || out.Mark != 0 {
		t.Errorf("verdict %d, %v, mark %d", got, err, out.Mark)
	}
}

func TestObject_encapPassesToUserspace(t *testing.T) {
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
	l := newLab(t, defaultTunnel())
	for name, p := range packets {
		if got := checkEncap(l, defaultTunnel(), p); got != next {
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
		if got := checkEncap(l, defaultTunnel(), p); got != redirect {
			t.Errorf("%s: verdict %d, want it redirected", name, got)
		}
	}
}

// Without TX_ENABLED, or without the map entry, all packets pass to userspace.
func TestObject_encapDisabled(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.TxEnabled = false
	l := newLab(t, tunnel)
	p := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(8))
	if got, _ := l.run(l.Encap, p); got != next {
		t.Errorf("not running, and the verdict is %d", got)
	}
	if err := l.TxTunnels.Delete(uint32(loopback)); err != nil {
		t.Fatal(err)
	}
	if got, _ := l.run(l.Encap, p); got != next {
		t.Errorf("no such tunnel, and the verdict is %d", got)
	}
}

// fuzzRounds is how many random packets each program gets.
const fuzzRounds = 20000

func TestObject_encapRandomPackets(t *testing.T) {
	tunnel := defaultTunnel()
	tunnel.DontFragmentInherit, tunnel.TTL = true, 0
	l := newLab(t, tunnel)
	r := rand.New(rand.NewPCG(1, 2))
	redirected := 0
	for range fuzzRounds {
		h := ipv4.Header{
			TOS: uint8(r.Uint32()), DF: r.IntN(2) == 0, TTL: uint8(r.IntN(3)), MF: r.IntN(8) == 0,
			Protocol: pick[uint8](r, ipv4.ProtocolUDP, ipv4.ProtocolTCP, ipv4.ProtocolICMP, ipv4.ProtocolIPIP),
			Source:   pick(r, innerA, innerA, local, remote), Destination: pick(r, innerB, innerB, remote),
		}
		if checkEncap(l, tunnel, mutate(r, inner(h, make([]byte, r.IntN(1480))), 0)) == redirect {
			redirected++
		}
	}
	if redirected < fuzzRounds/20 || redirected > fuzzRounds*19/20 {
		t.Errorf("%d of %d were redirected: too few or too many of the random packets", redirected, fuzzRounds)
	}
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// mutate corrupts up to two header bytes of a packet, and sometimes its length. at is the
// offset of the inner header.
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
	// Mostly with valid checksums, or few packets would get past that check.
	if r.IntN(4) != 0 && len(b) >= at+ipv4.HeaderLen {
		sum(b[at:])
	}
	if r.IntN(8) != 0 {
		sum(b)
	}
	return b
}
