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

// openHdrincl opens the socket for packets with their own header (IP_HDRINCL). Being
// IPPROTO_RAW, it receives neither protocol 4 nor ICMP errors about it.
func openHdrincl() (int, error) {
	return newSocket(unix.AF_INET, unix.IPPROTO_RAW, dropAll, rcvbuf(0), sndbuf(routedBufferSize),
		sockopt(unix.IPPROTO_IP, unix.IP_HDRINCL, "IP_HDRINCL", 1),
		// The tunnel does path MTU discovery: the kernel's cached path MTU must not apply.
		sockopt(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_PROBE),
		enableRecvErr)
}

// supportsProtocolCmsg reports whether the kernel takes IP_PROTOCOL as a control message.
// Without it, packets sent with IP_HDRINCL are looked up as IPPROTO_RAW, and an IPsec policy for
// protocol 4 does not apply to them. Linux has it since 6.4 and in stable releases of that time.
func supportsProtocolCmsg(hdrincl int) bool {
	var c cmsgBuffer
	binary.NativeEndian.PutUint32(c.add(unix.IPPROTO_IP, unix.IP_PROTOCOL, 4), unix.IPPROTO_IPIP)
	// The shortest valid packet, to this host, which MSG_PROBE does not send: only whether the
	// control message is refused counts.
	const msgProbe = 0x10 // MSG_PROBE
	err := unix.Sendmsg(hdrincl, make([]byte, ipv4.HeaderLen), c.buf[:c.n], &unix.SockaddrInet4{}, msgProbe|unix.MSG_DONTWAIT)
	return err != unix.EINVAL
}

