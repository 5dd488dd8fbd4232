package encap_test

import (
	"bytes"
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// decapsulate does what a tunnel does with a packet from the underlay.
func decapsulate(p []byte) (b *packet.Buffer, kind encap.Kind, d drop.Reason) {
	b = bufferOf(p)
	outer, d := encap.ParseOuter(b)
	if d != drop.None {
		return b, kind, d
	}
	_, kind, d = encap.Decapsulate(b, outer, local, remote)
	return b, kind, d
}

// wantDropped checks the Drop of a received packet.
func wantDropped(t *testing.T, what string, p []byte, want drop.Reason) {
	t.Helper()
	if _, _, d := decapsulate(p); d != want {
		t.Errorf("%s: drop %v, want %v", what, d, want)
	}
}

func TestDecapsulate_ecnMergedIntoInner(t *testing.T) {
	b, kind, d := decapsulate(golden(t, `
		4503 0034   // version 4, IHL 5, DSCP 0, CE, total length 52
		1234 0000   // ID
		fe04 be58   // TTL 254, IPIP, header checksum
		c633 6401   // source 198.51.100.1
		c000 0201   // destination 192.0.2.1
		45ba 0020   // version 4, IHL 5, DSCP 46, ECT(0), total length 32
		1c46 0000   // ID
		3f01 48dd   // TTL 63, ICMP, header checksum
		0aff 0002   // source 10.255.0.2
		0aff 0001   // destination 10.255.0.1
		0000 2cf4   // echo reply
		002a 0001   // identifier, sequence
		6970 6970   // "ipip"
	`))
	if d != drop.None || kind != encap.KindData {
		t.Fatal(kind, d)
	}
	wantBytes(t, "inner", b.Bytes(), golden(t, `
		45bb 0020   // version 4, IHL 5, DSCP 46 is kept (RFC 2983), CE, total length 32
		1c46 0000   // ID
		3f01 48dc   // TTL 63 is not decremented here, ICMP, header checksum
		0aff 0002   // source 10.255.0.2
		0aff 0001   // destination 10.255.0.1
		0000 2cf4   // echo reply
		002a 0001   // identifier, sequence
		6970 6970   // "ipip"
	`))
}

func TestDecapsulate_trailingBytes(t *testing.T) {
	p := build(inner(), []byte("payload"))
	outer := build(received(), append(bytes.Clone(p), "after the inner packet"...))
	b, kind, d := decapsulate(append(outer, "after the outer packet"...))
	if d != drop.None || kind != encap.KindData {
		t.Fatal(kind, d)
	}
	wantBytes(t, "inner", b.Bytes(), p)

	if _, kind, d := decapsulate(append(build(received(), nil), p...)); d != drop.None || kind != encap.KindEmpty {
		t.Errorf("nothing inside, and padding: kind %v, drop %v", kind, d)
	}
	wantDropped(t, "an inner packet that padding completes", append(build(received(), p[:26]), p[26:]...), drop.ReceivedTruncated)
}

// The view that Decapsulate returns is of the memory of b: exactly the inner packet, ECN merged.
func TestDecapsulate_innerView(t *testing.T) {
	h := received()
	h.TOS = uint8(ipv4.CE)
	reflects := ipv4.Header{TotalLen: 20, TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}
	for _, test := range []struct {
		inner []byte
		kind  encap.Kind
	}{
		{golden(t, goldenInner), encap.KindData},
		{build(reflects, nil), encap.KindReflect},
		{nil, encap.KindEmpty},
	} {
		if len(test.inner) > 0 {
			parse(t, test.inner).SetECN(ipv4.ECT0)
		}
		b := bufferOf(build(h, append(bytes.Clone(test.inner), make([]byte, min(len(test.inner), 5))...)))
		outer, d := encap.ParseOuter(b)
		if d != drop.None {
			t.Fatal(d)
		}
		inner, kind, d := encap.Decapsulate(b, outer, local, remote)
		if d != drop.None || kind != test.kind {
			t.Fatalf("kind %v, drop %v, want kind %v", kind, d, test.kind)
		}
		wantBytes(t, "view", inner.Bytes(), b.Bytes())
		if inner.TotalLen() != len(test.inner) {
			t.Errorf("a view of %d bytes, want %d", inner.TotalLen(), len(test.inner))
		}
		if kind == encap.KindEmpty {
			continue
		}
		if inner.ECN() != ipv4.CE {
			t.Errorf("the view has %v, want CE", inner.ECN())
		}
		if inner.SetTTL(9); b.Bytes()[8] != 9 {
			t.Error("the view is of other memory")
		}
	}
}

// Outer options are removed with the outer header.
func TestDecapsulate_outerOptions(t *testing.T) {
	p := build(inner(), []byte("payload"))
	h := received()
	h.TotalLen = 24 + len(p)
	outer := make([]byte, h.TotalLen)
	h.PutOptions(outer, []byte{0x94, 4, 0, 0})
	copy(outer[24:], p)
	b, kind, d := decapsulate(outer)
	if d != drop.None || kind != encap.KindData {
		t.Fatal(kind, d)
	}
	wantBytes(t, "inner", b.Bytes(), p)
}

// Only packets from the tunnel's remote to its local address are accepted.
func TestDecapsulate_unknownPeer(t *testing.T) {
	p := build(inner(), nil)
	h := received()
	h.Source[3]++
	wantDropped(t, "another source", build(h, p), drop.UnknownPeer)
	h = received()
	h.Destination[3]++
	wantDropped(t, "another destination", build(h, p), drop.UnknownPeer)
}

func TestParseOuter_drops(t *testing.T) {
	valid := build(received(), build(inner(), nil))
	change := func(off int, v byte) []byte {
		b := bytes.Clone(valid)
		b[off] = v
		return b
	}
	wantDropped(t, "nothing", nil, drop.OuterMalformed)
	wantDropped(t, "19 bytes", valid[:19], drop.OuterMalformed)
	wantDropped(t, "truncated", valid[:39], drop.OuterMalformed)
	wantDropped(t, "version 6", change(0, 0x65), drop.OuterMalformed)
	wantDropped(t, "IHL 4", change(0, 0x44), drop.OuterMalformed)
	wantDropped(t, "checksum", change(10, valid[10]+1), drop.OuterChecksum)

	h := received()
	h.Protocol = 47
	wantDropped(t, "GRE", build(h, build(inner(), nil)), drop.OuterNotIPIP)
	h = received()
	h.MF = true
	wantDropped(t, "first fragment", build(h, build(inner(), nil)), drop.OuterFragment)
	h = received()
	h.FragmentOffset = 8
	wantDropped(t, "last fragment", build(h, build(inner(), nil)), drop.OuterFragment)
}

func TestParseOuter_bufferUnchangedOnDrop(t *testing.T) {
	h := received()
	h.MF = true
	p := append(build(h, build(inner(), nil)), "padding"...)
	b := bufferOf(p)
	if _, d := encap.ParseOuter(b); d != drop.OuterFragment {
		t.Fatal(d)
	}
	wantBytes(t, "packet", b.Bytes(), p)
}

func TestDecapsulate_innerMalformed(t *testing.T) {
	valid := build(inner(), []byte("payload"))
	change := func(off int, v byte) []byte {
		b := bytes.Clone(valid)
		b[off] = v
		return build(received(), b)
	}
	wantDropped(t, "one byte", build(received(), valid[:1]), drop.ReceivedTruncated)
	wantDropped(t, "19 bytes", build(received(), valid[:19]), drop.ReceivedTruncated)
	wantDropped(t, "26 of 27 bytes", build(received(), valid[:26]), drop.ReceivedTruncated)
	wantDropped(t, "version 6", change(0, 0x65), drop.ReceivedNotIPv4)
	wantDropped(t, "IHL 4", change(0, 0x44), drop.ReceivedMalformed)
	wantDropped(t, "total length 19", change(3, 19), drop.ReceivedMalformed)
	wantDropped(t, "checksum", change(11, valid[11]+1), drop.ReceivedChecksum)
}

// RFC 2003, section 3.1: an inner packet with TTL 0 is discarded.
func TestDecapsulate_innerTTLZero(t *testing.T) {
	h := inner()
	h.TTL = 0
	wantDropped(t, "TTL 0", build(received(), build(h, nil)), drop.ReceivedTTLZero)
	h.TTL = 1
	wantDropped(t, "TTL 1", build(received(), build(h, nil)), drop.None)
}

const goldenReflect = `
	4500 0014 0000 0000   // version 4, IHL 5, total length 20, ID 0
	ff04 cfaf             // TTL 255, IPIP, header checksum
	c000 0201 c633 6401   // 192.0.2.1, this end → 198.51.100.1, its sender
`

func TestReflectAnswer(t *testing.T) {
	b, kind, d := decapsulate(golden(t, `
		4500 0028 0001 0000   // version 4, IHL 5, total length 40, ID 1
		ff04 cf9a             // TTL 255, IPIP, header checksum
		c633 6401 c000 0201   // 198.51.100.1 → 192.0.2.1
		`+goldenReflect))
	if d != drop.None || kind != encap.KindReflect {
		t.Fatal(kind, d)
	}
	wantBytes(t, "probe", b.Bytes(), golden(t, goldenReflect))
	if d := encap.ReflectAnswer(b, local, remote); d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "answer", b.Bytes(), golden(t, `
		4500 0014 0000 0000   // version 4, IHL 5, total length 20, ID 0
		fe04 d0af             // TTL 254, as if forwarded, IPIP, header checksum
		c000 0201 c633 6401   // 192.0.2.1 → 198.51.100.1
	`))
}

