package encap_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/encap"
	"ipipd/internal/ipv4"
)

const goldenQuote = `
	45b9 0034   // version 4, IHL 5, DSCP 46, ECT(1), total length 52
	0000 4000   // ID 0, DF
	ff04 8ed6   // TTL 255, IPIP, header checksum
	c000 0201   // source 192.0.2.1
	c633 6401   // destination 198.51.100.1
` + goldenInner

const goldenOuterError = `
	45c0 0050   // version 4, IHL 5, internetwork control, total length 80
	0077 0000   // ID
	3e01 7d73   // TTL 62, ICMP, header checksum
	cb00 7101   // source 203.0.113.1, a router on the way
	c000 0201   // destination 192.0.2.1
	0304 f783   // unreachable, fragmentation needed and DF set, checksum
	0000 0578   // unused, next-hop MTU 1400
` + goldenQuote

func TestOuterErrorIsReadWithThePacketThatItIsAbout(t *testing.T) {
	e, d := encap.ParseError(golden(t, goldenOuterError))
	if d != encap.DropNone {
		t.Fatal(d)
	}
	want := encap.OuterError{
		Type: 3, Code: 4, NextHopMTU: 1400, Reporter: [4]byte{203, 0, 113, 1},
		Source: local, Destination: remote, TotalLen: 52, Protocol: 4, Inner: golden(t, goldenInner),
	}
	if diff := cmp.Diff(want, e); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !e.TooBig() || e.Unreachable() || e.ProtocolUnreachable() {
		t.Errorf("TooBig %v, Unreachable %v, ProtocolUnreachable %v", e.TooBig(), e.Unreachable(), e.ProtocolUnreachable())
	}
}

func TestOuterErrorAboutAnEncryptedPacketHasItsSPIAndNothingInside(t *testing.T) {
	spi := []byte{0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 7} // and the sequence number
	from := func(port uint16) []byte {
		return append(binary.BigEndian.AppendUint16(nil, port), 0x11, 0x94, 0, 40, 0, 0)
	}
	for _, test := range []struct {
		name     string
		protocol uint8
		quote    []byte
		spi      uint32
		drop     encap.Drop
	}{
		{"ESP", 50, spi, 0xdeadbeef, encap.DropNone},
		{"ESP in UDP", 17, append(from(4500), spi...), 0xdeadbeef, encap.DropNone},
		{"ESP in UDP, the least quote", 17, from(4500), 0, encap.DropNone},
		{"another program's UDP", 17, append(from(4501), spi...), 0, encap.DropOuterErrorUnrelated},
		{"TCP", 6, append(from(4500), spi...), 0, encap.DropOuterErrorUnrelated},
	} {
		t.Run(test.name, func(t *testing.T) {
			quote := build(ipv4.Header{TTL: 60, Protocol: test.protocol, Source: local, Destination: remote}, test.quote)
			e, d := encap.ParseError(outerError(3, 4, 1400, quote))
			if d != test.drop {
				t.Fatalf("got %v, want %v", d, test.drop)
			}
			if d != encap.DropNone {
				return
			}
			if e.Protocol != test.protocol || e.SPI != test.spi || e.NextHopMTU != 1400 || len(e.Inner) != 0 {
				t.Errorf("got %+v", e)
			}
			if d := e.Relay(dirty(2000), 1380, [4]byte{}); d != encap.DropOuterErrorQuoteShort {
				t.Errorf("Relay: %v", d)
			}
		})
	}
}

func TestDatagramTooBigIsRelayedWithTheMTUOfTheTunnel(t *testing.T) {
	e, d := encap.ParseError(golden(t, goldenOuterError))
	if d != encap.DropNone {
		t.Fatal(d)
	}
	b := dirty(2000)
	if d := e.Relay(b, e.NextHopMTU-encap.Overhead, [4]byte{}); d != encap.DropNone {
		t.Fatal(d)
	}
	wantBytes(t, "relayed", b.Bytes(), golden(t, `
		45c0 003c   // version 4, IHL 5, internetwork control, total length 60
		1c46 0000   // the ID of the packet it is about
		4001 47bb   // TTL 64, ICMP, header checksum
		0aff 0002   // source 10.255.0.2
		0aff 0001   // destination 10.255.0.1, the inner sender
		0304 f797   // unreachable, fragmentation needed and DF set, checksum
		0000 0564   // unused, next-hop MTU 1380 = 1400 - 20
		`+goldenInner))
}

// outerError returns an ICMP error about quote; word is the second word of the
// ICMP header.
func outerError(typ, code uint8, word uint32, quote []byte) []byte {
	message := append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, quote...)
	binary.BigEndian.PutUint32(message[4:], word)
	binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
	return build(ipv4.Header{TTL: 60, Protocol: ipv4.ProtocolICMP, Source: [4]byte{203, 0, 113, 1}, Destination: local}, message)
}