// openFragmenting opens the socket for packets that the kernel has to fragment, which it does
// not do with IP_HDRINCL. It must be a protocol-4 socket, but is bound to an address that no
// packet is for, so that it gets neither copies of received packets nor errors. IP_PKTINFO sets
// the source of each packet.
func openFragmenting() (int, error) {
	nowhere := unix.SockaddrInet4{Addr: [4]byte{192, 0, 0, 8}} // RFC 7600: the dummy address
	return newSocket(unix.AF_INET, unix.IPPROTO_IPIP, dropAll, rcvbuf(0), sndbuf(routedBufferSize),
		// Allows any source address, as IP_HDRINCL does.
		sockopt(unix.IPPROTO_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT", 1),
		sockopt(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_DONT),
		enableRecvErr,
		func(fd int) error { return os.NewSyscallError("bind", unix.Bind(fd, &nowhere)) })
}

// enableRecvErr makes send fail with ENOBUFS when the interface's queue is full. Without
// IP_RECVERR the kernel hides that from raw sockets.
func enableRecvErr(fd int) error {
	return sockopt(unix.IPPROTO_IP, unix.IP_RECVERR, "IP_RECVERR", 1)(fd)
}

// openLink opens the packet socket for sending frames. Its protocol is 0: it receives nothing.
func openLink() (int, error) {
	return newSocket(unix.AF_PACKET, 0, sndbuf(sendBufferSize))
}

// sender shares the socket's file descriptors and has its own buffers for the system calls.
type sender struct {
	socket *socket

	routing    routing // what routeCmsgs were made from; they are empty at first
	routeCmsgs cmsgBuffer
	// protocol is the data of IP_PROTOCOL within routeCmsgs; nil if the kernel does not take it.
	protocol      []byte
	msgs          messages // for the hdrincl or the link socket
	fragmentMsgs  messages
	fragmentCmsgs []cmsgBuffer // of each of fragmentMsgs

	lastError *os.SyscallError // reused, so that a full queue does not allocate
}

// routing is the part of a Path that control messages pass to the kernel, for packets that it routes.
type routing struct {
	local  [4]byte
	mark   uint32
	device int
}

// run is packets and their paths, as Sender.Write takes them.
type run struct {
	batch []*packet.Buffer
	paths []*Path
}

func (r run) path(i int) *Path {
	if len(r.paths) == 1 {
		return r.paths[0]
	}
	return r.paths[i]
}

// part returns the packets of r from index from on, up to but not including to.
func (r run) part(from, to int) run {
	if len(r.paths) > 1 {
		r.paths = r.paths[from:to]
	}
	r.batch = r.batch[from:to]
	return r
}

// messages are the arguments of one sendmmsg.
type messages struct {
	hdrs []fdguard.Message
	iovs []unix.Iovec
	// Consecutive messages to one destination, or over one Link, share an address.
	addresses     []unix.RawSockaddrInet4
	linkAddresses []unix.RawSockaddrLinklayer
}

func (m *messages) grow(n int) {
	if n <= len(m.hdrs) {
		return
	}
	m.hdrs, m.iovs = make([]fdguard.Message, n), make([]unix.Iovec, n)
	m.addresses, m.linkAddresses = make([]unix.RawSockaddrInet4, n), make([]unix.RawSockaddrLinklayer, n)
	for i := range m.hdrs {
		m.hdrs[i].Iov = &m.iovs[i]
		m.hdrs[i].SetIovlen(1)
		m.addresses[i].Family = unix.AF_INET
		m.linkAddresses[i].Family, m.linkAddresses[i].Halen = unix.AF_PACKET, 6
	}
}

// set makes p the data of message i. p must stay unchanged until the message is sent.
func (m *messages) set(i int, p []byte) {
	m.iovs[i].Base = unsafe.SliceData(p)
	m.iovs[i].SetLen(len(p))
}

// to addresses message i to the destination in the outer header p. The messages before it must have their addresses.
func (m *messages) to(i int, p []byte) {
	h := &m.hdrs[i].Msghdr
	h.Namelen = unix.SizeofSockaddrInet4
	var destination [4]byte
	if len(p) >= ipv4.HeaderLen {
		destination = [4]byte(p[16:])
	}
	if i > 0 && (*unix.RawSockaddrInet4)(unsafe.Pointer(m.hdrs[i-1].Name)).Addr == destination {
		h.Name = m.hdrs[i-1].Name
		return
	}
	m.addresses[i].Addr = destination
	h.Name = (*byte)(unsafe.Pointer(&m.addresses[i]))
}

func (s *socket) NewSender() Sender { return &sender{socket: s} }

// way is the socket that a packet is sent by.
type way uint8

const (
	byHdrincl way = iota
	byLink
	byFragmenting
)

func (r run) way(i int) way {
	switch path := r.path(i); {
	case path.MTU > 0 && r.batch[i].Len() > path.MTU:
		return byFragmenting
	case path.Link != nil:
		return byLink
	}
	return byHdrincl
}

func (s *sender) Write(batch []*packet.Buffer, paths []*Path) (n int, err error) {
	defer s.socket.guard.Release()
	if !s.socket.guard.Acquire() {
		return 0, os.ErrClosed
	}
	// Consecutive packets for the same socket are sent together, which keeps the order.
	for left := (run{batch, paths}); len(left.batch) > 0; {
		by, end := left.way(0), 1
		for end < len(left.batch) && left.way(end) == by {
			end++
		}
		var sent int
		var failed error
		switch together := left.part(0, end); by {
		case byFragmenting:
			sent, failed = s.sendFragmented(together)
		case byLink:
			sent, failed = s.sendFrames(together)
		default:
			sent, failed = s.sendHdrincl(together)
		}
		n += sent
		if failed != nil {
			err = failed
		}
		left = left.part(end, len(left.batch))
	}
	return n, err
}

// prepare makes the control messages of packets that the kernel routes along path.
func (s *sender) prepare(path *Path) {
	if next := (routing{path.Local, path.Mark, path.Device}); next != s.routing || s.routeCmsgs.n == 0 {
		s.routing = next
		s.routeCmsgs.reset()
		s.routeCmsgs.addPath(path)
		if s.socket.protocolCmsg {
			s.protocol = s.routeCmsgs.add(unix.IPPROTO_IP, unix.IP_PROTOCOL, 4)
		}
	}
}

// sendHdrincl sends packets with their own outer header, along the kernel's routes.
func (s *sender) sendHdrincl(r run) (n int, err error) {
	s.msgs.grow(len(r.batch))
	s.prepare(r.path(0))
	if p := r.batch[0].Bytes(); s.protocol != nil && len(p) >= ipv4.HeaderLen {
		binary.NativeEndian.PutUint32(s.protocol, uint32(p[9])) // a batch has one protocol
	}
	for i, b := range r.batch {
		s.msgs.to(i, b.Bytes())
		s.routeCmsgs.attach(&s.msgs.hdrs[i].Msghdr)
		s.msgs.set(i, b.Bytes())
	}
	return s.send(s.socket.hdrincl, s.msgs.hdrs[:len(r.batch)], r)
}

// sendFrames sends packets as Ethernet frames to their next hops, bypassing the kernel's routes and
// netfilter.
func (s *sender) sendFrames(r run) (n int, err error) {
	s.msgs.grow(len(r.batch))
	var link *Link // of address
	var address *unix.RawSockaddrLinklayer
	for i, b := range r.batch {
		if next := r.path(i).Link; next != link {
			link, address = next, &s.msgs.linkAddresses[i]
			link.address(address)
		}
		h := &s.msgs.hdrs[i].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(address)), unix.SizeofSockaddrLinklayer
		h.Control = nil
		h.SetControllen(0)
		copy(b.Push(len(link.Header)), link.Header[:])
		s.msgs.set(i, b.Bytes())
		b.Pull(len(link.Header))
	}
	return s.send(s.socket.link, s.msgs.hdrs[:len(r.batch)], r)
}

