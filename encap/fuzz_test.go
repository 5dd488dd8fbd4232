package encap_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// fixChecksum returns b with a valid header checksum, if b is a packet, so that the fuzzer gets
// past that check.
func fixChecksum(b []byte) []byte {
	b = bytes.Clone(b)
	if h, n, err := ipv4.ParseHeader(b); err == nil && h.TotalLen >= n {
		binary.BigEndian.PutUint16(b[10:], 0)
		binary.BigEndian.PutUint16(b[10:], ipv4.Checksum(b[:n], 0))
	}
	return b
}

// FuzzOuterEncapsulate_roundTrip checks that Decapsulate returns the packet that Encapsulate
// got, byte for byte, for any Outer.
func FuzzOuterEncapsulate_roundTrip(f *testing.F) {
	f.Add(golden(f, goldenInner), int8(encap.InheritDSCP), false, uint8(255), uint16(1))
	f.Add(segment(ipv4.ProtocolTCP, 3, false), int8(63), true, uint8(0), uint16(65535))
	f.Fuzz(func(t *testing.T, p []byte, dscp int8, df bool, ttl uint8, id uint16) {
		p = fixChecksum(p)
		b := bufferOf(p)
		inner, err := ipv4.Parse(b.Bytes())
		if err != nil || dscp < encap.InheritDSCP || dscp > 63 {
			return
		}
		o := encap.Outer{Local: local, Remote: remote, DSCP: int(dscp), DontFragmentInherit: df, TTL: ttl}
		d := o.Encapsulate(b, inner, id)
		switch {
		case d == drop.InnerTTLZero && inner.TTL() == 0,
			d == drop.InnerTooLong && inner.TotalLen() > encap.MaxInner,
			d == drop.Loop && (inner.Source() == remote || bytes.Contains(p, append(local[:], remote[:]...))):
			return
		case d != drop.None:
			t.Fatal(d)
		}
		outer, d := encap.ParseOuter(b)
		if d != drop.None {
			t.Fatal(d)
		}
		if outer.ECN() != inner.ECN() || outer.DF() != (df && inner.DF()) || outer.DF() && outer.ID() != 0 {
			t.Fatalf("outer %+v, inner %+v", outer.Header(), inner.Header())
		}
		// At the other end remote and local are the other way round.
		view, kind, d := encap.Decapsulate(b, outer, remote, local)
		if d != drop.None || kind != encap.KindData {
			t.Fatal(kind, d)
		}
		if !bytes.Equal(b.Bytes(), p[:inner.TotalLen()]) || !bytes.Equal(view.Bytes(), b.Bytes()) {
			t.Fatalf("% x came out as % x", p, b.Bytes())
		}
	})
}

// FuzzDecapsulate checks that no input panics, and that what is accepted as an inner packet is
// valid.
func FuzzDecapsulate(f *testing.F) {
	f.Add(build(received(), golden(f, goldenInner)), false)
	f.Add(build(received(), golden(f, goldenReflect)), true)
	f.Add(build(received(), segment(ipv4.ProtocolTCP, 10, true)), true)
	f.Fuzz(func(t *testing.T, p []byte, fixInner bool) {
		p = fixChecksum(p)
		if _, n, err := ipv4.ParseHeader(p); err == nil && fixInner {
			copy(p[n:], fixChecksum(p[n:]))
		}
		b := bufferOf(p)
		outer, d := encap.ParseOuter(b)
		if d != drop.None {
			return
		}
		view, kind, d := encap.Decapsulate(b, outer, outer.Destination(), outer.Source())
		if d != drop.None {
			return
		}
		if kind == encap.KindEmpty {
			if b.Len() != 0 || view.TotalLen() != 0 {
				t.Fatalf("% x is empty", b.Bytes())
			}
			return
		}
		inner := parse(t, b.Bytes())
		if !bytes.Equal(view.Bytes(), b.Bytes()) {
			t.Fatalf("the view is % x of % x", view.Bytes(), b.Bytes())
		}
		if inner.TotalLen() != b.Len() || inner.TTL() == 0 || !inner.HeaderChecksumValid() {
			t.Fatalf("% x was let through", b.Bytes())
		}
		ours, back := inner.Source() == outer.Destination(), inner.Destination() == outer.Source()
		reflects := (ours || back) && inner.Protocol() == ipv4.ProtocolIPIP && inner.TotalLen() == ipv4.HeaderLen && !inner.IsFragment()
		if reflects != (kind == encap.KindReflect) || ours && back && !reflects {
			t.Fatalf("kind %v of % x", kind, b.Bytes())
		}
		if inner.Source() == outer.Source() && inner.Destination() == outer.Destination() && inner.Protocol() == ipv4.ProtocolIPIP && !reflects {
			t.Fatalf("% x inside itself", b.Bytes())
		}
		if kind == encap.KindReflect {
			if encap.ReflectAnswer(b, outer.Destination(), outer.Source()) == drop.None {
				answer := parse(t, b.Bytes())
				if !answer.HeaderChecksumValid() || answer.Source() != outer.Destination() || answer.Destination() != outer.Source() {
					t.Fatalf("answer % x", b.Bytes())
				}
			}
			return
		}
		if d := encap.DeriveOffload(b, view, 1480); d == drop.None && b.SegmentSize > 0 && b.Checksum != packet.ChecksumPartial {
			t.Fatalf("%+v", b.Offload)
		}
	})
}