func TestOuterErrorsAreRelayedByRFC2003Section4(t *testing.T) {
	type outcome struct {
		relayed uint8 // the code of the 3 that the inner sender gets
		drop    encap.Drop
	}
	host, tooBig := outcome{relayed: 1}, outcome{relayed: 4}
	no := outcome{drop: encap.DropOuterErrorNotRelayed}
	for _, test := range []struct {
		name      string
		typ, code uint8
		want      outcome
	}{
		{"net unreachable", 3, 0, host},
		{"host unreachable", 3, 1, host},
		{"protocol unreachable", 3, 2, host},
		{"port unreachable", 3, 3, no},
		{"too big", 3, 4, tooBig},
		{"source route failed", 3, 5, no},
		{"network unknown", 3, 6, host},
		{"administratively prohibited", 3, 13, host},
		{"precedence cutoff", 3, 15, host},
		{"unreachable of unknown code", 3, 16, no},
		{"time exceeded in transit", 11, 0, host},
		{"fragment reassembly time exceeded", 11, 1, no},
	} {
		e, d := encap.ParseError(outerError(test.typ, test.code, 1400, golden(t, goldenQuote)))
		if d != encap.DropNone {
			t.Errorf("%s: ParseError: %v", test.name, d)
			continue
		}
		if e.Unreachable() != (test.want == host) || e.TooBig() != (test.want == tooBig) ||
			e.ProtocolUnreachable() != (test.name == "protocol unreachable") {
			t.Errorf("%s: Unreachable %v, TooBig %v, ProtocolUnreachable %v", test.name, e.Unreachable(), e.TooBig(), e.ProtocolUnreachable())
		}
		b := dirty(2000)
		if d := e.Relay(b, 1380, [4]byte{}); d != test.want.drop {
			t.Errorf("%s: drop %v, want %v", test.name, d, test.want.drop)
			continue
		} else if d != encap.DropNone {
			continue
		}
		message := parse(t, b.Bytes()).Payload()
		wantMTU := uint32(0)
		if test.want == tooBig {
			wantMTU = 1380
		}
		if message[0] != 3 || message[1] != test.want.relayed || binary.BigEndian.Uint32(message[4:]) != wantMTU {
			t.Errorf("%s: relayed as % x", test.name, message[:8])
		}
	}
}

func TestRedirectsSourceQuenchesAndParameterProblemsAreNotRelayed(t *testing.T) {
	for _, typ := range []uint8{4, 5, 12} {
		if _, d := encap.ParseError(outerError(typ, 0, 0, golden(t, goldenQuote))); d != encap.DropOuterErrorNotRelayed {
			t.Errorf("type %d: drop %v, want %v", typ, d, encap.DropOuterErrorNotRelayed)
		}
	}
}

func TestDamagedOuterErrorsAreNotBelieved(t *testing.T) {
	sound := golden(t, goldenOuterError)
	change := func(off int, v byte) []byte {
		b := bytes.Clone(sound)
		b[off] = v
		return b
	}
	quote := golden(t, goldenQuote)
	h := ipv4.Header{TTL: 60, Protocol: ipv4.ProtocolICMP, Source: remote, Destination: local}
	for name, b := range map[string][]byte{
		"nothing":                nil,
		"cut short":              sound[:79],
		"IP checksum":            change(10, 0),
		"ICMP checksum":          change(22, 0),
		"not ICMP":               build(ipv4.Header{TTL: 60, Protocol: 17, Source: remote, Destination: local}, sound[20:]),
		"a fragment":             build(ipv4.Header{TTL: 60, Protocol: 1, MF: true, Source: remote, Destination: local}, sound[20:]),
		"an echo reply":          outerError(0, 0, 0, quote),
		"7 bytes of ICMP":        build(h, sound[20:27]),
		"no quote":               outerError(3, 1, 0, nil),
		"19 bytes of quote":      outerError(3, 1, 0, quote[:19]),
		"quote of IPv6":          outerError(3, 1, 0, append([]byte{0x60}, quote[1:]...)),
		"7 bytes behind header":  outerError(3, 1, 0, quote[:27]),
		"RFC 4884 length 4 only": outerError(3, 1, 1<<16, quote),
	} {
		if _, d := encap.ParseError(b); d != encap.DropOuterErrorMalformed {
			t.Errorf("%s: drop %v, want %v", name, d, encap.DropOuterErrorMalformed)
		}
	}
}

func TestOuterErrorsAboutOtherProtocolsAreUnrelated(t *testing.T) {
	h := inner()
	if _, d := encap.ParseError(outerError(3, 1, 0, build(h, pattern(8)))); d != encap.DropOuterErrorUnrelated {
		t.Errorf("drop %v, want %v", d, encap.DropOuterErrorUnrelated)
	}
}

