package underlay

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

const (
	etherHeaderLength = 14
	virtioHeaderLen   = 10 // struct virtio_net_hdr without num_buffers
)

// openPackets opens a socket of the link layer for each Receiver, in one fanout
// group. They are bound to the protocol, not to ETH_P_ALL: that puts them beside
// the kernel's own ip_rcv, behind bridges, bonds and VLANs, so that each packet
// comes once and outgoing ones do not.
func (s *socket) openPackets() (err error) {
	// PACKET_FANOUT_HASH keeps a flow, the inner one, in one socket, and DEFRAG
	// reassembles outer fragments first. That makes a group of one worthwhile.
	const hashAndDefrag = (unix.PACKET_FANOUT_HASH | unix.PACKET_FANOUT_FLAG_DEFRAG) << 16
	group := 0
	var packets []int
	defer func() {
		if err != nil {
			for _, fd := range packets {
				_ = unix.Close(fd)
			}
		}
	}()
	for range s.packetReceivers {
		fd, err := newSocket(unix.AF_PACKET, unix.SOCK_RAW, 0,
			dropAll, // until the fanout is set up: the sockets of a group see nothing of each other's packets
			receives(s.options.ReceiveBuffer),
			option(unix.SOL_PACKET, unix.PACKET_VNET_HDR, "PACKET_VNET_HDR", 1),
			func(fd int) error {
				return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(ipv4.EtherType)}))
			})
		if err != nil {
			return err
		}
		packets = append(packets, fd)
		value := group | hashAndDefrag
		if group == 0 {
			value |= unix.PACKET_FANOUT_FLAG_UNIQUEID << 16 // the kernel finds a number
		}
		if err := option(unix.SOL_PACKET, unix.PACKET_FANOUT, "PACKET_FANOUT", value)(fd); err != nil {
			return err
		}
		if group == 0 {
			if value, err = unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT); err != nil {
				return os.NewSyscallError("getsockopt PACKET_FANOUT", err)
			}
			group = value & 0xffff
		}
	}
	for i, fd := range packets {
		r := s.packetReceivers[i]
		r.poller = s.guard.Poller(fd)
		r.poller.Watch(r.others)
		s.opened(fd)
	}
	s.packets = packets
	close(s.packetsOpened)
	return nil
}

// networkOrder is v, in network byte order, as a number of this machine.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(v >> 8), byte(v)})
}

// packetReceiver receives from the link layer: frames, each behind a
// virtio_net_hdr that has what the kernel knows of checksum and segments. waiter
// is there once opened is closed, unless that was by Close.
type packetReceiver struct {
	watch
	opened chan struct{}
	poller fdguard.Poller
	failed func(unix.Errno) // made once, so that a Read allocates nothing
	msgs   []fdguard.Message
	parts  []frameParts
}

// frameParts is where a received frame goes.
type frameParts struct {
	iovs   [2]unix.Iovec // virtio, and the frame in the Buffer
	from   unix.RawSockaddrLinklayer
	virtio [virtioHeaderLen]byte
}

// Await implements LateReceiver.
func (r *packetReceiver) Await() (open bool) {
	<-r.opened
	return !r.socket.guard.Closed()
}

func (r *packetReceiver) Read(batch []*packet.Buffer) (n int, err error) {
	<-r.opened
	defer r.socket.guard.Release()
	if !r.socket.guard.Acquire() {
		return 0, os.ErrClosed
	}
	r.grow(len(batch))
	for i, b := range batch {
		// The Ethernet header goes into the headroom, so that the IPv4 header is
		// where every other door puts it.
		size := len(b.Space()) + etherHeaderLength
		frame := &r.parts[i].iovs[1]
		frame.Base = unsafe.SliceData(b.Push(etherHeaderLength))
		frame.SetLen(size)
	}
	n, err = r.poller.Receive(r.msgs[:len(batch)], r.failed)
	for i := range n {
		r.finish(batch[i], &r.parts[i], int(r.msgs[i].N))
	}
	return n, err
}

