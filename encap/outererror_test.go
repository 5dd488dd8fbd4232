package encap_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/encap"
	"ipipd/internal/drop"
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

func TestParseError(t *testing.T) {
	e, d := encap.ParseError(golden(t, goldenOuterError))
	if d != drop.None {
		t.Fatal(d)
	}
	want := encap.OuterError{
		Type: 3, Code: 4, NextHopMTU: 1400, Reporter: [4]byte{203, 0, 113, 1},
		Source: local, Destination: remote, TotalLen: 52, DF: true, Protocol: 4,
	}
	if diff := cmp.Diff(want, e); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !e.TooBig() || e.Unreachable() || e.ProtocolUnreachable() {
		t.Errorf("TooBig %v, Unreachable %v, ProtocolUnreachable %v", e.TooBig(), e.Unreachable(), e.ProtocolUnreachable())
	}
}

func TestParseError_spi(t *testing.T) {
	spi := []byte{0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 7} // and the sequence number
	from := func(port uint16) []byte {
		return append(binary.BigEndian.AppendUint16(nil, port), 0x11, 0x94, 0, 40, 0, 0)
	}
	for _, test := range []struct {
		name     string
		protocol uint8
		quote    []byte
		spi      uint32
		of       bool // a tunnel
	}{
		{"ESP", 50, spi, 0xdeadbeef, true},
		{"ESP in UDP", 17, append(from(4500), spi...), 0xdeadbeef, true},
		{"ESP in UDP, the least quote", 17, from(4500), 0, true},
		{"another program's UDP", 17, append(from(4501), spi...), 0, false},
		{"TCP", 6, append(from(4500), spi...), 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			quote := build(ipv4.Header{TTL: 60, Protocol: test.protocol, Source: local, Destination: remote}, test.quote)
			e, d := encap.ParseError(outerError(3, 4, 1400, quote))
			if d != drop.None || (e != encap.OuterError{}) != test.of {
				t.Fatalf("got %+v, %v", e, d)
			}
			if !test.of {
				return
			}
			if e.Protocol != test.protocol || e.SPI != test.spi || e.NextHopMTU != 1400 || e.DF {
				t.Errorf("got %+v", e)
			}
		})
	}
}

// outerError returns an ICMP error that quotes quote; word is the second word of the ICMP
// header.
func outerError(typ, code uint8, word uint32, quote []byte) []byte {
	message := append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, quote...)
	binary.BigEndian.PutUint32(message[4:], word)
	binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
	return build(ipv4.Header{TTL: 60, Protocol: ipv4.ProtocolICMP, Source: [4]byte{203, 0, 113, 1}, Destination: local}, message)
}

// RFC 2003, section 4: which errors mean that the remote is unreachable, which carry a next-hop
// MTU, and which mean neither.
func TestOuterErrorUnreachable(t *testing.T) {
	const unreachable, tooBig, neither = "unreachable", "too big", "neither"
	for _, test := range []struct {
		name      string
		typ, code uint8
		want      string
	}{
		{"net unreachable", 3, 0, unreachable},
		{"host unreachable", 3, 1, unreachable},
		{"protocol unreachable", 3, 2, unreachable},
		{"port unreachable", 3, 3, neither},
		{"too big", 3, 4, tooBig},
		{"source route failed", 3, 5, neither},
		{"network unknown", 3, 6, unreachable},
		{"administratively prohibited", 3, 13, unreachable},
		{"precedence cutoff", 3, 15, unreachable},
		{"unreachable of unknown code", 3, 16, neither},
		{"time exceeded in transit", 11, 0, unreachable},
		{"fragment reassembly time exceeded", 11, 1, neither},
	} {
		e, d := encap.ParseError(outerError(test.typ, test.code, 1400, golden(t, goldenQuote)))
		if d != drop.None {
			t.Errorf("%s: ParseError: %v", test.name, d)
			continue
		}
		wantMTU := 0
		if test.want == tooBig {
			wantMTU = 1400
		}
		if e.Unreachable() != (test.want == unreachable) || e.TooBig() != (test.want == tooBig) || e.NextHopMTU != wantMTU ||
			e.ProtocolUnreachable() != (test.name == "protocol unreachable") {
			t.Errorf("%s: Unreachable %v, TooBig %v, next-hop MTU %d, ProtocolUnreachable %v",
				test.name, e.Unreachable(), e.TooBig(), e.NextHopMTU, e.ProtocolUnreachable())
		}
	}
}

