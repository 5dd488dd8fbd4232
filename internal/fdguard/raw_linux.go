package fdguard

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// Binding restricts which packets the kernel delivers to a raw socket, by bind and connect
// (raw_v4_match). Unlike a socket filter this comes before the packet is cloned. The zero
// value matches every packet of the socket's protocol. Packets that no raw socket matches
// are the kernel's to answer (ICMP protocol unreachable) and to count (IpInUnknownProtos).
type Binding struct {
	// Device is the index of the ingress interface, or of the VRF it is enslaved to
	// (SO_BINDTOIFINDEX); 0 matches any.
	Device int
	// Local and Remote are the destination and source address, in network byte order;
	// zero matches any.
	Local, Remote [4]byte
	// Mark is the SO_MARK for the route lookup to Remote; 0 is none.
	Mark uint32
}

// RawSocket is a raw socket whose Binding can be changed without another descriptor: a spare
// socket, which receives nothing, stands by to take its place. The next spare is opened then;
// where that fails (EMFILE, a confined process) the socket in use is bound, but not
// connected, so that it receives from any Remote until there is a spare.
//
// It takes the place of the socket because one that is connected cannot be bound again: when
// it is disconnected the kernel unhashes it, for good.
//
// Receive, of the Receiver, may be called concurrently with the other methods, which may not
// be with each other.
type RawSocket struct {
	*Receiver
	open      func() (int, error)
	close     func(fd int)
	fd, spare int // spare is -1 if there is none
	binding   Binding
	unknown   bool // fd may have another binding: before the first Change, and after one that failed
	connected bool
}

// OpenRaw opens a RawSocket that receives nothing before the first Change. open opens a raw
// socket, and close, which Receive calls too, closes one. When the caller has no use for the
// RawSocket any more, it closes the sockets that are left.
//
// fds are the sockets that a RawSocket of another process has left, in any order: the one in use
// keeps its Binding, and what is queued. Those of no use are closed.
func OpenRaw(fds []int, open func() (int, error), close func(fd int)) (_ *RawSocket, err error) {
	s := &RawSocket{open: open, close: close, fd: -1, spare: -1, unknown: true}
	s.choose(fds)
	if s.fd < 0 {
		if s.fd, err = s.openParked(); err != nil {
			s.closeSpare()
			return nil, err
		}
	}
	if s.spare < 0 {
		if s.spare, err = s.openParked(); err != nil {
			close(s.fd)
			return nil, err
		}
	}
	s.Receiver = NewReceiver(s.fd)
	return s, nil
}

// parked is the local address of a spare: RFC 7600, the dummy address, which no packet is for.
var parked = [4]byte{192, 0, 0, 8}

// openParked opens a socket that receives nothing: the kernel would clone each packet to it.
func (s *RawSocket) openParked() (int, error) {
	fd, err := s.open()
	if err != nil {
		return -1, err
	}
	// Local addresses need not be configured yet, as on a VRRP backup. IP_FREEBIND would allow
	// that for bind(2), but not for connect(2).
	err = os.NewSyscallError("setsockopt IP_TRANSPARENT", privileged.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1))
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: parked}))
	}
	if err != nil {
		s.close(fd)
		return -1, err
	}
	drain(fd) // packets that arrived before bind
	return fd, nil
}

// FD returns the descriptor of the socket in use.
func (s *RawSocket) FD() int { return s.fd }

// Binding returns the Binding of the last Change that succeeded.
func (s *RawSocket) Binding() Binding { return s.binding }

// Connected reports whether the kernel delivers only packets that the Binding matches: from its Remote, unless that is zero.
func (s *RawSocket) Connected() bool { return s.connected || s.binding.Remote == [4]byte{} }

// Change replaces the Binding. prepare sets up the socket that is to receive from now on,
// before the one in use stops receiving: a packet that arrives in between may be received
// twice. On an error the one in use stays.
func (s *RawSocket) Change(to Binding, prepare func(fd int) error) error {
	if to == s.binding && !s.unknown {
		s.Connect()
		return prepare(s.fd)
	}
	if !s.connected {
		s.unknown = true
		if err := s.bind(s.fd, to); err != nil {
			return err
		}
		s.binding, s.unknown = to, false
		s.Connect()
		return prepare(s.fd)
	}
	fd, err := s.spare, error(nil)
	if s.spare = -1; fd < 0 {
		if fd, err = s.openParked(); err != nil {
			return fmt.Errorf("open a raw socket: %w", err)
		}
	}
	connected := false
	if err = s.bind(fd, to); err == nil {
		connected = s.connect(fd, to)
		drain(fd) // what came from any address before connect; the socket in use has it too
		err = prepare(fd)
	}
	if old := s.fd; err == nil {
		err = s.Replace(old, fd, func() { s.close(old) })
	}
	if err != nil {
		s.close(fd)
		return err
	}
	s.fd, s.binding, s.connected = fd, to, connected
	s.refill()
	return nil
}

// refill opens a spare if there is none, and reports whether there is one.
func (s *RawSocket) refill() bool {
	if s.spare < 0 {
		if fd, err := s.openParked(); err == nil {
			s.spare = fd
		}
	}
	return s.spare >= 0
}

// Connect tries again to connect the socket, if it is not: for want of a route to Remote, or of
// a spare.
func (s *RawSocket) Connect() {
	if !s.connected {
		s.connected = s.connect(s.fd, s.binding)
	}
}

// connect connects a socket that is bound to b, and reports whether it is connected. A socket
// without Remote stays as it is, to be bound again.
func (s *RawSocket) connect(fd int, b Binding) bool {
	if b.Remote == [4]byte{} || !s.refill() {
		return false
	}
	// A raw socket ignores the port, but without one getpeername fails with ENOTCONN.
	return unix.Connect(fd, &unix.SockaddrInet4{Addr: b.Remote, Port: 1}) == nil
}

// bind binds a socket that is not connected. An option that the socket has already is not set:
// SO_MARK takes a capability.
func (s *RawSocket) bind(fd int, b Binding) (err error) {
	set := func(name int, what string, value int) {
		if now, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name); err == nil && now != value {
			err = os.NewSyscallError("setsockopt "+what, privileged.SetsockoptInt(fd, unix.SOL_SOCKET, name, value))
		}
	}
	set(unix.SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", b.Device)
	set(unix.SO_MARK, "SO_MARK", int(b.Mark))
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: b.Local}))
	}
	return err
}

// drain empties the receive queue of a socket.
func drain(fd int) {
	for {
		if _, _, err := unix.Recvfrom(fd, nil, unix.MSG_DONTWAIT); err == unix.EAGAIN || err == unix.EBADF {
			return
		}
	}
}
