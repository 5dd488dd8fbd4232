package underlay

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
	"ipipd/test/netlab"
)

// tcpInIPIP returns an outer packet along path with a TCP segment of n payload bytes from port,
// at sequence number seq, whose checksum is complete or partial.
func tcpInIPIP(path *Path, port uint16, seq uint32, n int, partial bool) *packet.Buffer {
	b := outerPacket(path, 60+n, 1)
	inner := b.Bytes()[20:]
	source, destination := [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 2}
	h := ipv4.Header{TotalLen: len(inner), DF: true, TTL: 64, Protocol: ipv4.ProtocolTCP, Source: source, Destination: destination}
	h.Put(inner)
	tcp := inner[20:]
	clear(tcp[:20])
	binary.BigEndian.PutUint16(tcp, port)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], 1)
	tcp[12], tcp[13] = 5<<4, 0x10 // ACK
	binary.BigEndian.PutUint16(tcp[14:], 1000)
	pseudo := ipv4.PseudoHeaderSum(source, destination, ipv4.ProtocolTCP, len(tcp))
	if partial {
		binary.BigEndian.PutUint16(tcp[16:], ipv4.Fold(pseudo))
	} else {
		binary.BigEndian.PutUint16(tcp[16:], ipv4.Checksum(tcp, pseudo))
	}
	return b
}

// kernelSender sends packets as a kernel on the same machine does: with a virtio_net_hdr that
// marks a partial checksum.
type kernelSender struct {
	t    testing.TB
	fd   int
	link *Link
}

