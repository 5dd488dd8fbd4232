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

// openHdrincl opens the socket for packets that the kernel sends as they are. One
// opened with IPPROTO_RAW receives neither protocol 4 nor errors about it.
func openHdrincl() (int, error) {
	return newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW, dropAll, receives(0), sends(sendBuffer),
		option(unix.IPPROTO_IP, unix.IP_HDRINCL, "IP_HDRINCL", 1),
		// What fits the path is the tunnel's business, not that of the path MTU
		// which the kernel may have cached for the destination.
		option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_PROBE),
		reportsFullQueue)
}

// takesProtocol reports whether the kernel lets a packet with IP_HDRINCL say of which
// protocol it is. Unless it is told, an IPsec policy for protocol 4 does not apply to
// the packet, whatever its header says. It can be told since Linux 6.4, and the stable
// releases of that time.
func takesProtocol(hdrincl int) bool {
	var c control
	binary.NativeEndian.PutUint32(c.add(unix.IPPROTO_IP, unix.IP_PROTOCOL, 4), unix.IPPROTO_IPIP)
	// The least that passes for a packet, to this host itself, which is not sent:
	// all that counts is whether the control message is refused.
	const msgProbe = 0x10 // MSG_PROBE
	err := unix.Sendmsg(hdrincl, make([]byte, ipv4.HeaderLen), c.buf[:c.n], &unix.SockaddrInet4{}, msgProbe|unix.MSG_DONTWAIT)
	return err != unix.EINVAL
}

// openFragmenting opens the socket for packets that the kernel cuts, which it does not
// with IP_HDRINCL. It has to be one of protocol 4, but is bound to an address
// that no packet is for, so that it gets no copies of what is received, and no
// errors. The source is told with each packet.
func openFragmenting() (int, error) {
	nowhere := unix.SockaddrInet4{Addr: [4]byte{192, 0, 0, 8}} // RFC 7600: the dummy address
	return newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IPIP, dropAll, receives(0), sends(sendBuffer),
		// Any source will do, as it does with IP_HDRINCL.
		option(unix.IPPROTO_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT", 1),
		option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_DONT),
		reportsFullQueue,
		func(fd int) error { return os.NewSyscallError("bind", unix.Bind(fd, &nowhere)) })
}

// reportsFullQueue makes the kernel tell ENOBUFS when the interface's queue is
// full, which it hides from raw sockets that have not asked for errors.
func reportsFullQueue(fd int) error {
	return option(unix.IPPROTO_IP, unix.IP_RECVERR, "IP_RECVERR", 1)(fd)
}

// openLink opens the socket for frames. Its protocol is 0, so it receives nothing.
func openLink() (int, error) {
	return newSocket(unix.AF_PACKET, unix.SOCK_RAW, 0, sends(sendBuffer))
}

// sender is one way out. It shares the sockets and has its own memory for the
// system calls.
type sender struct {
	socket *socket
	path   *Path // what address, frame and route were made from

	address unix.RawSockaddrInet4
	frame   unix.RawSockaddrLinklayer
	route   control
	// protocol is where in route the protocol of a packet is told; nil where it
	// cannot be.
	protocol    []byte
	hdrincl     messages // packets and frames
	fragmenting messages
	cmsgs       []control // TOS and TTL of each message in cut

	failure *os.SyscallError // the last one, kept so that a full queue does not allocate
}

// messages are the arguments of one sendmmsg.
type messages struct {
	hdrs []fdguard.Message
	iovs []unix.Iovec
}

func (m *messages) grow(n int) {
	if n <= len(m.hdrs) {
		return
	}
	m.hdrs, m.iovs = make([]fdguard.Message, n), make([]unix.Iovec, n)
	for i := range m.hdrs {
		m.hdrs[i].Iov = &m.iovs[i]
		m.hdrs[i].SetIovlen(1)
	}
}

// set makes message i the bytes p.
func (m *messages) set(i int, p []byte) {
	m.iovs[i].Base = unsafe.SliceData(p)
	m.iovs[i].SetLen(len(p))
}

func (s *socket) NewSender() Sender { return &sender{socket: s} }

func (s *sender) Write(batch []*packet.Buffer, path *Path) (n int, err error) {
	defer s.socket.guard.Release()
	if !s.socket.guard.Acquire() {
		return 0, os.ErrClosed
	}
	if path != s.path {
		s.follow(path)
	}
	// Runs of packets that go the same way, so that their order stays.
	for len(batch) > 0 {
		large := s.mustFragment(batch[0])
		run := 1
		for run < len(batch) && s.mustFragment(batch[run]) == large {
			run++
		}
		var sent int
		var failed error
		if large {
			sent, failed = s.sendFragmented(batch[:run])
		} else if path.Link != nil {
			sent, failed = s.sendFrames(batch[:run])
		} else {
			sent, failed = s.sendHdrincl(batch[:run])
		}
		n += sent
		if failed != nil {
			err = failed
		}
		batch = batch[run:]
	}
	return n, err
}

