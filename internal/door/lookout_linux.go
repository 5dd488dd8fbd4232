package door

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Lookout is a set of file descriptors, guarded by other Doors, that a Waiter waits for
// besides its own. Its methods may be called by several goroutines.
type Lookout struct{ epoll int }

// NewLookout makes an empty set. Close ends it.
func NewLookout() (Lookout, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return Lookout{fd}, os.NewSyscallError("epoll_create1", err)
}

// Add has waiting end while fd can be read. The caller sees to it that fd is open. key
// is what Ready says of it.
func (l Lookout) Add(fd int, key int32) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: key}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &event))
}

// Remove ends that, as does closing fd.
func (l Lookout) Remove(fd int) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil))
}

// Ready gives the key of a file descriptor that can be read now, or is gone.
func (l Lookout) Ready() (key int32, ok bool) {
	var event unix.EpollEvent
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&event)), 1, 0, 0, 0)
	return event.Fd, errno == 0 && n > 0
}

// Close frees what the set takes.
func (l Lookout) Close() error { return unix.Close(l.epoll) }

// Watch has the Waiter wait for the set as well.
func (w *Waiter) Watch(l Lookout) { w.fds[2].Fd = int32(l.epoll) }
