package ipv4

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	netipv4 "golang.org/x/net/ipv4"
)

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

// goldenFragment was made with scapy.
const goldenFragment = `
	46b9 0024   // version 4, IHL 6, DSCP 46 (EF), ECT(1), total length 36
	1c46 600a   // ID, DF, MF, fragment offset 10 * 8
	3f11 53bb   // TTL 63, UDP, header checksum
	0aff 0001   // source 10.255.0.1
	0aff 0002   // destination 10.255.0.2
	9404 0000   // router alert
	0123 4567 89ab cdef 0123 4567
`

// Parse reads every field, and leaves out trailing bytes.
func TestParse(t *testing.T) {
	b := golden(t, goldenFragment)
	p, err := Parse(append(b, 0xff, 0xff)) // padding, as of an Ethernet frame
	if err != nil {
		t.Fatal(err)
	}
	want := Header{
		TOS: 0xb9, TotalLen: 36, ID: 0x1c46, DF: true, MF: true, FragmentOffset: 80, TTL: 63, Protocol: ProtocolUDP,
		Source: [4]byte{10, 255, 0, 1}, Destination: [4]byte{10, 255, 0, 2},
	}
	if diff := cmp.Diff(want, p.Header()); diff != "" {
		t.Errorf("Header (-want +got):\n%s", diff)
	}
	got := Header{
		TOS: p.TOS(), TotalLen: p.TotalLen(), ID: p.ID(), DF: p.DF(), MF: p.MF(), FragmentOffset: p.FragmentOffset(),
		TTL: p.TTL(), Protocol: p.Protocol(), Source: p.Source(), Destination: p.Destination(),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("methods (-want +got):\n%s", diff)
	}
	if p.HeaderLen() != 24 || p.DSCP() != 46 || p.ECN() != ECT1 || !p.IsFragment() || !p.HeaderChecksumValid() {
		t.Errorf("header length %d, DSCP %d, ECN %v, fragment %v, checksum valid %v",
			p.HeaderLen(), p.DSCP(), p.ECN(), p.IsFragment(), p.HeaderChecksumValid())
	}
	if !bytes.Equal(p.Bytes(), b) || !bytes.Equal(p.Options(), b[20:24]) || !bytes.Equal(p.Payload(), b[24:]) {
		t.Errorf("bytes % x, options % x, payload % x", p.Bytes(), p.Options(), p.Payload())
	}
	if cap(p.Bytes()) != p.TotalLen() {
		t.Error("appending to Bytes would overwrite what follows the packet")
	}
}

func TestParse_malformed(t *testing.T) {
	b := golden(t, goldenFragment)
	change := func(off int, v byte) []byte {
		c := bytes.Clone(b)
		c[off] = v
		return c
	}
	for name, test := range map[string]struct {
		b    []byte
		want Error
	}{
		"nothing":                          {nil, ErrShort},
		"19 bytes":                         {b[:19], ErrShort},
		"version 6":                        {change(0, 0x66), ErrVersion},
		"IHL 4":                            {change(0, 0x44), ErrHeaderLength},
		"IHL 0":                            {change(0, 0x40), ErrHeaderLength},
		"total length below header length": {change(3, 23), ErrTotalLength},
		"total length 0":                   {change(3, 0), ErrTotalLength},
		"total length beyond the end":      {change(3, 37), ErrTruncated},
		"options beyond the end":           {b[:22], ErrTruncated},
	} {
		if p, err := Parse(test.b); err != test.want || p.Bytes() != nil {
			t.Errorf("%s: Parse = %v, %v, want %v", name, p, err, test.want)
		}
	}
	if _, _, err := ParseHeader(b[:22]); err != ErrShort {
		t.Errorf("ParseHeader without the options: %v, want %v", err, ErrShort)
	}
	if h, n, err := ParseHeader(b[:24]); err != nil || n != 24 || h.TotalLen != 36 {
		t.Errorf("ParseHeader of a quoted header: %+v, %d, %v", h, n, err)
	}
}

func TestError(t *testing.T) {
	seen := map[string]bool{}
	for e := ErrShort; e <= ErrTruncated+1; e++ {
		if s := e.Error(); s == "" || seen[s] {
			t.Errorf("Error(%d) = %q", e, s)
		} else {
			seen[s] = true
		}
	}
	var e Error
	if _, err := Parse(nil); !errors.As(err, &e) || e != ErrShort {
		t.Errorf("not an Error: %v", err)
	}
}

