package encap_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// segment returns a TCP or UDP packet with n bytes of payload. Its checksum is complete, or
// partial: the pseudo-header sum (CHECKSUM_PARTIAL).
func segment(protocol uint8, n int, partial bool) []byte {
	return segmentOf(protocol, pattern(n), partial)
}

// segmentOf is segment with the given payload.
func segmentOf(protocol uint8, payload []byte, partial bool) []byte {
	var transport []byte
	var at int
	switch protocol {
	case ipv4.ProtocolTCP:
		transport, at = append(make([]byte, 32), payload...), 16
		transport[12] = 32 / 4 << 4 // data offset: with a timestamp option
		transport[13] = 0x10        // ACK
	case ipv4.ProtocolUDP:
		transport, at = append(make([]byte, 8), payload...), 6
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
	}
	copy(transport, []byte{0x10, 0xe1, 0x00, 0x35}) // ports
	pseudo := ipv4.PseudoHeaderSum(innerA, innerB, protocol, len(transport))
	sum := ipv4.Checksum(transport, pseudo)
	if partial {
		sum = ipv4.Fold(pseudo)
	}
	binary.BigEndian.PutUint16(transport[at:], sum)
	h := inner()
	h.Protocol = protocol
	return build(h, transport)
}

// deriveOffload is DeriveOffload with the view of the packet in b.
func deriveOffload(t *testing.T, b *packet.Buffer, mtu int) drop.Reason {
	t.Helper()
	return encap.DeriveOffload(b, parse(t, b.Bytes()), mtu)
}

func TestDeriveOffload(t *testing.T) {
	const mtu = 1480
	for _, test := range []struct {
		name string
		p    []byte
		want packet.Offload
		drop drop.Reason
	}{
		{"TCP", segment(ipv4.ProtocolTCP, 100, false), packet.Offload{}, drop.None},
		{"UDP", segment(ipv4.ProtocolUDP, 100, false), packet.Offload{}, drop.None},
		{"partial TCP", segment(ipv4.ProtocolTCP, 100, true), packet.Offload{Checksum: packet.ChecksumPartial}, drop.None},
		{"partial UDP", segment(ipv4.ProtocolUDP, 100, true), packet.Offload{Checksum: packet.ChecksumPartial}, drop.None},
		{"partial TCP of odd length", segment(ipv4.ProtocolTCP, 101, true), packet.Offload{Checksum: packet.ChecksumPartial}, drop.None},
		{"partial TCP of the MTU", segment(ipv4.ProtocolTCP, mtu-52, true), packet.Offload{Checksum: packet.ChecksumPartial}, drop.None},
		{"TCP superpacket", segment(ipv4.ProtocolTCP, mtu-51, true), packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: mtu - 52}, drop.None},
		{"large TCP superpacket", segment(ipv4.ProtocolTCP, 65000, true), packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: mtu - 52}, drop.None},
		{"UDP superpacket", segment(ipv4.ProtocolUDP, mtu, true), packet.Offload{}, drop.SuperpacketSizeUnknown},
		{"long TCP with its checksum", segment(ipv4.ProtocolTCP, 8000, false), packet.Offload{}, drop.None},
		{"long UDP with its checksum", segment(ipv4.ProtocolUDP, 8000, false), packet.Offload{}, drop.None},
		{"GRE", build(inner(), pattern(8000)), packet.Offload{}, drop.None},
	} {
		b := bufferOf(test.p)
		if d := deriveOffload(t, b, mtu); d != test.drop || b.Offload != test.want {
			t.Errorf("%s: %+v, drop %v, want %+v, %v", test.name, b.Offload, d, test.want, test.drop)
		}
		wantBytes(t, test.name, b.Bytes(), test.p)
	}
}

// Fragments and truncated or malformed segments have no partial checksum.
func TestDeriveOffload_notApplicable(t *testing.T) {
	partial := segment(ipv4.ProtocolTCP, 100, true)
	fragment := func(mf bool, offset int) []byte {
		h := parse(t, partial).Header()
		h.MF, h.FragmentOffset = mf, offset
		return build(h, partial[20:])
	}
	udpLength := func(n uint16) []byte {
		b := segment(ipv4.ProtocolUDP, 100, true)
		binary.BigEndian.PutUint16(b[24:], n)
		return b
	}
	h := parse(t, partial).Header()
	u := parse(t, segment(ipv4.ProtocolUDP, 0, true)).Header()
	for name, p := range map[string][]byte{
		"a first fragment":              fragment(true, 0),
		"a later fragment":              fragment(false, 80),
		"19 bytes of TCP":               build(h, partial[20:39]),
		"7 bytes of UDP":                build(u, pattern(7)),
		"UDP length 7":                  udpLength(7),
		"UDP length beyond the end":     udpLength(109),
		"UDP without a checksum (zero)": append(segment(ipv4.ProtocolUDP, 100, false)[:26], make([]byte, 102)...),
	} {
		b := bufferOf(p)
		if d := deriveOffload(t, b, 1480); d != drop.None || b.Offload != (packet.Offload{}) {
			t.Errorf("%s: %+v, drop %v", name, b.Offload, d)
		}
	}
}

func TestDeriveOffload_alreadyKnown(t *testing.T) {
	b := bufferOf(segment(ipv4.ProtocolTCP, 8000, true))
	b.Offload = packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: 1000}
	if d := deriveOffload(t, b, 1480); d != drop.None || b.SegmentSize != 1000 {
		t.Errorf("%+v, drop %v", b.Offload, d)
	}
}

func TestDeriveOffload_ambiguousChecksum(t *testing.T) {
	// Two bytes of the payload make the complete checksum equal to the pseudo-header sum.
	p := segment(ipv4.ProtocolTCP, 100, true)
	b := parse(t, p)
	tcp := b.Payload()
	pseudo := ipv4.PseudoHeaderSum(innerA, innerB, ipv4.ProtocolTCP, len(tcp))
	binary.BigEndian.PutUint16(tcp[40:], 0)
	binary.BigEndian.PutUint16(tcp[40:], ipv4.Checksum(tcp, pseudo))
	buffer := bufferOf(p)
	if d := deriveOffload(t, buffer, 1480); d != drop.None || buffer.Offload != (packet.Offload{Checksum: packet.ChecksumValid}) {
		t.Errorf("%+v, drop %v", buffer.Offload, d)
	}
}

// A superpacket whose headers leave no room for a segment is dropped.
func TestDeriveOffload_segmentSizeUnknown(t *testing.T) {
	badOffset := segment(ipv4.ProtocolTCP, 1000, true)
	badOffset[32] = 0x40 // data offset 16
	beyond := segment(ipv4.ProtocolTCP, 1000, true)
	for name, test := range map[string]struct {
		p   []byte
		mtu int
	}{
		"no payload within the MTU":      {beyond, 52},
		"data offset below the header's": {badOffset, 576},
	} {
		if d := deriveOffload(t, bufferOf(test.p), test.mtu); d != drop.SuperpacketSizeUnknown {
			t.Errorf("%s: drop %v, want %v", name, d, drop.SuperpacketSizeUnknown)
		}
	}
}

func TestDeriveOffload_udpPadding(t *testing.T) {
	p := segment(ipv4.ProtocolUDP, 100, true)
	h := parse(t, p).Header()
	b := bufferOf(build(h, append(bytes.Clone(p[20:]), 1, 2, 3))) // longer than the UDP length
	if d := deriveOffload(t, b, 1480); d != drop.None || b.Checksum != packet.ChecksumPartial {
		t.Errorf("%+v, drop %v", b.Offload, d)
	}
}