// follow prepares what all packets along path have in common.
func (s *sender) follow(path *Path) {
	s.path = path
	s.address = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: path.Remote}
	s.route.reset()
	s.route.addPath(path)
	if s.socket.tellsProtocol {
		s.protocol = s.route.add(unix.IPPROTO_IP, unix.IP_PROTOCOL, 4)
	}
	if path.Link != nil {
		s.frame = unix.RawSockaddrLinklayer{
			Family:  unix.AF_PACKET,
			Ifindex: int32(path.Link.Device),
			Halen:   6,
		}
		copy(s.frame.Addr[:], path.Link.Header[:6])
		// sll_protocol is the EtherType in network byte order, as it is in the header.
		s.frame.Protocol = binary.NativeEndian.Uint16(path.Link.Header[12:])
	}
}

// mustFragment reports whether a packet is one for the kernel to cut.
func (s *sender) mustFragment(b *packet.Buffer) bool {
	return s.path.MTU > 0 && b.Len() > s.path.MTU
}

// sendHdrincl sends packets as they are, by the kernel's routes.
func (s *sender) sendHdrincl(batch []*packet.Buffer) (n int, err error) {
	s.hdrincl.grow(len(batch))
	if p := batch[0].Bytes(); s.protocol != nil && len(p) >= ipv4.HeaderLen {
		binary.NativeEndian.PutUint32(s.protocol, uint32(p[9])) // that of all of them
	}
	for i, b := range batch {
		h := &s.hdrincl.hdrs[i].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.address)), unix.SizeofSockaddrInet4
		s.route.attach(h)
		s.hdrincl.set(i, b.Bytes())
	}
	return s.send(s.socket.hdrincl, s.hdrincl.hdrs[:len(batch)], batch)
}

// sendFrames sends packets behind the Ethernet header of the path, past the
// kernel's routes and netfilter.
func (s *sender) sendFrames(batch []*packet.Buffer) (n int, err error) {
	header := &s.path.Link.Header
	s.hdrincl.grow(len(batch))
	for i, b := range batch {
		h := &s.hdrincl.hdrs[i].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.frame)), unix.SizeofSockaddrLinklayer
		h.Control = nil
		h.SetControllen(0)
		copy(b.Push(len(header)), header[:])
		s.hdrincl.set(i, b.Bytes())
		b.Pull(len(header))
	}
	return s.send(s.socket.link, s.hdrincl.hdrs[:len(batch)], batch)
}

// sendFragmented sends packets that the kernel cuts into fragments of the first hop's
// MTU. It makes the outer header itself, with an ID of its own, from the
// addresses, the TOS and the TTL of the one that the packet has. Its protocol is
// always 4, so that no other packet may go this way, an encrypted one least of all.
func (s *sender) sendFragmented(batch []*packet.Buffer) (n int, err error) {
	s.fragmenting.grow(len(batch))
	if len(s.cmsgs) < len(batch) {
		s.cmsgs = make([]control, len(batch))
	}
	k := 0
	for _, b := range batch {
		p := b.Bytes()
		const df = 0x40
		if len(p) < ipv4.HeaderLen || p[0] != 0x45 || p[6]&df != 0 || p[9] != ipv4.ProtocolIPIP {
			err = s.fail(unix.EMSGSIZE)
			continue
		}
		hop := &s.cmsgs[k]
		hop.reset()
		hop.addPath(s.path)
		binary.NativeEndian.PutUint32(hop.add(unix.IPPROTO_IP, unix.IP_TOS, 4), uint32(p[1]))
		binary.NativeEndian.PutUint32(hop.add(unix.IPPROTO_IP, unix.IP_TTL, 4), uint32(p[8]))
		h := &s.fragmenting.hdrs[k].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.address)), unix.SizeofSockaddrInet4
		hop.attach(h)
		s.fragmenting.set(k, p[ipv4.HeaderLen:])
		k++
	}
	n, failed := s.send(s.socket.fragmenting, s.fragmenting.hdrs[:k], nil)
	if failed != nil {
		err = failed
	}
	return n, err
}

// send sends msgs in order. batch has the packets of msgs, or is nil if there is
// no other way for one that this socket does not take.
func (s *sender) send(fd int, msgs []fdguard.Message, batch []*packet.Buffer) (n int, err error) {
	retried := -1
	for at := 0; at < len(msgs); {
		sent, errno := fdguard.Send(fd, msgs[at:])
		if errno == 0 {
			at += sent
			n += sent
			continue
		}
		switch errno {
		case unix.EINTR:
			continue
		case unix.ENOBUFS, unix.EAGAIN:
			// The interface's queue or the socket's buffer is full.
		case unix.EMSGSIZE:
			// The MTU of the first hop is lower than the path knows of. Protocol 4
			// the kernel cuts; what else there is waits for the path to know.
			if batch != nil {
				fragmenting, failed := s.sendFragmented(batch[at : at+1])
				n += fragmenting
				if failed != nil {
					err = failed
				}
				at++
				continue
			}
		default:
			// The error may be an old one that was waiting at the socket
			// (sk_err): then this packet has not been tried yet.
			if retried != at {
				retried = at
				continue
			}
			if fd == s.socket.link {
				// The interface is down or gone; the routes may know another.
				rest, failed := s.sendHdrincl(batch[at:])
				if failed != nil {
					err = failed
				}
				return n + rest, err
			}
		}
		err = s.fail(errno)
		at++
	}
	return n, err
}

func (s *sender) fail(errno unix.Errno) error {
	if s.failure == nil || s.failure.Err != error(errno) {
		s.failure = &os.SyscallError{Syscall: "sendmmsg", Err: errno}
	}
	return s.failure
}
