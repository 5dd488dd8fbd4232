package encap_test

import (
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// asRouterOS is a tunnel with RouterOS's defaults.
var asRouterOS = encap.Outer{Local: local, Remote: remote, DSCP: encap.InheritDSCP, TTL: 255}

// encapsulate returns the outer packet of p, or the Drop.
func encapsulate(t testing.TB, o encap.Outer, p []byte, id uint16) (ipv4.Packet, drop.Reason) {
	t.Helper()
	b := bufferOf(p)
	if d := o.Encapsulate(b, parse(t, b.Bytes()), id); d != drop.None {
		wantBytes(t, "after a drop", b.Bytes(), p)
		return ipv4.Packet{}, d
	}
	outer := parse(t, b.Bytes())
	if outer.TotalLen() != b.Len() || !outer.HeaderChecksumValid() || outer.HeaderLen() != 20 {
		t.Errorf("length %d of %d, checksum valid %v, header %d bytes",
			outer.TotalLen(), b.Len(), outer.HeaderChecksumValid(), outer.HeaderLen())
	}
	return outer, drop.None
}

// The outer header is the one that RouterOS makes.
func TestOuterEncapsulate_routerOSDefaults(t *testing.T) {
	outer, d := encapsulate(t, asRouterOS, golden(t, goldenInner), 0x1234)
	if d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "outer", outer.Bytes(), golden(t, `
		45b9 0034   // version 4, IHL 5, DSCP and ECN of the inner packet, total length 52
		1234 0000   // ID, DF=0 although the inner packet has DF=1
		ff04 bca2   // TTL 255, IPIP, header checksum
		c000 0201   // source 192.0.2.1
		c633 6401   // destination 198.51.100.1
		`+goldenInner))
}

// DF is copied only with DontFragmentInherit.
func TestOuterEncapsulate_df(t *testing.T) {
	o := asRouterOS
	o.DontFragmentInherit = true
	outer, d := encapsulate(t, o, golden(t, goldenInner), 0x1234)
	if d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "outer", outer.Bytes(), golden(t, `
		45b9 0034   // version 4, IHL 5, DSCP and ECN of the inner packet, total length 52
		0000 4000   // ID 0, for it means nothing with DF=1 (RFC 6864, section 4.1)
		ff04 8ed6   // TTL 255, IPIP, header checksum
		c000 0201   // source 192.0.2.1
		c633 6401   // destination 198.51.100.1
		`+goldenInner))

	for _, innerDF := range []bool{false, true} {
		h := inner()
		h.DF = innerDF
		p := build(h, nil)
		for _, inherit := range []bool{false, true} {
			o.DontFragmentInherit = inherit
			outer, _ := encapsulate(t, o, p, 0x1234)
			want := innerDF && inherit
			if outer.DF() != want || o.DontFragment(parse(t, p)) != want {
				t.Errorf("inner DF %v, inherit %v: outer DF %v, DontFragment %v", innerDF, inherit, outer.DF(), o.DontFragment(parse(t, p)))
			}
		}
	}
}

// The ID is the caller's with DF=0, and 0 with DF=1 (RFC 6864).
func TestOuterEncapsulate_id(t *testing.T) {
	h := inner()
	for _, df := range []bool{false, true} {
		h.DF = df
		o := asRouterOS
		o.DontFragmentInherit = true
		outer, _ := encapsulate(t, o, build(h, nil), 0xbeef)
		want := uint16(0xbeef)
		if df {
			want = 0
		}
		if outer.ID() != want {
			t.Errorf("DF %v: ID %#x, want %#x", df, outer.ID(), want)
		}
	}
}

// DSCP is inherited or configured; ECN is copied in both cases.
func TestOuterEncapsulate_dscp(t *testing.T) {
	h := inner()
	for _, ecn := range []ipv4.ECN{ipv4.NotECT, ipv4.ECT0, ipv4.ECT1, ipv4.CE} {
		for innerDSCP := range uint8(64) {
			h.TOS = innerDSCP<<2 | uint8(ecn)
			p := build(h, nil)
			for dscp := encap.InheritDSCP; dscp < 64; dscp++ {
				o := asRouterOS
				o.DSCP = dscp
				want := uint8(dscp)
				if dscp == encap.InheritDSCP {
					want = innerDSCP
				}
				b := bufferOf(p)
				if d := o.Encapsulate(b, parse(t, b.Bytes()), 1); d != drop.None {
					t.Fatal(d)
				}
				if outer := parse(t, b.Bytes()); outer.DSCP() != want || outer.ECN() != ecn {
					t.Fatalf("inner DSCP %d %v, configured %d: outer DSCP %d %v, want %d %v",
						innerDSCP, ecn, dscp, outer.DSCP(), outer.ECN(), want, ecn)
				}
			}
		}
	}
}

