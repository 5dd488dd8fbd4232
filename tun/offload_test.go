package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"ipipd/internal/ipv4"
)

// referenceTransport is parseTransport by hand, in one function.
func referenceTransport(p []byte) (t transport, ok bool) {
	if len(p) < 20 || p[0]>>4 != 4 {
		return t, false
	}
	t.Protocol = p[9]
	t.Start = int(p[0]&0x0f) * 4
	if t.Start < 20 || int(binary.BigEndian.Uint16(p[2:])) != len(p) ||
		binary.BigEndian.Uint16(p[6:])&0x3fff != 0 { // MF or an offset
		return t, false
	}
	switch t.Protocol {
	case 6:
		if len(p) < t.Start+20 {
			return t, false
		}
		t.Checksum = t.Start + 16
		length := int(p[t.Start+12]>>4) * 4
		t.Payload = t.Start + length
		return t, length >= 20 && t.Payload <= len(p)
	case 17:
		if len(p) < t.Start+8 {
			return t, false
		}
		t.Checksum = t.Start + 6
		t.Payload = t.Start + 8
		return t, int(binary.BigEndian.Uint16(p[t.Start+4:])) == len(p)-t.Start
	}
	return t, false
}

// compareTransport fails t if parseTransport and referenceTransport differ.
func compareTransport(t *testing.T, p []byte) (ok bool) {
	t.Helper()
	want, wantOK := referenceTransport(p)
	got, ok := parseTransport(p)
	if ok != wantOK || ok && got != want {
		t.Fatalf("%+v, %v of % x, want %+v, %v", got, ok, p, want, wantOK)
	}
	return ok
}

// Every length of a packet, and every value of every byte of its headers.
func TestParseTransport(t *testing.T) {
	for name, p := range map[string][]byte{
		"TCP":                 spec{tcp: true, payload: []byte("data")}.build(),
		"TCP with options":    spec{tcp: true, options: timestamps, payload: []byte("data")}.build(),
		"TCP with IP options": spec{tcp: true, ipOption: []byte{0x94, 4, 0, 0}}.build(),
		"UDP":                 spec{payload: []byte("data")}.build(),
		"UDP with IP options": spec{ipOption: []byte{0x94, 4, 0, 0}, payload: []byte("data")}.build(),
	} {
		if !compareTransport(t, p) {
			t.Errorf("%s is not recognised", name)
		}
		for n := range len(p) {
			short := bytes.Clone(p[:n])
			compareTransport(t, short)
			if n >= ipv4.HeaderLen { // the total length agrees, so the transport header is short
				binary.BigEndian.PutUint16(short[ipv4.OffTotalLen:], uint16(n))
				compareTransport(t, short)
			}
		}
		for at := range p {
			for value := range 256 {
				changed := bytes.Clone(p)
				changed[at] = byte(value)
				compareTransport(t, changed)
			}
		}
		if compareTransport(t, append(p, 0)) {
			t.Errorf("%s with a byte of padding is taken", name)
		}
	}
}

func FuzzParseTransport(f *testing.F) {
	f.Add(spec{tcp: true, options: timestamps, payload: []byte("data")}.build())
	f.Add(spec{ipOption: []byte{0x94, 4, 0, 0}, payload: []byte("data")}.build())
	f.Fuzz(func(t *testing.T, p []byte) { compareTransport(t, p) })
}
