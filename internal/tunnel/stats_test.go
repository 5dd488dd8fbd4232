package tunnel

import (
	"bytes"
	"testing"

	"ipipd/internal/ipv4"
)

// referenceHeaders is segmentHeaders without ipv4.ParseTransport.
func referenceHeaders(b []byte) (n int) {
	p, err := ipv4.Parse(b)
	if err != nil {
		return 0
	}
	transport := p.Payload()
	switch {
	case p.Protocol() == 6 && len(transport) >= 20:
		n = p.HeaderLen() + int(transport[12]>>4)*4
	case p.Protocol() == 17 && len(transport) >= 8:
		n = p.HeaderLen() + 8
	}
	if n >= len(b) {
		return 0
	}
	return n
}

// superpackets returns a TCP packet with 12 bytes of options and 1,000 of payload, and a UDP packet with as much payload.
func superpackets() (tcp, udp []byte) {
	tcp = datagram(20+32+1000, func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolTCP })
	tcp[20+ipv4.OffTCPDataOffset] = 32 / 4 << 4
	return tcp, datagram(20+8+1000, func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolUDP })
}

func TestSegmentHeaders(t *testing.T) {
	tcp, udp := superpackets()
	for want, p := range map[int][]byte{52: tcp, 28: udp} {
		if n := segmentHeaders(p); n != want {
			t.Errorf("%d, want %d", n, want)
		}
		for at := range 60 {
			for value := range 256 {
				changed := bytes.Clone(p[:at+1])
				changed[at] = byte(value)
				if n := segmentHeaders(changed); n != referenceHeaders(changed) {
					t.Fatalf("%d of % x", n, changed)
				}
				changed = append(changed, p[at+1:]...)
				if n := segmentHeaders(changed); n != referenceHeaders(changed) {
					t.Fatalf("%d of % x", n, changed[:60])
				}
			}
		}
	}
}

func FuzzSegmentHeaders(f *testing.F) {
	tcp, udp := superpackets()
	f.Add(tcp[:60])
	f.Add(udp[:60])
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := segmentHeaders(b); n != referenceHeaders(b) {
			t.Fatalf("%d of % x", n, b)
		}
	})
}
