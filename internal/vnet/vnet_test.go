package vnet

import (
	"encoding/binary"
	"testing"
)

// Every field has its place, and every byte is written.
func TestDecode(t *testing.T) {
	var b [HeaderLen]byte
	b[0], b[1] = 0x12, 0x34
	for i := range 4 {
		binary.NativeEndian.PutUint16(b[2+2*i:], uint16(0x5670+i))
	}
	want := Header{Flags: 0x12, GSOType: 0x34, HdrLen: 0x5670, GSOSize: 0x5671, CsumStart: 0x5672, CsumOffset: 0x5673}
	if h := Decode(&b); h != want {
		t.Errorf("%+v, want %+v", h, want)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) != HeaderLen {
			return
		}
		h := Decode((*[HeaderLen]byte)(p))
		encoded := [HeaderLen]byte{0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5}
		if h.Encode(&encoded); encoded != [HeaderLen]byte(p) {
			t.Fatalf("% x came back as % x", p, encoded)
		}
	})
}