func newKernelSender(t testing.TB, from *netlab.NS, link *Link) *kernelSender {
	k := &kernelSender{t: t, link: link}
	var err error
	from.Do(func() {
		k.fd, err = newSocket(unix.AF_PACKET, 0, sockopt(unix.SOL_PACKET, unix.PACKET_VNET_HDR, "PACKET_VNET_HDR", 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(k.fd) })
	return k
}

func (k *kernelSender) send(b *packet.Buffer, flags uint8, start, field int) {
	k.t.Helper()
	frame := []byte{flags, unix.VIRTIO_NET_HDR_GSO_NONE}
	for _, v := range []int{54, 0, start, field} {
		frame = binary.NativeEndian.AppendUint16(frame, uint16(v))
	}
	frame = append(append(frame, k.link.Header[:]...), b.Bytes()...)
	to := &unix.SockaddrLinklayer{Protocol: htons(ipv4.EtherType), Ifindex: k.link.Device, Halen: 6}
	if err := unix.Sendto(k.fd, frame, 0, to); err != nil {
		k.t.Fatal(os.NewSyscallError("sendto", err))
	}
}

// Outer fragments are reassembled, with one socket and with several.
func TestPacketReceiver_reassembledFragments(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	for _, n := range []int{1, 3} {
		s := open(t, b, SocketOptions{PacketReceive: true, Receivers: n})
		if got := len(s.Receivers()[1:]); got != n {
			t.Fatalf("%d receivers, want %d", got, n)
		}
		// The same addresses and no ports: one flow, which stays in one Receiver.
		sizes := []int{20, 1500, 1501, 3000, 65535}
		for _, size := range sizes {
			mustWrite(t, sender, pathA, outerPacket(pathA, size, 7))
		}
		for i, got := range read(t, flowReceiver(t, s), len(sizes), packet.MaxSize) {
			outer, reason := encap.ParseOuter(got)
			if reason != drop.None || outer.TotalLen() != sizes[i] {
				t.Fatalf("packet %d: %v, %d bytes of %d", i, reason, got.Len(), sizes[i])
			}
			if string(outer.Payload()) != string(outerPacket(pathA, sizes[i], 7).Bytes()[20:]) {
				t.Errorf("packet %d: the payload changed", i)
			}
			if got.Offload != (packet.Offload{}) {
				t.Errorf("packet %d: offload is %+v", i, got.Offload)
			}
		}
		s.Close()
	}
}

// flowReceiver returns the Receiver of s whose socket has packets.
func flowReceiver(t *testing.T, s Socket) Receiver {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		for i, fd := range s.(*socket).packetSockets {
			if waits(t, fd, time.Millisecond) {
				return s.Receivers()[1+i]
			}
		}
	}
	t.Fatal("nothing was received")
	return nil
}

// Flows are spread over the Receivers, and each stays in one.
func TestPacketReceiver_flows(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	s := open(t, b, SocketOptions{PacketReceive: true, Receivers: 2})
	const flows, each = 32, 4
	for i := range flows * each {
		mustWrite(t, sender, pathA, tcpInIPIP(pathA, uint16(1000+i%flows), 1, 10, false))
	}
	receiverOf := map[uint16]int{} // by source port
	received, used := 0, map[int]bool{}
	batch := packet.NewBatch(64, 1500)
	for deadline := time.Now().Add(patience); received < flows*each && time.Now().Before(deadline); {
		for i, r := range s.Receivers()[1:] {
			if !waits(t, s.(*socket).packetSockets[i], time.Millisecond) {
				continue
			}
			n, err := r.Read(batch)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range batch[:n] {
				port := binary.BigEndian.Uint16(p.Bytes()[40:])
				if first, ok := receiverOf[port]; ok && first != i {
					t.Errorf("flow of port %d came in receivers %d and %d", port, first, i)
				}
				receiverOf[port] = i
			}
			received += n
			used[i] = true
		}
	}
	if len(receiverOf) != flows || received != flows*each || len(used) != 2 {
		t.Errorf("%d packets of %d flows came in %d receivers, want %d of %d in 2", received, len(receiverOf), len(used), flows*each, flows)
	}
}

// The raw socket stays open, so the kernel does not answer ICMP 3/2.
func TestPacketReceiver_noProtocolUnreachable(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	s := open(t, b, SocketOptions{PacketReceive: true})
	mustWrite(t, sender, pathA, outerPacket(pathA, 100, 1))
	read(t, s.Receivers()[1], 1, 1500)
	if out := b.Run("nstat", "-asz", "IcmpOutDestUnreachs"); !strings.Contains(out, "IcmpOutDestUnreachs             0") {
		t.Errorf("the kernel answered:\n%s", out)
	}
}

func TestPacketReceiver_bridge(t *testing.T) {
	a, b := twoHosts(t)
	b.Run("ip", "address", "flush", "dev", "eth0")
	b.Run("ip", "link", "add", "br0", "type", "bridge")
	b.Run("ip", "link", "set", "eth0", "master", "br0")
	b.Run("ip", "link", "set", "br0", "up")
	b.Run("ip", "address", "add", "192.0.2.2/24", "dev", "br0")
	r := open(t, b, SocketOptions{PacketReceive: true}).Receivers()[1]
	sender := open(t, a, SocketOptions{}).NewSender()
	mustWrite(t, sender, pathA, outerPacket(pathA, 100, 1), outerPacket(pathA, 101, 2))
	if got := read(t, r, 2, 1500); got[0].Len() != 100 || got[1].Len() != 101 {
		t.Errorf("received %d and %d bytes, want 100 and 101", got[0].Len(), got[1].Len())
	}
}

func TestPacketReceiver_noEthernetHeader(t *testing.T) {
	ns := netlab.New(t)
	s := open(t, ns, SocketOptions{PacketReceive: true})
	var tun *os.File
	ns.Do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Skipf("needs /dev/net/tun: %v", err)
		}
		tun = os.NewFile(uintptr(fd), "tun")
		request, err := unix.NewIfreq("wan")
		if err != nil {
			t.Fatal(err)
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			t.Fatal(err)
		}
	})
	defer tun.Close()
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "wan")
	ns.Run("ip", "link", "set", "wan", "up")
	// One packet by the TUN, which has no link-layer header, and one by the loopback.
	sent := outerPacket(pathB, 100, 1).Bytes()
	if _, err := tun.Write(sent); err != nil {
		t.Fatal(err)
	}
	self := &Path{Local: hostA, Remote: hostA, MTU: 65535}
	mustWrite(t, s.NewSender(), self, outerPacket(self, 200, 1))
	got := read(t, s.Receivers()[1], 2, 1500)
	if string(got[0].Bytes()) != string(sent) {
		t.Errorf("by TUN: %x, want %x", got[0].Bytes(), sent)
	}
	if outer, reason := encap.ParseOuter(got[1]); reason != drop.None || outer.TotalLen() != 200 {
		t.Errorf("by loopback: %v", reason)
	}
}