// A NAT translates the outer header only: a peer behind one writes its private address into the
// probe, and a peer of this end behind one the public address of this end. Whatever the other
// address of the probe, the answer goes from local to remote.
func TestReflectAnswer_addresses(t *testing.T) {
	for _, other := range [][4]byte{{10, 0, 0, 5}, {203, 0, 113, 9}, {}, {255, 255, 255, 255}, {224, 0, 0, 1}, local, remote} {
		for _, addresses := range [][2][4]byte{{local, other}, {other, remote}} {
			probe := ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: addresses[0], Destination: addresses[1]}
			b, kind, d := decapsulate(build(received(), build(probe, nil)))
			if d != drop.None || kind != encap.KindReflect {
				t.Fatalf("%v: kind %v, drop %v", addresses, kind, d)
			}
			if d := encap.ReflectAnswer(b, local, remote); d != drop.None {
				t.Fatalf("%v: %v", addresses, d)
			}
			probe.TTL, probe.Source, probe.Destination = 254, local, remote
			wantBytes(t, "answer", b.Bytes(), build(probe, nil))
		}
	}
	// Anything but a bare header is data, for the host to judge.
	h := ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: [4]byte{10, 0, 0, 5}}
	for name, change := range map[string]func(*ipv4.Header){
		"another protocol": func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolUDP },
		"a fragment":       func(h *ipv4.Header) { h.MF = true },
		"other addresses":  func(h *ipv4.Header) { h.Source = [4]byte{10, 0, 0, 6} },
	} {
		h := h
		change(&h)
		if _, kind, d := decapsulate(build(received(), build(h, nil))); kind != encap.KindData || d != drop.None {
			t.Errorf("%s: kind %v, drop %v", name, kind, d)
		}
	}
}