// The outer TTL is configured or inherited; the inner one is unchanged.
func TestOuterEncapsulate_ttl(t *testing.T) {
	h := inner()
	h.TTL = 17
	for _, test := range []struct{ configured, want uint8 }{{0, 17}, {1, 1}, {64, 64}, {255, 255}} {
		o := asRouterOS
		o.TTL = test.configured
		outer, _ := encapsulate(t, o, build(h, nil), 1)
		if outer.TTL() != test.want {
			t.Errorf("TTL %d: outer TTL %d, want %d", test.configured, outer.TTL(), test.want)
		}
		if p := parse(t, outer.Payload()); p.TTL() != 17 {
			t.Errorf("inner TTL is now %d: the kernel has counted the hop already", p.TTL())
		}
	}
}

// RFC 2003, section 3.1: an inner packet with TTL 0 is not encapsulated.
func TestOuterEncapsulate_innerTTLZero(t *testing.T) {
	h := inner()
	h.TTL = 0
	if _, d := encapsulate(t, asRouterOS, build(h, nil), 1); d != drop.InnerTTLZero {
		t.Errorf("drop %v, want %v", d, drop.InnerTTLZero)
	}
	h.TTL = 1
	if _, d := encapsulate(t, asRouterOS, build(h, nil), 1); d != drop.None {
		t.Errorf("TTL 1: drop %v", d)
	}
}

func TestOuterEncapsulate_innerOptions(t *testing.T) {
	h := inner()
	h.TotalLen = 28
	p := make([]byte, 28)
	h.PutOptions(p, []byte{0x94, 4, 0, 0, 1, 1, 1, 0})
	outer, d := encapsulate(t, asRouterOS, p, 1)
	if d != drop.None {
		t.Fatal(d)
	}
	if len(outer.Options()) != 0 {
		t.Errorf("outer options % x", outer.Options())
	}
	wantBytes(t, "inner", outer.Payload(), p)
}

func TestOuterEncapsulate_innerTooLong(t *testing.T) {
	if _, d := encapsulate(t, asRouterOS, build(inner(), make([]byte, encap.MaxInner-20)), 1); d != drop.None {
		t.Errorf("%d bytes: drop %v", encap.MaxInner, d)
	}
	if _, d := encapsulate(t, asRouterOS, build(inner(), make([]byte, encap.MaxInner-19)), 1); d != drop.InnerTooLong {
		t.Errorf("%d bytes: drop %v, want %v", encap.MaxInner+1, d, drop.InnerTooLong)
	}
}

func TestOuterEncapsulate_trailingBytes(t *testing.T) {
	p := build(inner(), []byte("payload"))
	b := bufferOf(append(p, "and more"...))
	if d := asRouterOS.Encapsulate(b, parse(t, b.Bytes()), 1); d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "inner", b.Bytes()[20:], p[:27])
}

// An outer packet of the tunnel is a loop at every depth up to maxNesting.
func TestOuterEncapsulate_loopNested(t *testing.T) {
	other := encap.Outer{Local: [4]byte{203, 0, 113, 1}, Remote: [4]byte{203, 0, 113, 2}, DSCP: encap.InheritDSCP, TTL: 64}
	p, _ := encapsulate(t, asRouterOS, golden(t, goldenInner), 1)
	for depth := 1; depth <= 5; depth++ {
		want := drop.Loop
		if depth > 4 {
			want = drop.None // maxNesting
		}
		if _, d := encapsulate(t, asRouterOS, p.Bytes(), 1); d != want {
			t.Errorf("our outer header as header %d of the inner packet: drop %v, want %v", depth, d, want)
		}
		var d drop.Reason
		if p, d = encapsulate(t, other, p.Bytes(), 1); d != drop.None {
			t.Fatal(d)
		}
		other.Local[3]++ // another tunnel each time, whose own loop check passes
		other.Remote[3] += 2
	}
}

func TestOuterEncapsulate_loopAddresses(t *testing.T) {
	h := inner()
	for _, test := range []struct {
		source, destination [4]byte
		want                drop.Reason
	}{
		{local, remote, drop.Loop},
		{remote, innerB, drop.Loop}, // RFC 2003, section 3.2, second rule
		{remote, local, drop.Loop},
		{local, innerB, drop.None}, // a host may use its outer address inside
		{innerA, remote, drop.None},
	} {
		h.Source, h.Destination = test.source, test.destination
		if _, d := encapsulate(t, asRouterOS, build(h, nil), 1); d != test.want {
			t.Errorf("%v → %v: drop %v, want %v", test.source, test.destination, d, test.want)
		}
	}
}