func TestParseError_ignored(t *testing.T) {
	for _, typ := range []uint8{4, 5, 12} {
		if _, d := encap.ParseError(outerError(typ, 0, 0, golden(t, goldenQuote))); d != drop.OuterErrorIgnored {
			t.Errorf("type %d: drop %v, want %v", typ, d, drop.OuterErrorIgnored)
		}
	}
}

func TestParseError_malformed(t *testing.T) {
	valid := golden(t, goldenOuterError)
	change := func(off int, v byte) []byte {
		b := bytes.Clone(valid)
		b[off] = v
		return b
	}
	quote := golden(t, goldenQuote)
	h := ipv4.Header{TTL: 60, Protocol: ipv4.ProtocolICMP, Source: remote, Destination: local}
	for name, b := range map[string][]byte{
		"nothing":                nil,
		"truncated":              valid[:79],
		"IP checksum":            change(10, 0),
		"ICMP checksum":          change(22, 0),
		"not ICMP":               build(ipv4.Header{TTL: 60, Protocol: 17, Source: remote, Destination: local}, valid[20:]),
		"a fragment":             build(ipv4.Header{TTL: 60, Protocol: 1, MF: true, Source: remote, Destination: local}, valid[20:]),
		"an echo reply":          outerError(0, 0, 0, quote),
		"7 bytes of ICMP":        build(h, valid[20:27]),
		"no quote":               outerError(3, 1, 0, nil),
		"19 bytes of quote":      outerError(3, 1, 0, quote[:19]),
		"quote of IPv6":          outerError(3, 1, 0, append([]byte{0x60}, quote[1:]...)),
		"7 bytes of payload":     outerError(3, 1, 0, quote[:27]),
		"RFC 4884 length 4 only": outerError(3, 1, 1<<16, quote),
	} {
		if _, d := encap.ParseError(b); d != drop.OuterErrorMalformed {
			t.Errorf("%s: drop %v, want %v", name, d, drop.OuterErrorMalformed)
		}
	}
}

func TestParseError_unrelated(t *testing.T) {
	h := inner()
	if e, d := encap.ParseError(outerError(3, 1, 0, build(h, pattern(8)))); d != drop.None || e != (encap.OuterError{}) {
		t.Errorf("%+v, %v, want neither", e, d)
	}
}

// The bytes after a quote are not taken for the SPI of a packet whose quote ends before it.
func TestParseError_extensionsAndPadding(t *testing.T) {
	udp := binary.BigEndian.AppendUint16(nil, 4500)
	udp = append(udp, 0x11, 0x94, 0, 40, 0, 0)
	quote := build(ipv4.Header{TTL: 60, DF: true, Protocol: ipv4.ProtocolUDP, Source: local, Destination: remote}, udp)
	extended := append(bytes.Clone(quote), 0x20, 0, 0xdf, 0xff, 0, 4, 1, 1) // RFC 4884, sections 7 and 8
	for name, b := range map[string][]byte{
		"padding":    outerError(3, 1, 0, append(bytes.Clone(quote), 9, 9, 9, 9)),
		"extensions": outerError(3, 1, 7<<16, extended),
	} {
		if e, d := encap.ParseError(b); d != drop.None || e.SPI != 0 {
			t.Errorf("%s: SPI %x, drop %v", name, e.SPI, d)
		}
	}
}

// An error about an empty probe quotes only its header.
func TestParseError_emptyProbe(t *testing.T) {
	probe := build(ipv4.Header{TTL: 255, Protocol: 4, Source: local, Destination: remote}, nil)
	e, d := encap.ParseError(outerError(3, 2, 0, probe))
	if d != drop.None || !e.ProtocolUnreachable() || e.Source != local || e.Destination != remote {
		t.Fatalf("%+v, drop %v", e, d)
	}
}

// 28 bytes, as RFC 792 requires, are enough.
func TestParseError_shortQuote(t *testing.T) {
	quote := golden(t, goldenQuote)
	for n := 28; n <= len(quote); n++ {
		e, d := encap.ParseError(outerError(3, 4, 1400, quote[:n]))
		if d != drop.None || e.TotalLen != 52 || !e.DF || e.NextHopMTU != 1400 {
			t.Fatalf("%d bytes: %+v, drop %v", n, e, d)
		}
	}
}