func TestExtensionsAndPaddingAreNotQuoted(t *testing.T) {
	quote := golden(t, goldenQuote)
	padded := append(bytes.Clone(quote), make([]byte, 128-len(quote))...)
	extended := append(bytes.Clone(padded), 0x20, 0, 0xdf, 0xff, 0, 4, 1, 1) // RFC 4884, sections 7 and 8
	for name, b := range map[string][]byte{
		"padding":    outerError(3, 1, 0, padded),
		"extensions": outerError(3, 1, 32<<16, extended),
	} {
		e, d := encap.ParseError(b)
		if d != encap.DropNone {
			t.Fatalf("%s: %v", name, d)
		}
		wantBytes(t, name, e.Inner, golden(t, goldenInner))
	}

	// Without the length of the quote the extensions would pass for the packet.
	long := build(ipv4.Header{TTL: 9, Protocol: 4, Source: local, Destination: remote}, build(inner(), pattern(200)))
	e, d := encap.ParseError(outerError(3, 1, 32<<16, append(bytes.Clone(long[:128]), 0x20, 0, 0xdf, 0xff)))
	if d != encap.DropNone {
		t.Fatal(d)
	}
	wantBytes(t, "long quote", e.Inner, long[20:128])
}

func TestRelayQuotesNothingBehindTheInnerPacket(t *testing.T) {
	h := inner()
	p := build(h, pattern(8))
	quote := build(ipv4.Header{TTL: 9, Protocol: 4, Source: local, Destination: remote}, append(bytes.Clone(p), "of no concern"...))
	e, d := encap.ParseError(outerError(3, 1, 0, quote))
	if d != encap.DropNone {
		t.Fatal(d)
	}
	b := dirty(2000)
	if d := e.Relay(b, 1480, [4]byte{}); d != encap.DropNone {
		t.Fatal(d)
	}
	wantBytes(t, "quote", b.Bytes()[28:], p)
}

func TestErrorAboutAnEmptyProbeIsKnownByItsAddresses(t *testing.T) {
	probe := build(ipv4.Header{TTL: 255, Protocol: 4, Source: local, Destination: remote}, nil)
	e, d := encap.ParseError(outerError(3, 2, 0, probe))
	if d != encap.DropNone || !e.ProtocolUnreachable() || e.Source != local || e.Destination != remote {
		t.Fatalf("%+v, drop %v", e, d)
	}
	if d := e.Relay(dirty(2000), 1480, [4]byte{}); d != encap.DropOuterErrorQuoteShort {
		t.Errorf("Relay: drop %v, want %v", d, encap.DropOuterErrorQuoteShort)
	}
}

func TestShortQuotesAreNotRelayed(t *testing.T) {
	quote := golden(t, goldenQuote)
	for n := 28; n <= len(quote); n++ {
		e, d := encap.ParseError(outerError(3, 4, 1400, quote[:n]))
		if d != encap.DropNone || e.TotalLen != 52 || e.NextHopMTU != 1400 {
			t.Fatalf("%d bytes: %+v, drop %v", n, e, d)
		}
		want := encap.DropNone
		if n < 20+20+8 {
			want = encap.DropOuterErrorQuoteShort
		}
		if d := e.Relay(dirty(2000), 1380, [4]byte{}); d != want {
			t.Errorf("%d bytes: drop %v, want %v", n, d, want)
		}
	}
}

func TestErrorsThatWouldMisleadTheInnerSenderAreNotRelayed(t *testing.T) {
	about := func(change func(*ipv4.Header), payload []byte) []byte {
		h := inner()
		h.DF = true
		change(&h)
		return build(ipv4.Header{TTL: 9, DF: true, Protocol: 4, Source: local, Destination: remote}, build(h, payload))
	}
	damaged := about(func(*ipv4.Header) {}, pattern(8))
	damaged[20+8]++ // the inner TTL, without its checksum
	later := about(func(*ipv4.Header) {}, pattern(80))
	binary.BigEndian.PutUint16(later[6:], 1) // a fragment of the outer packet, and not its first
	for _, test := range []struct {
		name  string
		quote []byte
		want  encap.Drop
	}{
		{"DF=1", about(func(*ipv4.Header) {}, pattern(8)), encap.DropNone},
		{"DF=0, so its size is nothing the sender would change", about(func(h *ipv4.Header) { h.DF = false }, pattern(8)), encap.DropOuterErrorNotRelayed},
		{"our own reflect probe", about(func(h *ipv4.Header) { h.Source = remote }, nil), encap.DropOuterErrorNotRelayed},
		{"an inner ICMP error", about(func(h *ipv4.Header) { h.Protocol = 1 }, []byte{11, 0, 0, 0, 0, 0, 0, 0}), encap.DropICMPForbidden},
		{"a wrong inner checksum", damaged, encap.DropOuterErrorMalformed},
		{"a later outer fragment", later, encap.DropOuterErrorQuoteShort},
	} {
		e, d := encap.ParseError(outerError(3, 4, 1400, test.quote))
		if d != encap.DropNone {
			t.Fatalf("%s: %v", test.name, d)
		}
		if d := e.Relay(dirty(2000), 1380, [4]byte{}); d != test.want {
			t.Errorf("about %s: drop %v, want %v", test.name, d, test.want)
		}
	}
}