func TestPacketReceiver_partialChecksum(t *testing.T) {
	a, b := twoHosts(t)
	kernel := newKernelSender(t, a, linkTo(t, a, b))
	r := open(t, b, SocketOptions{PacketReceive: true}).Receivers()[1]

	kernel.send(tcpInIPIP(pathA, 1000, 1, 100, true), unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, 14+40, 16)
	kernel.send(tcpInIPIP(pathA, 1000, 1, 100, false), 0, 0, 0)
	want := []packet.Offload{{Checksum: packet.ChecksumPartial}, {}}
	for i, got := range read(t, r, len(want), packet.MaxSize) {
		if got.Offload != want[i] {
			t.Errorf("packet %d: offload is %+v, want %+v", i, got.Offload, want[i])
		}
		if _, reason := encap.ParseOuter(got); reason != drop.None {
			t.Errorf("packet %d: %v", i, reason)
		}
	}
}

func TestPacketReceiver_groSegmentSize(t *testing.T) {
	a, b := twoHosts(t)
	// veth uses GRO only for what comes from an interface without TSO.
	a.Run("ethtool", "-K", "eth0", "tso", "off")
	b.Run("ethtool", "-K", "eth0", "gro", "on")
	// GRO keeps a segment only while its NAPI instance is busy. These make it wait half a second
	// for the next one.
	b.Run("unshare", "--mount", "sh", "-ec", `mount -t sysfs none /sys
		echo 500000000 >/sys/class/net/eth0/gro_flush_timeout
		echo 1 >/sys/class/net/eth0/napi_defer_hard_irqs`)
	path := *pathA
	path.Link = linkTo(t, a, b)
	sender := open(t, a, SocketOptions{}).NewSender()
	r := open(t, b, SocketOptions{PacketReceive: true}).Receivers()[1]
	const segments, size = 8, 1000
	var batch []*packet.Buffer
	for i := range segments {
		batch = append(batch, tcpInIPIP(&path, 1000, uint32(1+i*size), size, false))
	}
	mustWrite(t, sender, &path, batch...)

	received, merged := 0, false
	for received < segments*size {
		got := read(t, r, 1, packet.MaxSize)[0]
		outer, reason := encap.ParseOuter(got)
		if reason != drop.None {
			t.Fatal(reason)
		}
		payload := outer.TotalLen() - 60
		received += payload
		if payload > size {
			merged = true
			if want := (packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: size}); got.Offload != want {
				t.Errorf("%d bytes of payload: offload is %+v, want %+v", payload, got.Offload, want)
			}
		}
	}
	if !merged {
		t.Error("GRO did not merge the segments")
	}
}

func TestSetOffload_nestedTunnel(t *testing.T) {
	// outer { inner { TCP in IPv4 } }: the kernel describes the innermost header.
	nested := func() *packet.Buffer {
		segment := tcpInIPIP(pathA, 1000, 1, 101, true).Bytes()
		b := outerPacket(pathA, 20+len(segment), 1)
		copy(b.Bytes()[20:], segment)
		return b
	}
	vnetHdr := func(gso byte, size uint16) *[vnet.HeaderLen]byte {
		v := [vnet.HeaderLen]byte{unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, gso}
		binary.NativeEndian.PutUint16(v[4:], size)
		binary.NativeEndian.PutUint16(v[6:], 14+60)
		binary.NativeEndian.PutUint16(v[8:], 16)
		return &v
	}
	b := nested()
	setOffload(b, vnetHdr(0, 0), 14)
	want := tcpInIPIP(pathA, 1000, 1, 101, false).Bytes()
	if string(b.Bytes()[20:]) != string(want) || b.Offload != (packet.Offload{}) {
		t.Errorf("offload %+v,\n%x, want\n%x", b.Offload, b.Bytes()[20:], want)
	}
	b = nested()
	setOffload(b, vnetHdr(unix.VIRTIO_NET_HDR_GSO_TCPV4, 50), 14)
	if _, reason := encap.ParseOuter(b); reason == drop.None {
		t.Error("a superpacket that cannot be described got through")
	}
	// An offset beyond the packet is not followed.
	b = outerPacket(pathA, 60, 1)
	setOffload(b, vnetHdr(0, 0), 14)
	if string(b.Bytes()) != string(outerPacket(pathA, 60, 1).Bytes()) {
		t.Error("the packet changed")
	}
}
