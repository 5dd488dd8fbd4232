package ipsec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/privileged"
)

const (
	portIKE       = 500
	receiveBuffer = 4 << 20
	// sendBuffer, in bytes, holds more than the answers to unauthenticated senders (ike.Limits) in the 3 s
	// until ARP gives up a dead neighbour. All tunnels of a local address share it. The kernel doubles it,
	// and counts 768 bytes or more for a message.
	sendBuffer = 8 << 20
)

// ports holds the sockets of UDP ports 500 and 4500 of one local address.
type ports struct {
	key       portsKey
	manager   *Manager
	refs      int // tunnels that use it; guarded by Manager.mu
	guard     *fdguard.Group
	waker     *fdguard.Waker // of readIKE
	ike, natt int            // file descriptors
	receiver  *receiver      // of UDP-encapsulated ESP
	stop      func()         // ends serving receiver; nil before
}

// openPorts binds UDP sockets in the network namespace of the calling thread.
func openPorts(m *Manager, key portsKey) (p *ports, err error) {
	p = &ports{key: key, manager: m, ike: -1, natt: -1}
	if p.waker, err = m.spares.takeWaker(); err != nil {
		return nil, err
	}
	p.guard = fdguard.New(p.waker.Wake, p.release)
	if p.ike, err = m.bind(key, portIKE); err == nil {
		p.natt, err = m.bind(key, ipv4.PortNATT)
	}
	if err != nil {
		_ = p.Close()
		return nil, err
	}
	p.receiver = &receiver{manager: m, guard: p.guard, messages: fdguard.NewReceiver(p.natt), ports: p}
	return p, nil
}

func (p *ports) release() {
	for _, fd := range []int{p.ike, p.natt} {
		if fd >= 0 {
			p.manager.closeSocket(fd)
		}
	}
	p.waker.Close()
}

// bind returns the socket of the process before or, if there is none, binds a spare.
func (m *Manager) bind(key portsKey, port int) (int, error) {
	if fd, ok := m.adopted.take(key, port); ok {
		return fd, nil
	}
	fd, err := m.spares.bind(key, port)
	if err == nil && m.opened != nil {
		m.opened(fd)
	}
	return fd, err
}

func (m *Manager) closeSocket(fd int) {
	if m.closedSocket != nil && !m.leaving.Load() {
		m.closedSocket(fd)
	}
	_ = unix.Close(fd)
}

// spares are UDP sockets that are not bound yet, and a waker, for the next pair of ports. The kernel binds
// a UDP socket to a port only once. Manager.socketsMu guards it.
type spares struct {
	fds   []int
	waker *fdguard.Waker
}

// fill opens what is missing of a waker and two sockets.
func (s *spares) fill() (err error) {
	if s.waker == nil {
		if s.waker, err = fdguard.NewWaker(); err != nil {
			return err
		}
	}
	for len(s.fds) < 2 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		s.fds = append(s.fds, fd)
	}
	return nil
}

func (s *spares) close() {
	for _, fd := range s.fds {
		_ = unix.Close(fd)
	}
	s.fds = nil
	if s.waker != nil {
		s.waker.Close()
		s.waker = nil
	}
}

func (s *spares) takeWaker() (w *fdguard.Waker, err error) {
	if w = s.waker; w == nil {
		return fdguard.NewWaker()
	}
	s.waker = nil
	return w, nil
}

// bind takes a spare and binds it.
func (s *spares) bind(key portsKey, port int) (int, error) {
	if len(s.fds) == 0 {
		if err := s.fill(); err != nil {
			return -1, fmt.Errorf("IKE needs UDP port %d of %s: %w", port, key.local, err)
		}
	}
	fd := s.fds[0]
	if err := bindUDP(fd, key, port); err != nil { // it is not bound, and stays a spare
		if errors.Is(err, unix.EADDRINUSE) {
			return -1, PortTaken(key.local, port, "", err)
		}
		if errors.Is(err, unix.EACCES) {
			return -1, fmt.Errorf("IKE needs UDP port %d, and that CAP_NET_BIND_SERVICE: %s: %w", port, privileged.Remedy, err)
		}
		return -1, fmt.Errorf("IKE needs UDP port %d of %s: %w", port, key.local, err)
	}
	s.fds = s.fds[1:]
	return fd, nil
}

