package encap_test

import (
	"bytes"
	"testing"

	"golang.org/x/net/icmp"
	netipv4 "golang.org/x/net/ipv4"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

func TestTooBig(t *testing.T) {
	b := dirty(2000)
	if d := encap.TooBig(b, parse(t, golden(t, goldenInner)), 1280, [4]byte{}); d != drop.None {
		t.Fatal(d)
	}
	wantBytes(t, "message", b.Bytes(), golden(t, `
		45c0 003c   // version 4, IHL 5, internetwork control, Not-ECT, total length 60
		1c46 0000   // the ID of the packet it is about, DF=0
		4001 47bb   // TTL 64, ICMP, header checksum
		0aff 0002   // source 10.255.0.2, where the packet was going
		0aff 0001   // destination 10.255.0.1, the inner sender
		0304 f7fb   // unreachable, fragmentation needed and DF set, checksum
		0000 0500   // unused, next-hop MTU 1280
		`+goldenInner))
}

func TestTooBig_source(t *testing.T) {
	b := dirty(2000)
	from := [4]byte{203, 0, 113, 9}
	if d := encap.TooBig(b, parse(t, golden(t, goldenInner)), 1280, from); d != drop.None {
		t.Fatal(d)
	}
	if p := parse(t, b.Bytes()); p.Source() != from || !p.HeaderChecksumValid() {
		t.Errorf("source %v, checksum valid %v", p.Source(), p.HeaderChecksumValid())
	}
}

// An ICMP error quotes as much as fits 576 bytes (RFC 1812).
func TestTooBig_quoteLength(t *testing.T) {
	for _, size := range []int{0, 1, 8, 527, 528, 529, 1480} {
		p := build(inner(), pattern(size))
		b := dirty(2000)
		if d := encap.TooBig(b, parse(t, p), 1280, [4]byte{}); d != drop.None {
			t.Fatal(d)
		}
		if want := min(576, 28+len(p)); b.Len() != want {
			t.Errorf("about %d bytes: %d bytes, want %d", len(p), b.Len(), want)
		}
		// Parsed by golang.org/x/net too, which does not check the checksum.
		whole := parse(t, b.Bytes())
		message, err := icmp.ParseMessage(1, whole.Payload())
		if err != nil {
			t.Fatal(err)
		}
		body, ok := message.Body.(*icmp.DstUnreach)
		if message.Type != netipv4.ICMPTypeDestinationUnreachable || message.Code != 4 || !ok || !bytes.HasPrefix(p, body.Data) {
			t.Errorf("x/net reads %+v", message)
		}
		if ipv4.Sum(whole.Payload(), 0) != 0xffff || !whole.HeaderChecksumValid() {
			t.Error("wrong checksum")
		}
	}
}

func TestHostUnreachable(t *testing.T) {
	b := dirty(2000)
	if d := encap.HostUnreachable(b, parse(t, golden(t, goldenInner)), [4]byte{}); d != drop.None {
		t.Fatal(d)
	}
	message := parse(t, b.Bytes()).Payload()
	wantBytes(t, "ICMP header", message[:8], golden(t, `
		0301 fcfe   // unreachable, host, checksum
		0000 0000   // unused
	`))
}

// No ICMP error is made about the packets that RFC 1122, section 3.2.2 lists.
func TestICMPAllowed(t *testing.T) {
	echo := []byte{8, 0, 0, 0, 0, 0, 0, 0}
	for _, test := range []struct {
		name    string
		change  func(*ipv4.Header)
		payload []byte
		want    drop.Reason
	}{
		{"an ordinary packet", func(*ipv4.Header) {}, nil, drop.None},
		{"a first fragment", func(h *ipv4.Header) { h.MF = true }, nil, drop.None},
		{"a later fragment", func(h *ipv4.Header) { h.FragmentOffset = 8 }, nil, drop.ICMPForbidden},
		{"to multicast", func(h *ipv4.Header) { h.Destination = [4]byte{224, 0, 0, 1} }, nil, drop.ICMPForbidden},
		{"to broadcast", func(h *ipv4.Header) { h.Destination = [4]byte{255, 255, 255, 255} }, nil, drop.ICMPForbidden},
		{"from nobody", func(h *ipv4.Header) { h.Source = [4]byte{} }, nil, drop.ICMPForbidden},
		{"from loopback", func(h *ipv4.Header) { h.Source = [4]byte{127, 0, 0, 1} }, nil, drop.ICMPForbidden},
		{"from multicast", func(h *ipv4.Header) { h.Source = [4]byte{239, 0, 0, 1} }, nil, drop.ICMPForbidden},
		{"from broadcast", func(h *ipv4.Header) { h.Source = [4]byte{255, 255, 255, 255} }, nil, drop.ICMPForbidden},
		{"an ICMP request", func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolICMP }, echo, drop.None},
		{"an ICMP error", func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolICMP }, []byte{3, 1, 0, 0, 0, 0, 0, 0}, drop.ICMPForbidden},
		{"ICMP of unknown type", func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolICMP }, []byte{99, 0, 0, 0}, drop.ICMPForbidden},
		{"ICMP without a type", func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolICMP }, nil, drop.ICMPForbidden},
	} {
		h := inner()
		test.change(&h)
		p := parse(t, build(h, test.payload))
		b := bufferOf([]byte("what was there before"))
		if d := encap.TooBig(b, p, 1280, [4]byte{}); d != test.want {
			t.Errorf("TooBig about %s: drop %v, want %v", test.name, d, test.want)
		} else if (b.Len() == 0) != (d != drop.None) {
			t.Errorf("TooBig about %s: %d bytes", test.name, b.Len())
		}
		if d := encap.HostUnreachable(b, p, [4]byte{}); d != test.want {
			t.Errorf("HostUnreachable about %s: drop %v, want %v", test.name, d, test.want)
		}
	}
}
