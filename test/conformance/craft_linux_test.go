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

// build is an IPv4 packet with that header, whose length it fills in. A TTL or an
// address that is wanted to be 0 has to be put there afterwards.
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

// udp is a UDP datagram with its checksum, to be the payload of a packet with
// header h.
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

// aToB and bToA are the headers of inner packets with protocol UDP and that ID.
func aToB(id uint16) ipv4.Header {
	return ipv4.Header{ID: id, TTL: 64, Protocol: ipv4.ProtocolUDP, Source: addr(innerA), Destination: addr(innerB)}
}

func bToA(id uint16) ipv4.Header {
	h := aToB(id)
	h.Source, h.Destination = h.Destination, h.Source
	return h
}

// experimental is a protocol of which no packets are merged on their way through
// a stack (RFC 3692).
const experimental = 253

// datagram is an inner packet with header h and n bytes of UDP payload, for a
// port that nobody listens to.
func datagram(h ipv4.Header, n int) []byte { return build(h, udp(h, 9, 9, pattern(n))) }

// pattern is n bytes of which no two neighbouring blocks are alike.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// outerBToA is an outer packet from b to a around inner.
func outerBToA(inner []byte) []byte {
	return build(ipv4.Header{ID: 0x4004, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr(outerA)}, inner)
}

// updateChecksum makes the header checksum of a packet right that was changed by hand.
func updateChecksum(b []byte) []byte {
	n := int(b[0]&0xf) * 4
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ipv4.Checksum(b[:n], 0))
	return b
}

// withByte is a copy of a packet with one byte of its header set, and the checksum
// right again.
func withByte(b []byte, offset int, value byte) []byte {
	b = slices.Clone(b)
	b[offset] = value
	return updateChecksum(b)
}

// fragment cuts a packet without options into pieces that carry size bytes of its
// payload, a multiple of 8.
func fragment(b []byte, size int) (pieces [][]byte) {
	p, err := ipv4.Parse(b)
	if err != nil || size%8 != 0 {
		panic("not a packet that can be cut so")
	}
	h, payload := p.Header(), p.Payload()
	for at := 0; at < len(payload); at += size {
		end := min(at+size, len(payload))
		h.FragmentOffset, h.MF = at, end < len(payload)
		pieces = append(pieces, build(h, payload[at:end]))
	}
	return pieces
}

// injector puts packets on an interface, as they are.
type injector struct {
	t    *testing.T
	file *os.File
	to   unix.SockaddrLinklayer
}

// newInjector opens an interface of ns for packets; peer is the namespace at the other
// end of a veth, whose interface to takes them, or nil for a TUN.
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
		// Protocol 0: it does not receive.
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

// sinkIPIP has ns take protocol 4 and do nothing with it, so that its kernel does
// not answer that nobody is there.
func sinkIPIP(t *testing.T, ns *netlab.NS) {
	t.Helper()
	var fd int
	var err error
	ns.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_IPIP) })
	if err != nil {
		t.Fatalf("open a protocol-4 socket: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}