func bindUDP(fd int, key portsKey, port int) error {
	var errs []error
	set := func(level, name int, what string, value int) {
		errs = append(errs, os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value)))
	}
	set(unix.IPPROTO_IP, unix.IP_RECVTOS, "IP_RECVTOS", 1)
	// Clears DF, so that routers may fragment large IKE messages, and ignores ICMP 3/4
	// (fragmentation needed) about this port: anybody can forge one, and the kernel would
	// cache its MTU for the whole host.
	set(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_OMIT)
	// The address may not be configured yet, as on a VRRP backup.
	set(unix.IPPROTO_IP, unix.IP_FREEBIND, "IP_FREEBIND", 1)
	change := func(name int, what string, value int) { // both take a capability
		if now, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name); now != value {
			errs = append(errs, os.NewSyscallError("setsockopt "+what, privileged.SetsockoptInt(fd, unix.SOL_SOCKET, name, value)))
		}
	}
	change(unix.SO_MARK, "SO_MARK", int(key.mark))
	change(unix.SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", key.device)
	errs = append(errs, setReceiveBuffer(fd), setSendBuffer(fd))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.NewSyscallError("bind", privileged.BindUDP(fd, &unix.SockaddrInet4{Port: port, Addr: as4(key.local)}))
}

// setReceiveBuffer sets SO_RCVBUF; beyond net.core.rmem_max that needs CAP_NET_ADMIN.
func setReceiveBuffer(fd int) error {
	if privileged.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) == nil {
		return nil
	}
	return os.NewSyscallError("setsockopt SO_RCVBUF", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer))
}

// setSendBuffer sets SO_SNDBUF; beyond net.core.wmem_max that needs CAP_NET_ADMIN. See mayAnswer for a smaller one.
func setSendBuffer(fd int) error {
	if privileged.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) == nil {
		return nil
	}
	return os.NewSyscallError("setsockopt SO_SNDBUF", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer))
}

// readIKE receives from port 500 until Close.
func (p *ports) readIKE() {
	defer p.guard.Release()
	if !p.guard.Acquire() {
		return
	}
	buf := make([]byte, packet.MaxSize)
	for {
		n, from, err := unix.Recvfrom(p.ike, buf, unix.MSG_DONTWAIT)
		switch {
		case p.guard.Closed():
			return
		case err == unix.EAGAIN:
			p.waker.Wait(p.ike)
		case err != nil: // an ICMP error about a message that we sent
		default:
			if from, ok := from.(*unix.SockaddrInet4); ok {
				p.manager.deliver(p.key.local, portIKE, netip.AddrPortFrom(netip.AddrFrom4(from.Addr), uint16(from.Port)), buf[:n])
			}
		}
	}
}

// send sends an IKE message or NAT keepalive, and does not wait. It fails with EPERM if this host refuses it; other
// errors are left to IKE's retransmission. answered is when the tunnel's last Unverified message was sent.
func (p *ports) send(a ike.Send, now time.Time, answered *time.Time) error {
	defer p.guard.Release()
	if !p.guard.Acquire() {
		return nil
	}
	fd, b := p.ike, a.Payload
	if a.LocalPort == ipv4.PortNATT {
		fd = p.natt
		if !a.Keepalive {
			b = append(make([]byte, esp.NonESPMarker, esp.NonESPMarker+len(b)), b...)
		}
	}
	if a.Unverified {
		if queued, size := sendQueue(fd); !mayAnswer(queued, size, now.Sub(*answered)) {
			return nil
		}
		*answered = now
	}
	if err := unix.Sendto(fd, b, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Port: int(a.To.Port()), Addr: as4(a.To.Addr())}); err == unix.EPERM {
		return err
	}
	return nil
}

