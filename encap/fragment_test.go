package encap_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// pattern returns n bytes whose values depend on their offset, to detect misplaced ones.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// buffers returns n Buffers with room for size bytes each.
func buffers(n, size int) []*packet.Buffer {
	batch := make([]*packet.Buffer, n)
	for i := range batch {
		batch[i] = dirty(size)
	}
	return batch
}

// reassemble implements RFC 791, section 3.2, for fragments in any order. have marks the bytes
// received.
func reassemble(t testing.TB, fragments []*packet.Buffer) []byte {
	t.Helper()
	payload := make([]byte, ipv4.MaxTotalLen)
	have := make([]bool, ipv4.MaxTotalLen)
	var header []byte
	length := -1
	for _, b := range fragments {
		p := parse(t, b.Bytes())
		at := p.FragmentOffset()
		for i, v := range p.Payload() {
			if have[at+i] {
				t.Fatalf("byte %d comes twice", at+i)
			}
			payload[at+i], have[at+i] = v, true
		}
		if at == 0 {
			header = bytes.Clone(p.Bytes()[:p.HeaderLen()])
		}
		if !p.MF() {
			length = at + len(p.Payload())
		}
	}
	for i := range length {
		if !have[i] {
			t.Fatalf("byte %d is missing", i)
		}
	}
	if header == nil || length < 0 {
		t.Fatal("the first or the last fragment is missing")
	}
	h, n, err := ipv4.ParseHeader(header)
	if err != nil {
		t.Fatal(err)
	}
	h.TotalLen, h.MF = n+length, false
	whole := make([]byte, h.TotalLen)
	h.PutOptions(whole, header[ipv4.HeaderLen:])
	copy(whole[n:], payload[:length])
	return whole
}

// checkFragments checks the headers and lengths of all fragments of p for an MTU of mtu bytes.
func checkFragments(t testing.TB, p ipv4.Packet, fragments []*packet.Buffer, mtu int) {
	t.Helper()
	for i, b := range fragments {
		f := parse(t, b.Bytes())
		last := i == len(fragments)-1
		if f.TotalLen() != b.Len() || b.Len() > mtu {
			t.Errorf("fragment %d has %d of %d bytes, and the path carries %d", i, f.TotalLen(), b.Len(), mtu)
		}
		if !f.HeaderChecksumValid() {
			t.Errorf("fragment %d: wrong checksum", i)
		}
		if f.ID() != p.ID() || f.TOS() != p.TOS() || f.TTL() != p.TTL() || f.Protocol() != p.Protocol() || f.DF() != p.DF() ||
			f.Source() != p.Source() || f.Destination() != p.Destination() {
			t.Errorf("fragment %d: %+v of %+v", i, f.Header(), p.Header())
		}
		if f.MF() != (!last || p.MF()) {
			t.Errorf("fragment %d of %d: MF %v", i, len(fragments), f.MF())
		}
		if !last && len(f.Payload())%8 != 0 {
			t.Errorf("fragment %d has %d bytes of payload, not a multiple of 8", i, len(f.Payload()))
		}
	}
}

// Fragments in any order reassemble to the packet.
func TestFragment_reassembly(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, size := range []int{0, 1, 48, 49, 1480, 1481, 8000, encap.MaxInner} {
		for _, mtu := range []int{68, 576, 1007, 1500, 9000} {
			whole := build(received(), pattern(size))
			p := parse(t, whole)
			count := encap.FragmentCount(p, mtu)
			into := buffers(count, mtu)
			n, d := encap.Fragment(into, p, mtu)
			if d != drop.None || n != count {
				t.Fatalf("%d bytes, MTU %d: %d fragments of %d, drop %v", size, mtu, n, count, d)
			}
			checkFragments(t, p, into, mtu)
			random.Shuffle(n, func(i, j int) { into[i], into[j] = into[j], into[i] })
			if got := reassemble(t, into); !bytes.Equal(got, whole) {
				t.Errorf("%d bytes, MTU %d: reassembled differently", size, mtu)
			}
		}
	}
}

// Fragments are as large as the MTU allows.
func TestFragment_sizes(t *testing.T) {
	p := parse(t, build(received(), pattern(3000)))
	into := buffers(3, 1500)
	if n, d := encap.Fragment(into, p, 1500); n != 3 || d != drop.None {
		t.Fatal(n, d)
	}
	var got []int
	for _, b := range into {
		got = append(got, b.Len())
	}
	if diff := cmp.Diff([]int{1500, 1500, 60}, got); diff != "" {
		t.Errorf("lengths (-want +got):\n%s", diff)
	}
}