// FuzzFragment checks that fragments fit the MTU and reassemble in any order. The payload is
// generated: the fuzzer tends to shorten long inputs.
func FuzzFragment(f *testing.F) {
	f.Add(build(received(), nil), uint16(3000), uint16(576), uint64(1))
	f.Add(build(received(), nil), uint16(100), uint16(68), uint64(2))
	f.Fuzz(func(t *testing.T, header []byte, size, mtu uint16, seed uint64) {
		_, n, err := ipv4.ParseHeader(header)
		if err != nil || n+int(size) > ipv4.MaxTotalLen {
			return
		}
		b := append(bytes.Clone(header[:n]), pattern(int(size))...)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		p := parse(t, fixChecksum(b))
		if p.FragmentOffset()+len(p.Payload()) > ipv4.MaxTotalLen {
			return
		}
		count := encap.FragmentCount(p, int(mtu))
		if count == 0 || count > 2000 {
			return
		}
		into := buffers(count, min(int(mtu), p.TotalLen()))
		n, d := encap.Fragment(into, p, int(mtu))
		if d != drop.None || n != count {
			t.Fatalf("%d fragments of %d, drop %v", n, count, d)
		}
		if n > 1 {
			checkFragments(t, p, into, int(mtu))
		}
		random := rand.New(rand.NewPCG(seed, 0))
		random.Shuffle(n, func(i, j int) { into[i], into[j] = into[j], into[i] })
		if p.IsFragment() {
			return // the packet is a fragment itself
		}
		if got := reassemble(t, into); !bytes.Equal(got[ipv4.HeaderLen:], p.Bytes()[ipv4.HeaderLen:]) {
			t.Fatalf("% x reassembled as % x", p.Bytes(), got)
		}
	})
}

// FuzzParseError checks that no input panics, and that PathMTU stays within its bounds.
func FuzzParseError(f *testing.F) {
	f.Add(golden(f, goldenOuterError), uint16(1380))
	f.Add(outerError(11, 0, 32<<16, append(golden(f, goldenQuote), make([]byte, 100)...)), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, linkMTU uint16) {
		b = fixChecksum(b)
		if p, err := ipv4.Parse(b); err == nil && len(p.Payload()) >= 4 {
			message := p.Payload()
			binary.BigEndian.PutUint16(message[2:], 0)
			binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
		}
		e, d := encap.ParseError(b)
		if d != drop.None {
			return
		}
		if e.TooBig() && e.Unreachable() || e.Protocol == ipv4.ProtocolIPIP && e.SPI != 0 {
			t.Fatalf("%+v", e)
		}
		var p encap.PathMTU
		link := max(int(linkMTU), encap.DefaultFloor)
		changed, d := p.TooBig(start, &e, link)
		if mtu := p.Effective(link); mtu < encap.DefaultFloor || mtu > link || changed != (mtu < link) || changed && (d != drop.None || !e.DF) {
			t.Fatalf("%+v: changed %v, drop %v, MTU %d", e, changed, d, mtu)
		}
	})
}

