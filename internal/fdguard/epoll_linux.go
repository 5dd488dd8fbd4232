package fdguard

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EpollSet is a set of file descriptors, guarded by other Doors, that a Poller waits for
// besides its own. Its methods may be called by several goroutines.
type EpollSet struct{ epoll int }

// NewEpollSet makes an empty set. Close ends it.
func NewEpollSet() (EpollSet, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return EpollSet{fd}, os.NewSyscallError("epoll_create1", err)
}

// Add has waiting end while fd can be read. The caller sees to it that fd is open. key
// is what Ready says of it.
func (l EpollSet) Add(fd int, key int32) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: key}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &event))
}

// Remove ends that, as does closing fd.
func (l EpollSet) Remove(fd int) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil))
}

// Ready gives the key of a file descriptor that can be read now, or is gone.
func (l EpollSet) Ready() (key int32, ok bool) {
	var event unix.EpollEvent
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&event)), 1, 0, 0, 0)
	return event.Fd, errno == 0 && n > 0
}

// Close frees what the set takes.
func (l EpollSet) Close() error { return unix.Close(l.epoll) }

// Watch has the Poller wait for the set as well.
func (w *Poller) Watch(l EpollSet) { w.fds[2].Fd = int32(l.epoll) }
