package ipv4

import (
	"encoding/binary"
	"testing"
)

// The checksums were computed by another program.
const (
	goldenTCP = `
		4600 0038   // version 4, IHL 6, total length 56
		1c46 4000   // ID, DF
		3f06 7475   // TTL 63, TCP, header checksum
		0aff 0001   // source 10.255.0.1
		0aff 0002   // destination 10.255.0.2
		9404 0000   // router alert
		10e1 0050   // ports
		0102 0304   // sequence number
		0506 0708   // acknowledgment number
		7018 2000   // data offset 7, ACK and PSH, window
		58f3 0000   // checksum, urgent pointer
		0204 05a0   // MSS 1440
		0101 0402   // two NOPs, SACK permitted
		6970 6970   // "ipip"
	`
	goldenUDP = `
		4500 0020   // version 4, IHL 5, total length 32
		1c46 4000   // ID, DF
		3f11 0987   // TTL 63, UDP, header checksum
		0aff 0001   // source 10.255.0.1
		0aff 0002   // destination 10.255.0.2
		10e1 0035   // ports
		000c 05df   // length 12, checksum
		6970 6970   // "ipip"
	`
)

// The view is right about options of IPv4 and TCP, and the named offsets about the fields.
func TestParseTransport(t *testing.T) {
	tcp, udp := golden(t, goldenTCP), golden(t, goldenUDP)
	for name, test := range map[string]struct {
		b    []byte
		want Transport
	}{
		"TCP": {tcp, Transport{Protocol: ProtocolTCP, Start: 24, Checksum: 40, Payload: 52}},
		"UDP": {udp, Transport{Protocol: ProtocolUDP, Start: 20, Checksum: 26, Payload: 28}},
	} {
		p, err := Parse(append(test.b, 1, 2, 3)) // padding
		if err != nil {
			t.Fatal(err)
		}
		got, ok := ParseTransport(p)
		if !ok || got != test.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, ok, test.want)
		}
		if payload := string(p.Bytes()[got.Payload:]); payload != "ipip" {
			t.Errorf("%s: payload %q", name, payload)
		}
		segment := p.Bytes()[got.Start:]
		if Sum(segment, PseudoHeaderSum(p.Source(), p.Destination(), got.Protocol, len(segment))) != 0xffff {
			t.Errorf("%s: the golden packet's checksum is wrong", name)
		}
	}
	segment := tcp[24:]
	word := binary.BigEndian.Uint16
	if binary.BigEndian.Uint32(segment[OffTCPSeq:]) != 0x01020304 || binary.BigEndian.Uint32(segment[OffTCPAck:]) != 0x05060708 ||
		segment[OffTCPDataOffset]>>4 != 7 || segment[OffTCPFlags] != TCPFlagACK|TCPFlagPSH || word(segment[OffTCPWindow:]) != 0x2000 ||
		word(segment[OffTCPChecksum:]) != word(tcp[40:]) || word(segment[OffTCPUrgent:]) != 0 || word(udp[20+OffUDPLength:]) != 12 {
		t.Error("an offset is wrong")
	}
}

// Whole headers without options are required, and nothing else.
func TestParseTransport_truncated(t *testing.T) {
	for name, test := range map[string]struct {
		golden string
		least  int
	}{"TCP": {goldenTCP, 44}, "UDP": {goldenUDP, 28}} {
		whole := golden(t, test.golden)
		want, _ := ParseTransport(Packet{whole})
		for n := int(whole[0]&15) * 4; n <= len(whole); n++ {
			binary.BigEndian.PutUint16(whole[OffTotalLen:], uint16(n))
			p, err := Parse(whole)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := ParseTransport(p)
			if ok != (n >= test.least) || ok && got != want || !ok && got != (Transport{}) {
				t.Errorf("%d bytes of %s: %+v, %v", n, name, got, ok)
			}
		}
	}
}

// Users differ in what they accept, so they check it themselves.
func TestParseTransport_unchecked(t *testing.T) {
	for name, test := range map[string]struct {
		golden  string
		at      int
		value   byte
		payload int
	}{
		"TCP data offset 0":         {goldenTCP, 36, 0, 24},
		"TCP data offset 15":        {goldenTCP, 36, 0xf0, 84},
		"UDP length 65292":          {goldenUDP, 24, 0xff, 28},
		"the first fragment of UDP": {goldenUDP, 6, 0x20, 28},
		"a later fragment of UDP":   {goldenUDP, 7, 1, 28},
	} {
		b := golden(t, test.golden)
		b[test.at] = test.value
		if got, ok := ParseTransport(Packet{b}); !ok || got.Payload != test.payload {
			t.Errorf("%s: %+v, %v, want payload at %d", name, got, ok, test.payload)
		}
	}
	b := golden(t, goldenUDP)
	for protocol := range 256 {
		b[OffProtocol] = byte(protocol)
		_, ok := ParseTransport(Packet{b})
		if want := protocol == ProtocolUDP; ok != want { // 12 bytes are too few for TCP
			t.Errorf("protocol %d: %v", protocol, ok)
		}
	}
}

// FuzzParseTransport compares it with segmentHeaders and DeriveOffload as they were when each
// parsed by itself.
func FuzzParseTransport(f *testing.F) {
	f.Add(golden(f, goldenTCP))
	f.Add(golden(f, goldenUDP))
	f.Add(golden(f, goldenFragment))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		headers, field := 0, 0
		switch transport := p.Payload(); {
		case p.Protocol() == ProtocolTCP && len(transport) >= 20:
			headers, field = p.HeaderLen()+int(transport[12]>>4)*4, p.HeaderLen()+16
		case p.Protocol() == ProtocolUDP && len(transport) >= 8:
			headers, field = p.HeaderLen()+8, p.HeaderLen()+6
		}
		got, ok := ParseTransport(p)
		if ok != (headers != 0) || got.Payload != headers || got.Checksum != field || ok && (got.Start != p.HeaderLen() || got.Protocol != p.Protocol()) {
			t.Fatalf("%+v, %v of % x", got, ok, b)
		}
		if ok && got.Checksum+2 > p.TotalLen() {
			t.Fatalf("the checksum field of %+v is not in % x", got, b)
		}
	})
}