// finish makes of a received frame, n bytes with its virtio_net_hdr, the packet
// that is in it. A packet of which the Buffer holds the first bytes only
// (MSG_TRUNC) has a header that says more: ParseOuter refuses it.
func (r *packetReceiver) finish(b *packet.Buffer, p *frameParts, n int) {
	b.SetLen(max(n-virtioHeaderLen, 0))
	header := 0
	if p.from.Hatype == unix.ARPHRD_ETHER || p.from.Hatype == unix.ARPHRD_LOOPBACK {
		header = min(etherHeaderLength, b.Len())
	}
	b.Pull(header)
	setOffload(b, &p.virtio, header)
}

func (r *packetReceiver) grow(n int) {
	if n <= len(r.msgs) {
		return
	}
	r.msgs, r.parts = make([]fdguard.Message, n), make([]frameParts, n)
	for i := range r.msgs {
		h, p := &r.msgs[i].Msghdr, &r.parts[i]
		p.iovs[0].Base = &p.virtio[0]
		p.iovs[0].SetLen(len(p.virtio))
		h.Iov = &p.iovs[0]
		h.SetIovlen(len(p.iovs))
		// The kernel shortens the length to that of the address it gives, for
		// good; what is read of it is in front of the hardware address.
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&p.from)), unix.SizeofSockaddrLinklayer
	}
}

// setOffload sets the Offload of an outer packet from its virtio_net_hdr, whose
// offsets count from the link layer header of that many bytes. What the kernel
// says is about the innermost headers that it knows of. If those are not the ones
// right behind the inner IPv4 header, as in a tunnel within the tunnel, the
// checksum is finished here; a superpacket of that kind cannot be, and is
// emptied, for ParseOuter to refuse.
func setOffload(b *packet.Buffer, virtio *[virtioHeaderLen]byte, linkHeader int) {
	var (
		flags       = virtio[0]
		segments    = virtio[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN
		segmentSize = binary.NativeEndian.Uint16(virtio[4:])
		start       = int(binary.NativeEndian.Uint16(virtio[6:])) - linkHeader
		field       = int(binary.NativeEndian.Uint16(virtio[8:]))
	)
	partial := flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
	if !partial && segments == unix.VIRTIO_NET_HDR_GSO_NONE {
		return
	}
	p := b.Bytes()
	protocol := innerTransport(p, start)
	switch {
	case partial && segments == unix.VIRTIO_NET_HDR_GSO_TCPV4 && protocol == ipv4.ProtocolTCP,
		partial && segments == unix.VIRTIO_NET_HDR_GSO_UDP_L4 && protocol == ipv4.ProtocolUDP:
		b.Checksum, b.SegmentSize = packet.ChecksumPartial, segmentSize
	case segments != unix.VIRTIO_NET_HDR_GSO_NONE:
		b.SetLen(0)
	case protocol == ipv4.ProtocolTCP && field == 16, protocol == ipv4.ProtocolUDP && field == 6:
		b.Checksum = packet.ChecksumPartial
	case start >= 0 && start+field+2 <= len(p):
		// The field holds the sum of the pseudo-header, and is part of what is
		// summed. 0 would mean "no checksum" in UDP, and is the same as 0xffff.
		sum := ipv4.Checksum(p[start:], 0)
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(p[start+field:], sum)
	}
}

// innerTransport is the protocol that starts at offset start of an outer packet,
// if that is where the inner packet's transport header is, and 0 if not.
func innerTransport(outer []byte, start int) (protocol byte) {
	if len(outer) < 2*ipv4.HeaderLen || outer[9] != ipv4.ProtocolIPIP {
		return 0
	}
	inner := int(outer[0]&0xf) * 4
	if inner+ipv4.HeaderLen > len(outer) || outer[inner]>>4 != 4 || start != inner+int(outer[inner]&0xf)*4 {
		return 0
	}
	return outer[inner+9]
}
