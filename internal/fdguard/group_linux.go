// Package fdguard lets Close run concurrently with system calls on the same file
// descriptors: no per-packet lock, and no descriptor number is reused while a call is in
// flight. It also waits for them (Epoll) and sends and receives batches of messages
// (sendmmsg, recvmmsg). Linux only.
package fdguard

import (
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Group reference-counts the calls in flight on the file descriptors of one device or
// socket. Its methods are safe for concurrent use.
type Group struct {
	closing int // eventfd, readable from Close on
	// users is twice the number of calls in flight; bit 0 is set by Close. The call
	// that brings it to 1 closes the file descriptors.
	users   atomic.Int64
	once    sync.Once
	closed  chan struct{}
	release func()
}

// New returns an open Group. release closes the file descriptors; it is called once,
// when Close was called and the last call in flight has ended.
func New(release func()) (*Group, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &Group{closing: fd, closed: make(chan struct{}), release: release}, nil
}

// Acquire begins a use of the file descriptors. It returns false after Close. Release
// must follow in either case.
func (g *Group) Acquire() bool { return g.users.Add(2)&1 == 0 }

// Release ends a use of the file descriptors that Acquire began.
func (g *Group) Release() {
	if g.users.Add(-2) == 1 {
		g.once.Do(func() {
			g.release()
			_ = unix.Close(g.closing)
			close(g.closed)
		})
	}
}

// Closed reports whether Close has been called.
func (g *Group) Closed() bool { return g.users.Load()&1 != 0 }

// Close ends every Wait, and returns when the last call in flight has ended and the file
// descriptors are closed. It may be called more than once.
func (g *Group) Close() {
	g.users.Add(2)
	if g.users.Or(1)&1 == 0 {
		// Nobody reads the eventfd: it stays readable for every later Wait.
		_, _ = unix.Write(g.closing, []byte{0: 1, 7: 0})
	}
	g.Release()
	<-g.closed
}

// Wait waits until fd, a descriptor of the Group, is readable, or until Close; it may return
// early.
func (g *Group) Wait(fd int) {
	fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(g.closing), Events: unix.POLLIN}}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), 0, 0, 0, 0)
}
