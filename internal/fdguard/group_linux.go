// Package fdguard lets Close run concurrently with system calls on the same file
// descriptors: no per-packet lock, and no descriptor number is reused while a call is in
// flight. It also waits for them (Epoll) and sends and receives batches of messages
// (sendmmsg, recvmmsg). Linux only.
package fdguard

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Group reference-counts the calls in flight on the file descriptors of one device or
// socket. Its methods are safe for concurrent use.
type Group struct {
	// users is twice the number of calls in flight; bit 0 is set by Close. The call
	// that brings it to 1 closes the file descriptors.
	users     atomic.Int64
	once      sync.Once
	closed    chan struct{}
	interrupt func()
	release   func()
}

// New returns an open Group. Close calls interrupt, unless it is nil, to end the waits of the
// calls in flight (Interrupt), and release, which closes the file descriptors, when the last
// of them has ended.
func New(interrupt, release func()) *Group {
	return &Group{closed: make(chan struct{}), interrupt: interrupt, release: release}
}

// Acquire begins a use of the file descriptors. It returns false after Close. Release
// must follow in either case.
func (g *Group) Acquire() bool { return g.users.Add(2)&1 == 0 }

// Release ends a use of the file descriptors that Acquire began.
func (g *Group) Release() {
	if g.users.Add(-2) == 1 {
		g.once.Do(func() {
			g.release()
			close(g.closed)
		})
	}
}

// Closed reports whether Close has been called.
func (g *Group) Closed() bool { return g.users.Load()&1 != 0 }

// Close returns when the last call in flight has ended and the file
// descriptors are closed. It may be called more than once.
func (g *Group) Close() {
	g.users.Add(2)
	if g.users.Or(1)&1 == 0 && g.interrupt != nil {
		g.interrupt()
	}
	g.Release()
	<-g.closed
}

// Wait waits until the socket fd is readable, or until Interrupt; it may return early.
func Wait(fd int) {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), 0, 0, 0, 0)
}

// Interrupt ends each Wait for the socket fd, present and future ones.
func Interrupt(fd int) { _ = unix.Shutdown(fd, unix.SHUT_RD) } // it works, and fails with ENOTCONN
