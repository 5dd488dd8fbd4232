package conformance

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

func addr(s string) [4]byte { return netip.MustParseAddr(s).As4() }

// build returns an IPv4 packet with header h and the right total length. A TTL of 0 stands
// for 64: use withByte for a real 0.
func build(h ipv4.Header, payload []byte) []byte { return buildOptions(h, nil, payload) }

func buildOptions(h ipv4.Header, options, payload []byte) []byte {
	if h.TTL == 0 {
		h.TTL = 64
	}
	h.TotalLen = ipv4.HeaderLen + len(options) + len(payload)
	b := make([]byte, h.TotalLen)
	h.PutOptions(b, options)
	copy(b[ipv4.HeaderLen+len(options):], payload)
	return b
}

// udp returns a UDP datagram with its checksum, the payload of a packet with header h.
func udp(h ipv4.Header, source, destination uint16, payload []byte) []byte {
	b := make([]byte, 8+len(payload))
	binary.BigEndian.PutUint16(b[0:], source)
	binary.BigEndian.PutUint16(b[2:], destination)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	copy(b[8:], payload)
	sum := ipv4.Checksum(b, ipv4.PseudoHeaderSum(h.Source, h.Destination, ipv4.ProtocolUDP, len(b)))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[6:], sum)
	return b
}

// aToB and bToA return headers of inner UDP packets with that ID.
func aToB(id uint16) ipv4.Header {
	return ipv4.Header{ID: id, TTL: 64, Protocol: ipv4.ProtocolUDP, Source: addr(innerA), Destination: addr(innerB)}
}

func bToA(id uint16) ipv4.Header {
	h := aToB(id)
	h.Source, h.Destination = h.Destination, h.Source
	return h
}

// experimental is a protocol number for experiments (RFC 3692), which GRO does not merge.
const experimental = 253

// datagram returns an inner packet with header h and n bytes of UDP payload, for port 9
// (discard).
func datagram(h ipv4.Header, n int) []byte { return build(h, udp(h, 9, 9, pattern(n))) }

// pattern returns n bytes in which no two neighbouring blocks are equal.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// outerBToA encapsulates inner in an outer packet from b to a.
func outerBToA(inner []byte) []byte {
	return build(ipv4.Header{ID: 0x4004, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr(outerA)}, inner)
}

// updateChecksum recomputes the header checksum of b in place.
func updateChecksum(b []byte) []byte {
	n := int(b[0]&0xf) * 4
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ipv4.Checksum(b[:n], 0))
	return b
}

// withByte returns a copy of a packet with one byte changed and the header checksum
// recomputed.
func withByte(b []byte, offset int, value byte) []byte {
	b = slices.Clone(b)
	b[offset] = value
	return updateChecksum(b)
}

// fragment splits a packet without options into fragments with size bytes of payload, a
// multiple of 8.
func fragment(b []byte, size int) (pieces [][]byte) {
	p, err := ipv4.Parse(b)
	if err != nil || size%8 != 0 {
		panic("cannot be fragmented so")
	}
	h, payload := p.Header(), p.Payload()
	for at := 0; at < len(payload); at += size {
		end := min(at+size, len(payload))
		h.FragmentOffset, h.MF = at, end < len(payload)
		pieces = append(pieces, build(h, payload[at:end]))
	}
	return pieces
}

// injector sends packets out of an interface, unchanged (AF_PACKET).
type injector struct {
	t    *testing.T
	file *os.File
	to   unix.SockaddrLinklayer
}

// newInjector returns an injector for an interface of ns. For a veth, to is the interface of
// peer at the other end, whose MAC address is the destination; for a TUN, peer is nil.
func newInjector(t *testing.T, ns *netlab.NS, ifname string, peer *netlab.NS, to string) *injector {
	t.Helper()
	in := &injector{t: t, to: unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte{0x08, 0x00})}}
	if peer != nil {
		peer.Do(func() {
			ifi, err := net.InterfaceByName(to)
			if err != nil {
				t.Fatal(err)
			}
			in.to.Halen = uint8(copy(in.to.Addr[:], ifi.HardwareAddr))
		})
	}
	var err error
	ns.Do(func() {
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName(ifname); err != nil {
			return
		}
		in.to.Ifindex = ifi.Index
		var fd int
		// Protocol 0: send only.
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			in.file = os.NewFile(uintptr(fd), "inject into "+ifname)
		}
	})
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs root (CAP_NET_RAW) to send packets made by hand")
	}
	if err != nil {
		t.Fatalf("inject into %s: %v", ifname, err)
	}
	t.Cleanup(func() { in.file.Close() })
	return in
}

func (in *injector) send(packets ...[]byte) {
	in.t.Helper()
	for _, b := range packets {
		if err := unix.Sendto(int(in.file.Fd()), b, 0, &in.to); err != nil {
			in.t.Fatalf("inject %s: %v", netlab.Describe(b), err)
		}
	}
}

// sinkIPIP opens a raw socket for protocol 4 in ns that is never read, so that its kernel
// does not send protocol unreachable.
func sinkIPIP(t *testing.T, ns *netlab.NS) {
	t.Helper()
	sink(t, ns, ipv4.ProtocolIPIP)
}

// sink is sinkIPIP for another protocol.
func sink(t *testing.T, ns *netlab.NS, protocol int) {
	t.Helper()
	var fd int
	var err error
	ns.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol) })
	if err != nil {
		t.Fatalf("open a protocol-%d socket: %v", protocol, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}
