package netlab

import (
	"strings"
	"testing"

	"ipipd/internal/ipv4"
)

// outerPacket is an ICMP echo request in an IPIP packet.
func outerPacket() []byte {
	b := make([]byte, 20+20+8)
	outer := ipv4.Header{TOS: 0x28, TotalLen: 48, ID: 7, TTL: 255, Protocol: ipv4.ProtocolIPIP,
		Source: [4]byte{192, 0, 2, 1}, Destination: [4]byte{198, 51, 100, 1}}
	outer.Put(b)
	inner := ipv4.Header{TotalLen: 28, DF: true, TTL: 64, Protocol: ipv4.ProtocolICMP,
		Source: [4]byte{10, 255, 0, 1}, Destination: [4]byte{10, 255, 0, 2}}
	inner.Put(b[20:])
	b[40] = 8
	b[42], b[43] = 0xf7, 0xff
	return b
}

func TestMatch(t *testing.T) {
	b := outerPacket()
	Assert(t, b, Outer(TTL(255), TOS(0x28), DSCP(10), DF(false), ID(7), TotalLen(48), Source("192.0.2.1"), Destination("198.51.100.1"),
		Inner(DF(true), TTL(64), ICMP(8, 0), MaxTotalLen(28)), Not(TTL(64))))

	err := Match(b, Outer(TTL(64), Inner(ICMP(0, 0))))
	for _, want := range []string{"TTL is 255, want 64", "inner: ICMP type and code are 8/0, want 0/0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error is %v, without %q", err, want)
		}
	}
	b[43]++
	if err := Match(b, Inner(ICMP(8, 0))); err == nil {
		t.Error("a wrong ICMP checksum is not seen")
	}
	b[8]--
	if err := Match(b); err == nil {
		t.Error("a wrong header checksum is not seen")
	}
	if err := Match(b[:30]); err == nil {
		t.Error("a truncated packet is not seen")
	}
}

func TestDescribe(t *testing.T) {
	want := "{192.0.2.1 > 198.51.100.1 proto 4 len 48 ttl 255 tos 0x28 id 7 {10.255.0.1 > 10.255.0.2 proto 1 len 28 ttl 64 tos 0x00 id 0 DF ICMP 8/0}}"
	if got := Describe(outerPacket()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
