package fdguard

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Waker ends the waits for a socket that another process has too, or is to have: Interrupt would shut it down for both.
type Waker struct{ fd int }

// NewWaker returns a Waker with an eventfd of its own. The caller closes it.
func NewWaker() (*Waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &Waker{fd}, nil
}

// Wait waits until the socket fd is readable, or until Wake; it may return early.
func (w *Waker) Wait(fd int) {
	fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(w.fd), Events: unix.POLLIN}}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), 0, 0, 0, 0)
}

// Wake ends each Wait, present and future ones.
func (w *Waker) Wake() { _, _ = unix.Write(w.fd, []byte{1, 0, 0, 0, 0, 0, 0, 1}) }

// Close closes the eventfd. Nobody may wait any more.
func (w *Waker) Close() { _ = unix.Close(w.fd) }