// A packet of the tunnel nested in itself would be received again, once per level: 71 times for
// 1448 bytes.
func TestDecapsulate_nested(t *testing.T) {
	nested := received() // the same as the outer header
	data := build(inner(), []byte("payload"))
	wantDropped(t, "a packet", build(received(), build(nested, data)), drop.ReceivedLoop)
	wantDropped(t, "nothing inside", build(received(), build(nested, nil)), drop.ReceivedLoop)
	h := nested
	h.MF = true
	wantDropped(t, "a first fragment", build(received(), build(h, make([]byte, 24))), drop.ReceivedLoop)
	h.MF, h.FragmentOffset = false, 24
	wantDropped(t, "a later fragment", build(received(), build(h, make([]byte, 24))), drop.ReceivedLoop)

	// Nested packets of another tunnel pass.
	h = nested
	h.Source[3]++
	wantDropped(t, "another tunnel's source", build(received(), build(h, data)), drop.None)
	h = nested
	h.Destination[3]++
	wantDropped(t, "another tunnel's destination", build(received(), build(h, data)), drop.None)
	h = nested
	h.Protocol = ipv4.ProtocolUDP
	wantDropped(t, "another protocol", build(received(), build(h, data)), drop.None)
}

// The answer to our reflect probe arrives as an outer header without an inner packet.
func TestDecapsulate_empty(t *testing.T) {
	_, kind, d := decapsulate(build(received(), nil))
	if d != drop.None || kind != encap.KindEmpty {
		t.Error(kind, d)
	}
}

func TestReflectAnswer_ttlExpired(t *testing.T) {
	probe := ipv4.Header{TTL: 1, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}
	if d := encap.ReflectAnswer(bufferOf(build(probe, nil)), local, remote); d != drop.ReflectTTLExpired {
		t.Errorf("TTL 1: drop %v, want %v", d, drop.ReflectTTLExpired)
	}
	if d := encap.ReflectAnswer(dirty(20), local, remote); d != drop.ReceivedMalformed {
		t.Errorf("no packet: drop %v, want %v", d, drop.ReceivedMalformed)
	}
}

// A received packet that would be sent back to the remote is dropped, unless it is a reflect
// probe.
func TestDecapsulate_loop(t *testing.T) {
	probe := ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: local, Destination: remote}
	wantDropped(t, "with a payload", build(received(), build(probe, []byte("payload"))), drop.ReceivedLoop)

	h := probe
	h.Protocol = ipv4.ProtocolUDP
	wantDropped(t, "another protocol", build(received(), build(h, nil)), drop.ReceivedLoop)
	h = probe
	h.MF = true
	wantDropped(t, "a fragment", build(received(), build(h, nil)), drop.ReceivedLoop)

	h = probe
	h.TotalLen = 24
	routed := make([]byte, 24)
	h.PutOptions(routed, []byte{0x83, 3, 4, 0}) // loose source route
	wantDropped(t, "a source route", build(received(), routed), drop.ReceivedLoop)
}