// The loop check parses no header where there is none: truncated, malformed, or a later
// fragment.
func TestOuterEncapsulate_loopMalformed(t *testing.T) {
	nested := build(ipv4.Header{TTL: 1, Protocol: 4, Source: local, Destination: remote}, nil)
	h := inner()
	h.Protocol = ipv4.ProtocolIPIP
	if _, d := encapsulate(t, asRouterOS, build(h, nested), 1); d != drop.Loop {
		t.Errorf("nested: drop %v, want %v", d, drop.Loop)
	}
	for name, payload := range map[string][]byte{
		"nothing":   nil,
		"19 bytes":  nested[:19],
		"version 6": append([]byte{0x65}, nested[1:]...),
		"IHL 4":     append([]byte{0x44}, nested[1:]...),
	} {
		if _, d := encapsulate(t, asRouterOS, build(h, payload), 1); d != drop.None {
			t.Errorf("%s: drop %v", name, d)
		}
	}
	h.MF = true // the first fragment has the header
	if _, d := encapsulate(t, asRouterOS, build(h, nested), 1); d != drop.Loop {
		t.Errorf("first fragment: drop %v, want %v", d, drop.Loop)
	}
	h.FragmentOffset = 8
	if _, d := encapsulate(t, asRouterOS, build(h, nested), 1); d != drop.None {
		t.Errorf("later fragment: drop %v", d)
	}
	outermost := inner()
	outermost.Protocol = ipv4.ProtocolIPIP
	if _, d := encapsulate(t, asRouterOS, build(outermost, build(h, nested)), 1); d != drop.None {
		t.Errorf("nested later fragment: drop %v", d)
	}
}

// A reflect probe is a loop on purpose.
func TestOuterEncapsulateProbe_loopExempt(t *testing.T) {
	probe := build(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local}, nil)
	if _, d := encapsulate(t, asRouterOS, probe, 1); d != drop.Loop {
		t.Errorf("as data: drop %v, want %v", d, drop.Loop)
	}
	b := bufferOf(probe)
	if d := asRouterOS.EncapsulateProbe(b, 1); d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "reflect probe", b.Bytes(), golden(t, `
		4500 0028 0001 0000 ff04 cf9a   // total length 40, ID 1, TTL 255, IPIP
		c000 0201 c633 6401             // 192.0.2.1 → 198.51.100.1
		4500 0014 0000 0000 ff04 cfaf   // total length 20, ID 0, TTL 255, IPIP
		c633 6401 c000 0201             // 198.51.100.1 → 192.0.2.1
	`))
}

func TestOuterEncapsulateProbe_empty(t *testing.T) {
	for _, o := range []encap.Outer{
		asRouterOS,
		{Local: local, Remote: remote, DSCP: encap.InheritDSCP, DontFragmentInherit: true}, // nothing to inherit from
	} {
		b := dirty(100)
		if d := o.EncapsulateProbe(b, 0x1234); d != drop.None {
			t.Fatal(d)
		}
		wantBytes(t, "empty probe", b.Bytes(), golden(t, `
			4500 0014 1234 0000 ff04 bd7b   // total length 20, ID, TTL 255, IPIP
			c000 0201 c633 6401             // 192.0.2.1 → 198.51.100.1
		`))
	}
}

// Probes are checked like other packets, but for the loop.
func TestOuterEncapsulateProbe_malformed(t *testing.T) {
	h := inner()
	h.TTL = 0
	for _, test := range []struct {
		p    []byte
		want drop.Reason
	}{
		{build(h, nil), drop.InnerTTLZero},
		{[]byte{0x45}, drop.InnerMalformed},
		{build(inner(), make([]byte, encap.MaxInner-19)), drop.InnerTooLong},
	} {
		if d := asRouterOS.EncapsulateProbe(bufferOf(test.p), 1); d != test.want {
			t.Errorf("drop %v, want %v", d, test.want)
		}
	}
}

// Without one local address an outer packet is known by any source that the tunnel has, at every depth, or by the
// destination that it has in common with the packet inside if it is to go there again.
func TestLoopsFrom(t *testing.T) {
	sources := map[[4]byte]bool{local: true, {192, 0, 2, 77}: true}
	other := encap.Outer{Local: [4]byte{203, 0, 113, 1}, Remote: [4]byte{203, 0, 113, 2}, DSCP: encap.InheritDSCP, TTL: 64}
	parse := func(b []byte) ipv4.Packet {
		p, err := ipv4.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p, _ := encapsulate(t, asRouterOS, golden(t, goldenInner), 1)
	if encap.LoopsFrom(parse(golden(t, goldenInner)), sources, remote) {
		t.Error("a packet that is not IP-in-IP is a loop")
	}
	if encap.LoopsFrom(parse(p.Bytes()), map[[4]byte]bool{other.Local: true}, remote) {
		t.Error("an outer packet of somebody else is a loop")
	}
	for depth := 1; depth <= 5; depth++ {
		if got := encap.LoopsFrom(parse(p.Bytes()), sources, remote); got != (depth <= 4) { // maxNesting
			t.Errorf("our outer header as header %d: %v", depth, got)
		}
		p, _ = encapsulate(t, other, p.Bytes(), 1)
		other.Local[3]++
		other.Remote[3] += 2
	}
	destination := parse(golden(t, goldenInner)).Destination()
	same := encap.Outer{Local: other.Local, Remote: destination, DSCP: encap.InheritDSCP, TTL: 64}
	p, _ = encapsulate(t, same, golden(t, goldenInner), 1)
	if !encap.LoopsFrom(parse(p.Bytes()), sources, destination) {
		t.Error("a packet that was sent to its inner destination is sent there again")
	}
	if encap.LoopsFrom(parse(p.Bytes()), sources, remote) {
		t.Error("a packet in transit that somebody sent to its inner destination is a loop by a route with a gateway")
	}
}