// answerInterval is the least time between two Unverified messages of a tunnel while others wait in the send buffer.
const answerInterval = time.Second / 2

// mayAnswer reports whether the send buffer has room for an Unverified message. Those to a neighbour that does
// not answer ARP wait in it, and once it is full nothing is sent to anybody. So they get half of it, of which each
// tunnel fills the second quarter at one per answerInterval: a flood for some tunnels leaves room for the others.
func mayAnswer(queued, size uint32, since time.Duration) bool {
	return queued < size/4 || queued < size/2 && since >= answerInterval
}

// sendQueue returns how much of a socket's send buffer is in use, and its size, as the kernel counts.
func sendQueue(fd int) (queued, size uint32) {
	var info [9]uint32 // SK_MEMINFO_VARS, <linux/sock_diag.h>
	n := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 { // before Linux 4.12
		return 0, math.MaxUint32
	}
	return info[unix.SK_MEMINFO_WMEM_ALLOC], info[unix.SK_MEMINFO_SNDBUF]
}

// Close ends the readers of both sockets, and returns when they have ended.
func (p *ports) Close() error {
	if p.stop != nil {
		p.stop()
	}
	p.guard.Close()
	return nil
}

// rawESP is the raw socket of IP protocol 50. With a single tunnel it is bound and connected
// to the tunnel's addresses, so that it does not get the ESP of other processes.
type rawESP struct {
	manager *Manager
	guard   *fdguard.Group

	mu  sync.Mutex // serializes restrict
	raw *fdguard.RawSocket

	fdsMu sync.Mutex
	fds   []int // the open descriptors of raw
}

// openESP opens the socket in the network namespace of the calling thread.
func openESP(m *Manager) (espSocket, Receiver, error) {
	s := &rawESP{manager: m, fds: m.adopted.raw}
	s.guard = fdguard.New(nil, s.release)
	var err error
	left := m.adopted.raw
	m.adopted.raw = nil
	if s.raw, err = fdguard.OpenRaw(left, s.openSocket, s.closeSocket); err == nil && len(left) == 0 {
		err = s.restrict(nil)
	}
	if err != nil {
		_ = s.Close()
		if errors.Is(err, os.ErrPermission) {
			return nil, nil, fmt.Errorf("ESP needs a raw socket, and that CAP_NET_RAW: %s: %w", privileged.Remedy, err)
		}
		return nil, nil, fmt.Errorf("open the ESP socket: %w", err)
	}
	return s, &receiver{manager: m, guard: s.guard, messages: s.raw.Receiver}, nil
}

func (s *rawESP) openSocket() (int, error) {
	fd, err := privileged.RawSocket(esp.ProtocolESP)
	if err != nil {
		return -1, err
	}
	if err = setReceiveBuffer(fd); err == nil { // the kernel must cache no forged path MTU, as in bindUDP
		err = os.NewSyscallError("setsockopt IP_MTU_DISCOVER", unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_INTERFACE))
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	s.fdsMu.Lock()
	defer s.fdsMu.Unlock()
	s.fds = append(s.fds, fd)
	if s.manager.opened != nil {
		s.manager.opened(fd)
	}
	return fd, nil
}

func (s *rawESP) closeSocket(fd int) {
	s.fdsMu.Lock()
	defer s.fdsMu.Unlock()
	s.fds = slices.DeleteFunc(slices.Clone(s.fds), func(open int) bool { return open == fd })
	s.manager.closeSocket(fd)
}

