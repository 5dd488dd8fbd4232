package encap_test

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// The packets of these tests. The golden ones were made with scapy, an independent
// implementation.

var (
	local  = [4]byte{192, 0, 2, 1}
	remote = [4]byte{198, 51, 100, 1}
	innerA = [4]byte{10, 255, 0, 1} // behind local
	innerB = [4]byte{10, 255, 0, 2} // behind remote
)

const goldenInner = `
	45b9 0020   // version 4, IHL 5, DSCP 46 (EF), ECT(1), total length 32
	1c46 4000   // ID, DF
	3f01 08de   // TTL 63, ICMP, header checksum
	0aff 0001   // source 10.255.0.1
	0aff 0002   // destination 10.255.0.2
	0800 24f4   // echo request
	002a 0001   // identifier, sequence
	6970 6970   // "ipip"
`

// golden decodes hexadecimal words; "//" starts a comment, as in an annotated packet dump.
func golden(t testing.TB, annotated string) []byte {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(annotated) {
		words, _, _ := strings.Cut(line, "//")
		digits.WriteString(strings.Join(strings.Fields(words), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dirty returns an empty Buffer whose memory, headroom included, is filled with 0xa5, to detect
// bytes that are not written.
func dirty(size int) *packet.Buffer {
	b := packet.New(size)
	b.Push(packet.Headroom)
	b.SetLen(packet.Headroom + size + packet.Tailroom)
	for i := range b.Bytes() {
		b.Bytes()[i] = 0xa5
	}
	b.Space()
	return b
}

// bufferOf returns a Buffer with a copy of p, surrounded by 0xa5.
func bufferOf(p []byte) *packet.Buffer {
	b := dirty(max(len(p), 2000))
	b.Set(p)
	return b
}

// build returns a packet with header h and payload. It fills in the total length.
func build(h ipv4.Header, payload []byte) []byte {
	h.TotalLen = ipv4.HeaderLen + len(payload)
	b := make([]byte, h.TotalLen)
	h.Put(b)
	copy(b[ipv4.HeaderLen:], payload)
	return b
}

// inner returns a header from innerA to innerB, with a protocol (GRE) that is not parsed.
func inner() ipv4.Header {
	return ipv4.Header{TTL: 64, Protocol: 47, ID: 7, Source: innerA, Destination: innerB}
}

// received returns an outer header from the remote end.
func received() ipv4.Header {
	return ipv4.Header{TTL: 250, Protocol: ipv4.ProtocolIPIP, ID: 9, Source: remote, Destination: local}
}

func parse(t testing.TB, b []byte) ipv4.Packet {
	t.Helper()
	p, err := ipv4.Parse(b)
	if err != nil {
		t.Fatalf("% x: %v", b, err)
	}
	return p
}

func wantBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if diff := cmp.Diff(hex.Dump(want), hex.Dump(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}