// referenceOffload is DeriveOffload by hand, in one function.
func referenceOffload(b *packet.Buffer, p ipv4.Packet, mtu int) drop.Reason {
	if b.Checksum != packet.ChecksumUnknown || p.IsFragment() {
		return drop.None
	}
	segment := p.Payload()
	var field uint16
	var transportHeaderLen int
	switch p.Protocol() {
	case 6:
		if len(segment) < 20 {
			return drop.None
		}
		field = binary.BigEndian.Uint16(segment[16:])
		transportHeaderLen = int(segment[12]>>4) * 4
	case 17:
		if len(segment) < 8 {
			return drop.None
		}
		length := int(binary.BigEndian.Uint16(segment[4:]))
		if length < 8 || length > len(segment) {
			return drop.None
		}
		segment = segment[:length]
		field = binary.BigEndian.Uint16(segment[6:])
	default:
		return drop.None
	}
	pseudo := ipv4.PseudoHeaderSum(p.Source(), p.Destination(), p.Protocol(), len(segment))
	if field != ipv4.Fold(pseudo) {
		return drop.None
	}
	if ipv4.Sum(segment, pseudo) == 0xffff {
		b.Checksum = packet.ChecksumValid
		return drop.None
	}
	if p.TotalLen() <= mtu {
		b.Checksum = packet.ChecksumPartial
		return drop.None
	}
	size := mtu - p.HeaderLen() - transportHeaderLen
	if p.Protocol() == 17 || transportHeaderLen < 20 || transportHeaderLen > len(segment) || size <= 0 {
		return drop.SuperpacketSizeUnknown
	}
	b.Checksum, b.SegmentSize = packet.ChecksumPartial, uint16(size)
	return drop.None
}

// FuzzDeriveOffload_reference compares it with referenceOffload, for any packet. partial makes the
// checksum one, wherever it is.
func FuzzDeriveOffload_reference(f *testing.F) {
	tcp, udp := segment(ipv4.ProtocolTCP, 100, true), segment(ipv4.ProtocolUDP, 100, true)
	for _, mtu := range []uint16{0, 52, 53, 100, 1480} {
		for _, p := range [][]byte{tcp, udp} {
			f.Add(p, mtu, false)
			f.Add(append(bytes.Clone(p), 1, 2, 3), mtu, true)
			for _, at := range []int{0, 6, 24, 25, 32} { // IHL, MF, UDP length, data offset
				for _, value := range []byte{0, 1, 7, 8, 9, 0x20, 0x40, 0x46, 0x50, 0xf0, 0xff} {
					changed := bytes.Clone(p)
					changed[at] = value
					f.Add(changed, mtu, true)
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, mtu uint16, partial bool) {
		got, want := bufferOf(b), bufferOf(b)
		p, err := ipv4.Parse(got.Bytes())
		if err != nil {
			return
		}
		if s := p.Payload(); partial && p.Protocol() == ipv4.ProtocolTCP && len(s) >= 20 {
			binary.BigEndian.PutUint16(s[16:], ipv4.Fold(ipv4.PseudoHeaderSum(p.Source(), p.Destination(), 6, len(s))))
		} else if partial && p.Protocol() == ipv4.ProtocolUDP && len(s) >= 8 {
			length := int(binary.BigEndian.Uint16(s[4:]))
			binary.BigEndian.PutUint16(s[6:], ipv4.Fold(ipv4.PseudoHeaderSum(p.Source(), p.Destination(), 17, length)))
		}
		d := encap.DeriveOffload(got, p, int(mtu))
		if wantDrop := referenceOffload(want, p, int(mtu)); d != wantDrop || got.Offload != want.Offload {
			t.Fatalf("%+v, drop %v of % x, want %+v, drop %v", got.Offload, d, b, want.Offload, wantDrop)
		}
	})
}

// FuzzDeriveOffload checks that a partial checksum is detected, and that a complete one is never
// taken for partial.
func FuzzDeriveOffload(f *testing.F) {
	f.Add(uint16(7), uint16(0), false)
	f.Add(uint16(2001), uint16(0xbeef), true)
	f.Fuzz(func(t *testing.T, size, mark uint16, udp bool) {
		if size < 2 || size > 60000 {
			return
		}
		payload := pattern(int(size))
		binary.BigEndian.PutUint16(payload, mark)
		const mtu = 1480
		protocol := uint8(ipv4.ProtocolTCP)
		if udp {
			protocol = ipv4.ProtocolUDP
		}
		b := bufferOf(segmentOf(protocol, payload, false))
		if d := encap.DeriveOffload(b, parse(t, b.Bytes()), mtu); d != drop.None || b.Checksum == packet.ChecksumPartial {
			t.Fatalf("finished: %+v, drop %v", b.Offload, d)
		}
		b = bufferOf(segmentOf(protocol, payload, true))
		long := b.Len() > mtu
		d := encap.DeriveOffload(b, parse(t, b.Bytes()), mtu)
		switch {
		case b.Checksum == packet.ChecksumValid: // the ambiguous one in 65,536
		case long && udp:
			if d != drop.SuperpacketSizeUnknown {
				t.Fatalf("UDP of %d bytes: drop %v", b.Len(), d)
			}
		case d != drop.None || b.Checksum != packet.ChecksumPartial || long != (b.SegmentSize > 0):
			t.Fatalf("partial, %d bytes: %+v, drop %v", b.Len(), b.Offload, d)
		}
	})
}