// restrict implements espSocket. A packet that arrives meanwhile may be received twice; the
// anti-replay window drops it.
func (s *rawESP) restrict(only *negotiator) error {
	var to fdguard.Binding
	if only != nil {
		key := only.ports.key
		to = fdguard.Binding{Device: key.device, Mark: key.mark, Local: as4(only.local), Remote: as4(only.remote)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.guard.Release()
	if !s.guard.Acquire() {
		return nil
	}
	return s.raw.Change(to, func(int) error { return nil })
}

func (s *rawESP) release() {
	for _, fd := range s.fds {
		s.manager.closeSocket(fd)
	}
}

// Close returns when the receiver's Read has returned.
func (s *rawESP) Close() error {
	s.guard.Close()
	return nil
}

// receiver implements Receiver for the raw ESP socket or, if ports is set, UDP port 4500.
type receiver struct {
	manager  *Manager
	guard    *fdguard.Group
	messages *fdguard.Receiver
	ports    *ports
	msgs     []fdguard.Message
	iovs     []unix.Iovec
	names    []unix.RawSockaddrInet4
	control  [][64]byte
	kept     []byte // buffer for a captured packet: see Manager.open
}

func (r *receiver) Watch(opened func(fd int) error) error { return r.messages.Watch(opened) }

// resize allocates the message headers for batches of n.
func (r *receiver) resize(n int) {
	r.msgs, r.iovs = make([]fdguard.Message, n), make([]unix.Iovec, n)
	r.names, r.control = make([]unix.RawSockaddrInet4, n), make([][64]byte, n)
	for i := range r.msgs {
		r.msgs[i].Iov = &r.iovs[i]
		r.msgs[i].SetIovlen(1)
	}
}

func (r *receiver) Read(batch []*packet.Buffer) (n int, err error) {
	defer r.guard.Release()
	if !r.guard.Acquire() {
		return 0, os.ErrClosed
	}
	if len(batch) != len(r.msgs) {
		r.resize(len(batch))
	}
	for i, b := range batch {
		space := b.Space()
		r.iovs[i].Base = unsafe.SliceData(space)
		r.iovs[i].SetLen(len(space))
		h := &r.msgs[i].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&r.names[i])), unix.SizeofSockaddrInet4
		h.Control = &r.control[i][0]
		h.SetControllen(len(r.control[i]))
	}
	count, err := r.messages.Receive(r.msgs, nil)
	if err != nil {
		return 0, err
	}
	for i := range count {
		batch[i].SetLen(int(r.msgs[i].N))
		if r.open(batch[i], i) {
			batch[n], batch[i] = batch[i], batch[n]
			n++
		}
	}
	return n, nil
}

// open decrypts the packet in b, received as message i, and reports whether it is valid.
// An IKE message is passed on instead.
func (r *receiver) open(b *packet.Buffer, i int) bool {
	if r.ports == nil {
		return r.manager.open(b, 0, &r.kept)
	}
	from := &r.names[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&from.Port))[:])
	switch esp.ClassifyUDP(b.Bytes()) {
	case esp.UDPIKE:
		r.manager.deliver(r.ports.key.local, ipv4.PortNATT, netip.AddrPortFrom(netip.AddrFrom4(from.Addr), port), b.Bytes()[esp.NonESPMarker:])
		return false
	case esp.UDPESP:
	default:
		return false
	}
	// A UDP socket delivers no IP header. Only the ECN bits of this one are used.
	if b.Len() > packet.MaxSize-20 {
		return false
	}
	h := b.Push(20)
	clear(h)
	h[0], h[1], h[8], h[9] = 0x45, r.tos(i), 64, esp.ProtocolESP
	binary.BigEndian.PutUint16(h[2:], uint16(b.Len()))
	copy(h[12:], from.Addr[:])
	local := as4(r.ports.key.local)
	copy(h[16:], local[:])
	return r.manager.open(b, port, &r.kept)
}

// tos returns the TOS byte of message i, from its IP_TOS control message.
func (r *receiver) tos(i int) byte {
	b := r.control[i][:r.msgs[i].Controllen]
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		size := int(h.Len)
		if size < unix.SizeofCmsghdr || size > len(b) {
			return 0
		}
		if h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && size > unix.CmsgLen(0) {
			return b[unix.CmsgLen(0)]
		}
		if size = unix.CmsgSpace(size - unix.CmsgLen(0)); size > len(b) {
			return 0
		}
		b = b[size:]
	}
	return 0
}
