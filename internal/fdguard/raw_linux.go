package fdguard

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Selection is which packets the kernel gives to a raw socket of a protocol. It is asked
// before the packet is copied: a filter would be asked of the copy. The zero value is all
// of them.
type Selection struct {
	// Device is the index of the only interface that packets may enter by, or of the
	// VRF that it is in; 0 stands for any. What enters by another is for the kernel to
	// answer (ICMP protocol unreachable) and to count (IpInUnknownProtos).
	Device int
	// Local and Remote are the only destination and source, in network byte order;
	// zero stands for any. What has others is likewise the kernel's.
	Local, Remote [4]byte
	// Mark is the one that packets to Remote are routed by (SO_MARK); 0 is none.
	Mark uint32
}

// Select has a raw socket that was not selected for yet receive only that. selected is
// false where there is no route to Remote, which the kernel wants to see: then Remote is
// as good as zero, and Connect may be tried again.
func (s *Selection) Select(fd int) (selected bool, err error) {
	set := func(level, name int, what string, value int) {
		if err == nil && value != 0 {
			err = os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
		}
	}
	set(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", s.Device)
	if s.Local != [4]byte{} {
		// The address need not be this host's yet, as on a VRRP backup, for neither of
		// bind and connect: IP_FREEBIND would do for bind only.
		set(unix.IPPROTO_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT", 1)
		set(unix.SOL_SOCKET, unix.SO_MARK, "SO_MARK", int(s.Mark))
		if err == nil {
			err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: s.Local}))
		}
	}
	return err == nil && s.Connect(fd), err
}

// Connect is the last step of Select.
func (s *Selection) Connect(fd int) (selected bool) {
	return s.Remote == [4]byte{} || unix.Connect(fd, &unix.SockaddrInet4{Addr: s.Remote}) == nil
}

// Drain throws away what a socket has received so far.
func Drain(fd int) {
	for {
		if _, _, err := unix.Recvfrom(fd, nil, unix.MSG_DONTWAIT); err == unix.EAGAIN || err == unix.EBADF {
			return
		}
	}
}

// successors are the sockets that a Poller goes on with.
type successors struct {
	some atomic.Bool
	mu   sync.Mutex
	list []successor
}

type successor struct {
	fd      int
	retired func()
}

// Succeed has Receive go on with the socket fd when it has taken all that the present one,
// old, holds, and then call retired, which may close old. It is for what cannot be changed
// about an open socket: a raw one that is disconnected receives nothing any more. old gets
// nothing from now on, and the caller leaves it open until retired is called. Any
// goroutine may call Succeed.
func (w *Poller) Succeed(old, fd int, retired func()) error {
	nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	if err := unix.SetsockoptSockFprog(old, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing}); err != nil {
		return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
	}
	_ = unix.Shutdown(old, unix.SHUT_RD) // ends waiting for it; what it holds can be read
	w.successors.mu.Lock()
	defer w.successors.mu.Unlock()
	w.successors.list = append(w.successors.list, successor{fd, retired})
	w.successors.some.Store(true)
	return nil
}

// succeed turns to the next socket, if there is one.
func (w *Poller) succeed() bool {
	if !w.successors.some.Load() {
		return false
	}
	w.successors.mu.Lock()
	next := w.successors.list[0]
	w.successors.list = w.successors.list[1:]
	w.successors.some.Store(len(w.successors.list) > 0)
	w.successors.mu.Unlock()
	w.fds[0].Fd = int32(next.fd)
	next.retired()
	return true
}
