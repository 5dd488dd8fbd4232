package keepalive

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
)

var (
	local  = [4]byte{192, 0, 2, 1}
	remote = [4]byte{198, 51, 100, 1}
	source = [4]byte{10, 255, 0, 1}
	target = [4]byte{10, 255, 0, 2}
)

func TestReflectProbe(t *testing.T) {
	want := []byte{
		0x45, 0x00, 0x00, 0x14, // version 4, 20 bytes of header; total length 20: no payload
		0x00, 0x00, 0x40, 0x00, // ID 0, DF
		0xff, 0x04, 0x8f, 0xaf, // TTL 255, protocol 4, checksum
		198, 51, 100, 1, // from the peer
		192, 0, 2, 1, // to us
	}
	got := ReflectProbe(local, remote)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("probe (-want +got):\n%s", diff)
	}
	if p, err := ipv4.Parse(got); err != nil || !p.HeaderChecksumValid() {
		t.Errorf("not a valid packet: %v", err)
	}
}

func TestEchoRequest(t *testing.T) {
	e := &Echo{source: source, target: target, identifier: 0x1234, sequence: 6}
	want := []byte{
		0x45, 0x00, 0x00, 0x2c, // version 4, 20 bytes of header; total length 44
		0x00, 0x00, 0x40, 0x00, // ID 0, DF
		0x40, 0x01, 0x24, 0xd1, // TTL 64, protocol ICMP, checksum
		10, 255, 0, 1, // from our inner address
		10, 255, 0, 2, // to the target
		0x08, 0x00, 0xae, 0x00, // echo request, code 0, checksum
		0x12, 0x34, 0x00, 0x07, // identifier, sequence number
		'i', 'p', 'i', 'p', 'd', ' ', 'k', 'e', 'e', 'p', 'a', 'l', 'i', 'v', 'e', '\n',
	}
	got := e.Request()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("probe (-want +got):\n%s", diff)
	}
	p, err := ipv4.Parse(got)
	if err != nil || !p.HeaderChecksumValid() || ipv4.Checksum(p.Payload(), 0) != 0 {
		t.Errorf("not a valid packet: %v", err)
	}
	if next := e.Request(); binary.BigEndian.Uint16(next[ipv4.HeaderLen+offSequence:]) != 8 {
		t.Error("the sequence number does not count")
	}
}

// reply returns a host's reply to an echo request (RFC 792), independent of the code under test.
func reply(request []byte) []byte {
	p, err := ipv4.Parse(request)
	if err != nil {
		panic(err)
	}
	b := append([]byte(nil), request...)
	h := p.Header()
	h.Source, h.Destination, h.TTL = h.Destination, h.Source, 63
	h.Put(b)
	b[20] = 0
	putChecksum(b)
	return b
}

// putChecksum sets the ICMP checksum.
func putChecksum(b []byte) {
	b[22], b[23] = 0, 0
	binary.BigEndian.PutUint16(b[22:], ipv4.Checksum(b[20:], 0))
}

func TestEchoIsReply(t *testing.T) {
	e := NewEcho(source, target)
	first := reply(e.Request())
	for _, c := range []struct {
		name   string
		change func(b []byte, h *ipv4.Header)
		want   bool
	}{
		{"the reply", func([]byte, *ipv4.Header) {}, true},
		{"a reply by other TTL and TOS", func(_ []byte, h *ipv4.Header) { h.TTL, h.TOS, h.ID = 1, 0xb8, 7 }, true},
		{"a request", func(b []byte, _ *ipv4.Header) { b[20] = 8 }, false},
		{"another code", func(b []byte, _ *ipv4.Header) { b[21] = 1 }, false},
		{"another identifier", func(b []byte, _ *ipv4.Header) { b[25] ^= 1 }, false},
		{"other data", func(b []byte, _ *ipv4.Header) { b[28] ^= 1 }, false},
		{"from another host", func(_ []byte, h *ipv4.Header) { h.Source[3]++ }, false},
		{"to another host", func(_ []byte, h *ipv4.Header) { h.Destination[3]++ }, false},
		{"another protocol", func(_ []byte, h *ipv4.Header) { h.Protocol = 17 }, false},
		{"a first fragment", func(_ []byte, h *ipv4.Header) { h.MF = true }, false},
		{"a last fragment", func(_ []byte, h *ipv4.Header) { h.FragmentOffset = 8 }, false},
		{"a shorter packet", func(_ []byte, h *ipv4.Header) { h.TotalLen-- }, false},
		{"a header", func(_ []byte, h *ipv4.Header) { h.TotalLen = 20 }, false},
	} {
		b := append([]byte(nil), first...)
		p, err := ipv4.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		h := p.Header()
		c.change(b, &h)
		h.Put(b)
		putChecksum(b)
		if p, err = ipv4.Parse(b); err != nil {
			t.Fatal(err)
		}
		if got := e.IsReply(p); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	b := append([]byte(nil), first...)
	b[22] ^= 1
	if p, _ := ipv4.Parse(b); e.IsReply(p) {
		t.Error("a reply with a wrong ICMP checksum is taken")
	}
}

func TestEchoIsReply_allocs(t *testing.T) {
	e := NewEcho(source, target)
	p, err := ipv4.Parse(reply(e.Request()))
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if !e.IsReply(p) {
			t.Fatal("not taken for the reply")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzEchoIsReply(f *testing.F) {
	e := &Echo{source: source, target: target, identifier: 0x1234}
	f.Add(reply(e.Request()))
	f.Add(ReflectProbe(local, remote))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ipv4.Parse(b)
		if err == nil && e.IsReply(p) && (p.Source() != target || p.Destination() != source) {
			t.Error("a packet between others is taken for the reply")
		}
	})
}