// address sets device, hardware address and protocol of a packet socket's address to those of a frame to the next hop.
func (l *Link) address(a *unix.RawSockaddrLinklayer) {
	a.Ifindex = int32(l.Device)
	copy(a.Addr[:6], l.Header[:6])
	// sll_protocol is the EtherType in network byte order, as in the header.
	a.Protocol = binary.NativeEndian.Uint16(l.Header[12:])
}

// sendFragmented sends packets that the kernel fragments to the first hop's MTU. The kernel
// makes the outer header, with an ID of its own, from our addresses, TOS and TTL, and always
// with protocol 4: an encrypted packet must never be sent here.
func (s *sender) sendFragmented(r run) (n int, err error) {
	s.fragmentMsgs.grow(len(r.batch))
	if len(s.fragmentCmsgs) < len(r.batch) {
		s.fragmentCmsgs = make([]cmsgBuffer, len(r.batch))
	}
	k := 0
	for i, b := range r.batch {
		p := b.Bytes()
		const df = 0x40
		if len(p) < ipv4.HeaderLen || p[0] != 0x45 || p[6]&df != 0 || p[9] != ipv4.ProtocolIPIP {
			err = s.syscallError(unix.EMSGSIZE)
			continue
		}
		cmsgs := &s.fragmentCmsgs[k]
		cmsgs.reset()
		cmsgs.addPath(r.path(i))
		binary.NativeEndian.PutUint32(cmsgs.add(unix.IPPROTO_IP, unix.IP_TOS, 4), uint32(p[1]))
		binary.NativeEndian.PutUint32(cmsgs.add(unix.IPPROTO_IP, unix.IP_TTL, 4), uint32(p[8]))
		s.fragmentMsgs.to(k, p)
		cmsgs.attach(&s.fragmentMsgs.hdrs[k].Msghdr)
		s.fragmentMsgs.set(k, p[ipv4.HeaderLen:])
		k++
	}
	n, failed := s.send(s.socket.fragmenting, s.fragmentMsgs.hdrs[:k], run{})
	if failed != nil {
		err = failed
	}
	return n, err
}

// send sends msgs in order. r has the same packets, for the fallbacks; without any there is no
// fallback.
func (s *sender) send(fd int, msgs []fdguard.Message, r run) (n int, err error) {
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
			// The interface's queue or the socket's send buffer is full.
		case unix.EMSGSIZE:
			// The first hop's MTU is lower than path.MTU. The kernel fragments protocol 4; other
			// packets are lost until the path is updated.
			if len(r.batch) > 0 {
				fragmented, failed := s.sendFragmented(r.part(at, at+1))
				n += fragmented
				if failed != nil {
					err = failed
				}
				at++
				continue
			}
		default:
			// The error may be a pending one of the socket (sk_err), and this packet not tried
			// yet: retry it once.
			if retried != at {
				retried = at
				continue
			}
			if fd == s.socket.link {
				// The interface is down or gone: the kernel's routes may have another one.
				rest, failed := s.sendHdrincl(r.part(at, len(r.batch)))
				if failed != nil {
					err = failed
				}
				return n + rest, err
			}
		}
		err = s.syscallError(errno)
		at++
	}
	return n, err
}

// syscallError returns errno as an error of sendmmsg, without allocating for a repeated one.
func (s *sender) syscallError(errno unix.Errno) error {
	if s.lastError == nil || s.lastError.Err != error(errno) {
		s.lastError = &os.SyscallError{Syscall: "sendmmsg", Err: errno}
	}
	return s.lastError
}
