package fdguard

import "golang.org/x/sys/unix"

// choose picks from fds, raw sockets of another process, the socket in use, with its Binding, and a spare,
// and closes the others.
func (s *RawSocket) choose(fds []int) {
	for _, fd := range fds {
		b, connected, ok := readBinding(fd)
		switch {
		case ok && b.Local == parked && s.spare < 0:
			s.spare = fd
		// Of two, one was about to take the other's place, and has the packets since then: the
		// connected one cannot be bound again.
		case ok && b.Local != parked && (s.fd < 0 || connected && !s.connected):
			if s.fd >= 0 {
				s.close(s.fd)
			}
			s.fd, s.binding, s.connected, s.unknown = fd, b, connected, false
		default:
			s.close(fd)
		}
	}
}

func (s *RawSocket) closeSpare() {
	if s.spare >= 0 {
		s.close(s.spare)
	}
}

// readBinding returns what a raw socket is bound and connected to. ok is false for one that receives
// no more: another has taken its place (Receiver.Replace).
func readBinding(fd int) (b Binding, connected, ok bool) {
	local, err := unix.Getsockname(fd)
	address, is4 := local.(*unix.SockaddrInet4)
	if err != nil || !is4 {
		return b, false, false
	}
	b.Local = address.Addr
	if peer, err := unix.Getpeername(fd); err == nil {
		if address, is4 := peer.(*unix.SockaddrInet4); is4 {
			b.Remote, connected = address.Addr, true
		}
	}
	if b.Device, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX); err != nil {
		return b, connected, false
	}
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	b.Mark = uint32(mark)
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	_, pollErr := unix.Poll(poll, 0)
	return b, connected, err == nil && pollErr == nil && poll[0].Revents&unix.POLLRDHUP == 0
}
