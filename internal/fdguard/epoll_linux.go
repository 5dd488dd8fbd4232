package fdguard

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EpollSet is an epoll(7) instance that a Poller polls beside its own descriptor. The
// descriptors in it belong to other Groups. Its methods are safe for concurrent use.
type EpollSet struct{ fd int }

// NewEpollSet returns an empty set; the caller closes it with Close.
func NewEpollSet() (EpollSet, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return EpollSet{fd}, os.NewSyscallError("epoll_create1", err)
}

// Add watches fd for EPOLLIN, level-triggered. Ready returns key for it. The caller must
// keep fd open during the call.
func (e EpollSet) Add(fd int, key int32) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: key}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, fd, &event))
}

// Remove stops watching fd. Closing fd does too.
func (e EpollSet) Remove(fd int) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(e.fd, unix.EPOLL_CTL_DEL, fd, nil))
}

// Ready returns the key of a descriptor with EPOLLIN, EPOLLERR or EPOLLHUP, without
// blocking.
func (e EpollSet) Ready() (key int32, ok bool) {
	var event unix.EpollEvent
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd), uintptr(unsafe.Pointer(&event)), 1, 0, 0, 0)
	return event.Fd, errno == 0 && n > 0
}

// Close closes the epoll descriptor.
func (e EpollSet) Close() error { return unix.Close(e.fd) }

// Watch adds the set to the descriptors that the Poller polls. A Poller has one set.
func (p *Poller) Watch(e EpollSet) { p.fds[2].Fd = int32(e.fd) }