// Offsets of a fragment's fragments continue from its own.
func TestFragment_ofFragment(t *testing.T) {
	whole := build(received(), pattern(4000))
	first := buffers(3, 1500)
	if n, d := encap.Fragment(first, parse(t, whole), 1500); n != 3 || d != drop.None {
		t.Fatal(n, d)
	}
	var all []*packet.Buffer
	for i, b := range first {
		p := parse(t, b.Bytes())
		into := buffers(encap.FragmentCount(p, 600), 600)
		if n, d := encap.Fragment(into, p, 600); n != len(into) || d != drop.None {
			t.Fatal(n, d)
		}
		checkFragments(t, p, into, 600)
		if f := parse(t, into[0].Bytes()); f.FragmentOffset() != p.FragmentOffset() {
			t.Errorf("fragment %d: offset %d, was %d", i, f.FragmentOffset(), p.FragmentOffset())
		}
		all = append(all, into...)
	}
	wantBytes(t, "reassembled", reassemble(t, all), whole)
}

// Later fragments have only the options with the copied flag.
func TestFragment_copiedOptions(t *testing.T) {
	options := []byte{
		1,                   // no operation
		7, 7, 4, 0, 0, 0, 0, // record route: only in the first
		0x82, 4, 1, 2, // security: copied
		1,             // no operation
		0x94, 4, 0, 0, // router alert: copied
		0x83, 3, 4, // loose source route: copied
		0, 0, 0, 0, // end of list
	}
	want := []byte{0x82, 4, 1, 2, 0x94, 4, 0, 0, 0x83, 3, 4, 0}
	h := received()
	payload := pattern(1000)
	h.TotalLen = 20 + len(options) + len(payload)
	whole := make([]byte, h.TotalLen)
	h.PutOptions(whole, options)
	copy(whole[20+len(options):], payload)
	p := parse(t, whole)
	into := buffers(encap.FragmentCount(p, 300), 300)
	if n, d := encap.Fragment(into, p, 300); n != len(into) || d != drop.None {
		t.Fatal(n, d)
	}
	checkFragments(t, p, into, 300)
	for i, b := range into {
		f := parse(t, b.Bytes())
		if i == 0 {
			wantBytes(t, "options of the first", f.Options(), options)
		} else {
			wantBytes(t, "options of a later one", f.Options(), want)
		}
	}
	wantBytes(t, "reassembled", reassemble(t, into), whole)
}

// A malformed option ends the list of copied options.
func TestFragment_malformedOptions(t *testing.T) {
	for name, options := range map[string][]byte{
		"length 0":           {0x94, 0, 0, 0},
		"length 1":           {0x94, 1, 0, 0},
		"beyond the end":     {0x94, 5, 0, 0},
		"without a length":   {1, 1, 1, 0x94},
		"after end of list":  {0, 2, 0x94, 4, 0, 0, 0, 0},
		"forty of one octet": bytes.Repeat([]byte{0x94}, 40),
	} {
		h := received()
		h.TotalLen = 20 + len(options) + 100
		whole := make([]byte, h.TotalLen)
		h.PutOptions(whole, options)
		p := parse(t, whole)
		into := buffers(20, 80)
		n, d := encap.Fragment(into, p, 80)
		if d != drop.None || n < 2 {
			t.Fatalf("%s: %d fragments, drop %v", name, n, d)
		}
		if f := parse(t, into[1].Bytes()); len(f.Options()) != 0 {
			t.Errorf("%s: options % x", name, f.Options())
		}
	}
}

// A packet with DF=1 is never fragmented.
func TestFragment_df(t *testing.T) {
	h := received()
	h.DF = true
	p := parse(t, build(h, pattern(100)))
	if n, d := encap.Fragment(buffers(9, 100), p, 100); n != 0 || d != drop.TooBig {
		t.Errorf("%d fragments, drop %v, want %v", n, d, drop.TooBig)
	}
	if n := encap.FragmentCount(p, 100); n != 0 {
		t.Errorf("FragmentCount = %d", n)
	}
	into := buffers(1, 120)
	if n, d := encap.Fragment(into, p, 120); n != 1 || d != drop.None {
		t.Fatalf("one that fits: %d fragments, drop %v", n, d)
	}
	wantBytes(t, "one that fits", into[0].Bytes(), p.Bytes())
}

func TestFragment_tooSmall(t *testing.T) {
	p := parse(t, build(received(), pattern(100)))
	for name, test := range map[string]struct {
		into []*packet.Buffer
		mtu  int
	}{
		"too few buffers":       {buffers(1, 100), 100},
		"buffers too small":     {buffers(2, 60), 100},
		"one buffer too small":  {buffers(1, 60), 120},
		"no 8 bytes of payload": {buffers(100, 100), 27},
		"less than a header":    {buffers(100, 100), 0},
	} {
		if n, d := encap.Fragment(test.into, p, test.mtu); n != 0 || d != drop.FragmentFailed {
			t.Errorf("%s: %d fragments, drop %v, want %v", name, n, d, drop.FragmentFailed)
		}
	}
}
