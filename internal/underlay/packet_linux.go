package underlay

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

const etherHeaderLen = 14

// openPacket opens a packet socket of protocol 0, which receives nothing before
// bindPacketSockets.
func (s *socket) openPacket() (int, error) {
	return newSocket(unix.AF_PACKET, 0,
		dropAll, // until it has joined the group: it would receive the other sockets' flows
		rcvbuf(s.options.ReceiveBuffer),
		sockopt(unix.SOL_PACKET, unix.PACKET_VNET_HDR, "PACKET_VNET_HDR", 1))
}

// bindPacketSockets binds the packet sockets, for good, and puts them into one fanout group, whose
// members cannot be unbound. They are bound to ETH_P_IP, not to ETH_P_ALL, and so sit beside
// ip_rcv, above bridges, bonds and VLANs: each packet is received once, and outgoing packets are
// not received.
func (s *socket) bindPacketSockets() error {
	// PACKET_FANOUT_HASH keeps an inner flow in one socket. FANOUT_FLAG_DEFRAG reassembles outer
	// fragments first, which is why even a single socket needs a group.
	const hashAndDefrag = (unix.PACKET_FANOUT_HASH | unix.PACKET_FANOUT_FLAG_DEFRAG) << 16
	for ; s.packetsBound < len(s.packetSockets); s.packetsBound++ {
		fd := s.packetSockets[s.packetsBound]
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(ipv4.EtherType)}); err != nil {
			return os.NewSyscallError("bind", err)
		}
		value := s.fanoutGroup | hashAndDefrag
		if s.packetsBound == 0 {
			value |= unix.PACKET_FANOUT_FLAG_UNIQUEID << 16 // the kernel chooses the group ID
		}
		if err := sockopt(unix.SOL_PACKET, unix.PACKET_FANOUT, "PACKET_FANOUT", value)(fd); err != nil {
			return err
		}
		if s.packetsBound == 0 {
			value, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
			if err != nil {
				return os.NewSyscallError("getsockopt PACKET_FANOUT", err)
			}
			s.fanoutGroup = value & 0xffff
		}
	}
	return nil
}

// htons converts v from host to network byte order.
func htons(v uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(v >> 8), byte(v)})
}

// packetReceiver receives frames from a packet socket, each after a struct virtio_net_hdr with
// the kernel's offload metadata.
type packetReceiver struct {
	socket   *socket
	messages *fdguard.Receiver
	onError  func(unix.Errno) // method value made once: making one allocates
	msgs     []fdguard.Message
	frames   []frameBuffers
}

// frameBuffers is where recvmmsg puts a frame: vnetHdr, and the rest in the packet.Buffer.
type frameBuffers struct {
	iovs    [2]unix.Iovec // vnetHdr, and the frame in the Buffer
	from    unix.RawSockaddrLinklayer
	vnetHdr [vnet.HeaderLen]byte
}

func (r *packetReceiver) Watch(opened func(fd int) error) error { return r.messages.Watch(opened) }

func (r *packetReceiver) Read(batch []*packet.Buffer) (n int, err error) {
	defer r.socket.guard.Release()
	if !r.socket.guard.Acquire() {
		return 0, os.ErrClosed
	}
	r.grow(len(batch))
	for i, b := range batch {
		// The Ethernet header goes into the headroom, so that the IPv4 header starts at Headroom
		// as in any other packet.Buffer.
		size := len(b.Space()) + etherHeaderLen
		frame := &r.frames[i].iovs[1]
		frame.Base = unsafe.SliceData(b.Push(etherHeaderLen))
		frame.SetLen(size)
	}
	n, err = r.messages.Receive(r.msgs[:len(batch)], r.onError)
	for i := range n {
		r.parseFrame(batch[i], &r.frames[i], int(r.msgs[i].N))
	}
	return n, err
}

// parseFrame sets b to the IPv4 packet of a received frame of n bytes, virtio_net_hdr included.
// A truncated frame (MSG_TRUNC) needs no check here: ParseOuter drops a packet shorter than its
// total length.
func (r *packetReceiver) parseFrame(b *packet.Buffer, p *frameBuffers, n int) {
	b.SetLen(max(n-vnet.HeaderLen, 0))
	header := 0
	if p.from.Hatype == unix.ARPHRD_ETHER || p.from.Hatype == unix.ARPHRD_LOOPBACK {
		header = min(etherHeaderLen, b.Len())
	}
	b.Pull(header)
	setOffload(b, &p.vnetHdr, header)
}

func (r *packetReceiver) grow(n int) {
	if n <= len(r.msgs) {
		return
	}
	r.msgs, r.frames = make([]fdguard.Message, n), make([]frameBuffers, n)
	for i := range r.msgs {
		h, p := &r.msgs[i].Msghdr, &r.frames[i]
		p.iovs[0].Base = &p.vnetHdr[0]
		p.iovs[0].SetLen(len(p.vnetHdr))
		h.Iov = &p.iovs[0]
		h.SetIovlen(len(p.iovs))
		// The kernel lowers Namelen to what it wrote, for good. The fields read here precede the
		// hardware address, so they are always written.
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&p.from)), unix.SizeofSockaddrLinklayer
	}
}

// setOffload sets the Offload of an outer packet from its virtio_net_hdr, whose offsets count
// from the link-layer header, linkHeader bytes long. The kernel describes the innermost headers
// that it parsed. If they are not directly inside the inner IPv4 header (a tunnel in the
// tunnel), setOffload completes the checksum itself; it cannot do so for a superpacket and
// empties b, for ParseOuter to drop.
func setOffload(b *packet.Buffer, vnetHdr *[vnet.HeaderLen]byte, linkHeader int) {
	h := vnet.Decode(vnetHdr)
	segments := h.GSOType &^ vnet.GSOECN
	partial := h.Flags&vnet.NeedsChecksum != 0
	if !partial && segments == vnet.GSONone {
		return
	}
	start := int(h.CsumStart) - linkHeader
	protocol := innerTransport(b.Bytes(), start)
	switch {
	case partial && segments == vnet.GSOTCPv4 && protocol == ipv4.ProtocolTCP,
		partial && segments == vnet.GSOUDP && protocol == ipv4.ProtocolUDP:
		b.Checksum, b.SegmentSize = packet.ChecksumPartial, h.GSOSize
	case segments != vnet.GSONone:
		b.SetLen(0)
	case protocol == ipv4.ProtocolTCP && h.CsumOffset == ipv4.OffTCPChecksum,
		protocol == ipv4.ProtocolUDP && h.CsumOffset == ipv4.OffUDPChecksum:
		b.Checksum = packet.ChecksumPartial
	default:
		ipv4.CompleteChecksum(b.Bytes(), start, int(h.CsumOffset)) // it does nothing if the field is outside
	}
}

// innerTransport returns the inner packet's protocol if its transport header is at offset start
// of the outer packet, else 0.
func innerTransport(outer []byte, start int) (protocol byte) {
	if len(outer) < 2*ipv4.HeaderLen || outer[ipv4.OffProtocol] != ipv4.ProtocolIPIP {
		return 0
	}
	inner := int(outer[0]&0xf) * 4
	if inner+ipv4.HeaderLen > len(outer) || outer[inner]>>4 != 4 || start != inner+int(outer[inner]&0xf)*4 {
		return 0
	}
	return outer[inner+ipv4.OffProtocol]
}
