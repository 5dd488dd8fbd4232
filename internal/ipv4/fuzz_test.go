package ipv4

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// FuzzParse checks that what Parse accepts is consistent, that ParseHeader agrees with it, and
// that PutOptions rebuilds the header.
func FuzzParse(f *testing.F) {
	f.Add(golden(f, goldenFragment), uint8(3))
	f.Fuzz(func(t *testing.T, b []byte, tos uint8) {
		h, headerLen, headerErr := ParseHeader(b)
		p, err := Parse(b)
		if err != nil {
			if headerErr == nil && err != ErrTruncated {
				t.Fatalf("Parse: %v, ParseHeader: nil", err)
			}
			return
		}
		if headerErr != nil || p.Header() != h || p.HeaderLen() != headerLen {
			t.Fatalf("ParseHeader: %+v, %d, %v", h, headerLen, headerErr)
		}
		if len(p.Options())+len(p.Payload())+HeaderLen != p.TotalLen() || p.TotalLen() != h.TotalLen || p.TotalLen() > len(b) {
			t.Fatalf("lengths of %+v do not add up", h)
		}
		built := filled(headerLen)
		h.PutOptions(built, p.Options())
		built[6] |= b[6] & 0x80 // the reserved flag is the one bit that Header does not have
		if !bytes.Equal(built[:10], b[:10]) || !bytes.Equal(built[12:], b[12:headerLen]) {
			t.Fatalf("built % x from % x", built, b[:headerLen])
		}

		// The incremental checksum equals the full one.
		valid := bytes.Clone(p.Bytes())
		binary.BigEndian.PutUint16(valid[10:], 0)
		binary.BigEndian.PutUint16(valid[10:], Checksum(valid[:headerLen], 0))
		q, _ := Parse(valid)
		q.SetTOS(tos)
		q.SetTTL(tos + 1)
		incremental := binary.BigEndian.Uint16(valid[10:])
		binary.BigEndian.PutUint16(valid[10:], 0)
		if full := Checksum(valid[:headerLen], 0); full != incremental {
			t.Fatalf("incremental checksum %#x, full %#x", incremental, full)
		}
	})
}

// FuzzChecksum compares Sum, of one piece or two, with referenceSum, and UpdateChecksum16 with a
// full computation.
func FuzzChecksum(f *testing.F) {
	f.Add([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, uint64(0), uint16(4), uint16(0x1234))
	f.Add(bytes.Repeat([]byte{0xff}, 129), ^uint64(0), uint16(64), uint16(0))
	f.Add(bytes.Repeat([]byte{0xff}, 1500), uint64(0xffff), uint16(20), uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, initial uint64, at, word uint16) {
		want := referenceSum(b, initial)
		if got := Sum(b, initial); got != uint64(want) {
			t.Fatalf("Sum = %#x, want %#x", got, want)
		}
		if len(b) < 2 {
			return
		}
		i := int(at) % (len(b) - 1) &^ 1
		if got := Sum(b[i:], Sum(b[:i], initial)); got != uint64(want) {
			t.Fatalf("Sum in two pieces = %#x, want %#x", got, want)
		}
		before := Checksum(b, initial)
		changed := bytes.Clone(b)
		binary.BigEndian.PutUint16(changed[i:], word)
		after := Checksum(changed, initial)
		if referenceSum(changed, initial) == 0 {
			return // an all-zero sum has two representations; no header has it
		}
		if got := UpdateChecksum16(before, binary.BigEndian.Uint16(b[i:]), word); got != after {
			t.Fatalf("UpdateChecksum16 = %#x, want %#x", got, after)
		}
	})
}