// filled returns n bytes of 0xa5, to detect a byte that is not written.
func filled(n int) []byte { return bytes.Repeat([]byte{0xa5}, n) }

// Put writes every byte of the header and no other.
func TestHeaderPut(t *testing.T) {
	h := Header{
		TOS: 0x28, TotalLen: 84, ID: 0xbeef, DF: true, TTL: 255, Protocol: ProtocolIPIP,
		Source: [4]byte{192, 0, 2, 1}, Destination: [4]byte{198, 51, 100, 1},
	}
	want := golden(t, `
		4528 0054   // version 4, IHL 5, DSCP 10, Not-ECT, total length 84
		beef 4000   // ID, DF
		ff04 d057   // TTL 255, IPIP, header checksum
		c000 0201   // source 192.0.2.1
		c633 6401   // destination 198.51.100.1
		a5a5 a5a5   // not the header
	`)
	got := filled(24)
	h.Put(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// The same with the header parser of golang.org/x/net, which on other systems expects the
	// header as their raw sockets change it.
	if runtime.GOOS != "linux" {
		return
	}
	other, err := netipv4.ParseHeader(got)
	if err != nil {
		t.Fatal(err)
	}
	if other.TOS != 0x28 || other.TotalLen != 84 || other.ID != 0xbeef || other.Flags != netipv4.DontFragment ||
		other.TTL != 255 || other.Protocol != 4 || other.Src.String() != "192.0.2.1" || other.Dst.String() != "198.51.100.1" {
		t.Errorf("x/net reads %v", other)
	}
}

func TestHeaderPutOptions(t *testing.T) {
	b := golden(t, goldenFragment)
	h, n, err := ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	got := filled(n)
	h.PutOptions(got, b[HeaderLen:n])
	if diff := cmp.Diff(b[:n], got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The setters keep a valid header checksum valid.
func TestPacket_settersUpdateChecksum(t *testing.T) {
	b := golden(t, goldenFragment)
	p, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	for v := range 256 {
		p.SetTOS(uint8(v))
		if p.TOS() != uint8(v) || !p.HeaderChecksumValid() {
			t.Fatalf("SetTOS(%d): TOS %d, checksum valid %v", v, p.TOS(), p.HeaderChecksumValid())
		}
		p.SetTTL(uint8(v))
		if p.TTL() != uint8(v) || !p.HeaderChecksumValid() {
			t.Fatalf("SetTTL(%d): TTL %d, checksum valid %v", v, p.TTL(), p.HeaderChecksumValid())
		}
	}
	p.SetTOS(0xb9)
	p.SetECN(CE)
	if p.TOS() != 0xbb || !p.HeaderChecksumValid() {
		t.Errorf("SetECN(CE): TOS %#x, checksum valid %v", p.TOS(), p.HeaderChecksumValid())
	}
	source, destination := p.Source(), p.Destination()
	for _, a := range [][2][4]byte{{}, {{10, 0, 0, 5}, {192, 0, 2, 1}}, {{255, 255, 255, 255}, {}}, {source, destination}} {
		p.SetAddresses(a[0], a[1])
		if p.Source() != a[0] || p.Destination() != a[1] || !p.HeaderChecksumValid() {
			t.Fatalf("SetAddresses(%v): %v, %v, checksum valid %v", a, p.Source(), p.Destination(), p.HeaderChecksumValid())
		}
	}
	p.SetTOS(0xb9)
	p.SetTTL(63)
	if diff := cmp.Diff(golden(t, goldenFragment), b); diff != "" {
		t.Errorf("back at the beginning (-want +got):\n%s", diff)
	}
}

// The setters keep a wrong checksum wrong: a damaged packet must not become valid.
func TestPacket_settersKeepWrongChecksum(t *testing.T) {
	b := golden(t, goldenFragment)
	b[11]++
	p, _ := Parse(b)
	p.SetTTL(1)
	p.SetTOS(0)
	if p.HeaderChecksumValid() {
		t.Error("a damaged header now looks valid")
	}
}

// referenceSum is RFC 1071 word by word.
func referenceSum(b []byte, initial uint64) uint16 {
	sum := initial>>32 + initial&0xffffffff // room for carries
	for i := 0; i < len(b); i += 2 {
		word := uint64(b[i]) << 8
		if i+1 < len(b) {
			word |= uint64(b[i+1])
		}
		sum += word
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// Sum of every length and alignment.
func TestSum(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 300)
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	ones := bytes.Repeat([]byte{0xff}, 300) // every addition carries
	for _, b := range [][]byte{data, ones, make([]byte, 300)} {
		for off := range 9 {
			for n := range 270 {
				initial := random.Uint64() >> (n % 64)
				if n%5 == 0 {
					initial = 0
				}
				if got, want := Sum(b[off:off+n], initial), referenceSum(b[off:off+n], initial); got != uint64(want) {
					t.Fatalf("Sum of %d bytes from %d, initial %#x = %#x, want %#x", n, off, initial, got, want)
				}
			}
		}
	}
}

func TestSum_rfc1071(t *testing.T) {
	// RFC 1071, section 3: the sum is ddf0 + 2, that is ddf2.
	b := []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}
	if got := Sum(b, 0); got != 0xddf2 {
		t.Errorf("Sum = %#x, want 0xddf2", got)
	}
	if got := Checksum(b, 0); got != 0x220d {
		t.Errorf("Checksum = %#x, want 0x220d", got)
	}
}

func TestPseudoHeaderSum(t *testing.T) {
	// A UDP datagram made with scapy: 10.255.0.1:4321 → 10.255.0.2:53, "x".
	b := golden(t, `10e1 0035 0009 60c5 78`)
	pseudo := PseudoHeaderSum([4]byte{10, 255, 0, 1}, [4]byte{10, 255, 0, 2}, ProtocolUDP, len(b))
	if got := Sum(b, pseudo); got != 0xffff {
		t.Errorf("sum over a right checksum = %#x, want 0xffff", got)
	}
	binary.BigEndian.PutUint16(b[6:], 0)
	if got := Checksum(b, pseudo); got != 0x60c5 {
		t.Errorf("Checksum = %#x, want 0x60c5", got)
	}
}

func TestUpdateChecksum16(t *testing.T) {
	// RFC 1624, section 4: an example for which RFC 1141 yields ffff.
	if got := UpdateChecksum16(0xdd2f, 0x5555, 0x3285); got != 0 {
		t.Errorf("UpdateChecksum16 = %#x, want 0", got)
	}
}

func TestPacket_noAllocations(t *testing.T) {
	b := golden(t, goldenFragment)
	bad := []byte{0x60}
	buffer := filled(64)
	if n := testing.AllocsPerRun(100, func() {
		p, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		p.SetECN(CE)
		p.SetTTL(9)
		h := p.Header()
		h.PutOptions(buffer, p.Options())
		if _, err := Parse(bad); err != ErrShort {
			t.Fatal(err)
		}
		if Checksum(b, PseudoHeaderSum(p.Source(), p.Destination(), p.Protocol(), 8)); !p.HeaderChecksumValid() {
			t.Fatal("checksum")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The pseudo-header sum in the field is completed as by a full computation; 0 becomes 0xffff, and a
// field outside the packet is left alone.
func TestCompleteChecksum(t *testing.T) {
	for _, annotated := range []string{goldenTCP, goldenUDP} {
		whole := golden(t, annotated)
		p := Packet{whole}
		at, _ := ParseTransport(p)
		partial := bytes.Clone(whole)
		binary.BigEndian.PutUint16(partial[at.Checksum:], Fold(PseudoHeaderSum(p.Source(), p.Destination(), at.Protocol, len(whole)-at.Start)))
		if !CompleteChecksum(partial, at.Start, at.Checksum-at.Start) || !bytes.Equal(partial, whole) {
			t.Errorf("% x, want % x", partial, whole)
		}
	}
	zero := []byte{1, 2, 3, 4, 0xff, 0xff, 0x12, 0x34, 0xed, 0xcb} // from 4 on the sum is 0xffff, its complement 0
	if !CompleteChecksum(zero, 4, 0) || !bytes.Equal(zero[:6], []byte{1, 2, 3, 4, 0xff, 0xff}) {
		t.Errorf("% x, want ff ff in the field", zero)
	}
	before := bytes.Clone(zero)
	for _, at := range [][2]int{{-1, 4}, {-14, 14}, {4, 5}, {9, 0}, {10, 0}, {11, 0}, {65535, 65535}} {
		if CompleteChecksum(zero, at[0], at[1]) || !bytes.Equal(zero, before) {
			t.Errorf("start %d, offset %d: % x", at[0], at[1], zero)
		}
	}
	if !CompleteChecksum(zero, 8, 0) {
		t.Error("the last two bytes are in the packet")
	}
}
