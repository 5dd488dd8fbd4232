package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"ipipd/internal/ipv4"
)

// referenceTransport is parseTransport in terms of the views of package ipv4.
func referenceTransport(b []byte) (t transport, ok bool) {
	p, err := ipv4.Parse(b)
	if err != nil || p.TotalLen() != len(b) || p.IsFragment() {
		return t, false
	}
	v, ok := ipv4.ParseTransport(p)
	switch {
	case !ok:
	case v.Protocol == ipv4.ProtocolUDP:
		ok = int(binary.BigEndian.Uint16(b[v.Start+ipv4.OffUDPLength:])) == len(b)-v.Start
	default:
		ok = v.Payload >= v.Start+ipv4.TCPHeaderLen && v.Payload <= len(b)
	}
	return transport(v), ok
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
