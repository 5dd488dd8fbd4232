// Package fdguard lets Close run concurrently with system calls on the same file
// descriptors: no per-packet lock, and no descriptor number is reused while a call is in
// flight. It also polls them (Poller, EpollSet) and sends and receives batches of
// messages (sendmmsg, recvmmsg). Linux only.
package fdguard

import (
	"os"
	"sync"
	"sync/atomic"
	"time"
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

// Close wakes every Poller and returns when the last call in flight has ended and the
// file descriptors are closed. It may be called more than once. The first Close calls
// wake, if it is not nil: it must unblock goroutines that block in something else.
func (g *Group) Close(wake func()) {
	g.users.Add(2)
	if g.users.Or(1)&1 == 0 {
		// Nobody reads the eventfd: it stays readable for every later poll.
		_, _ = unix.Write(g.closing, []byte{0: 1, 7: 0})
		if wake != nil {
			wake()
		}
	}
	g.Release()
	<-g.closed
}

// busyPoll is how long a thread polls without telling the Go scheduler. Waking through
// the scheduler costs about 50 us (sysmon has to wake first), so poll longer than the
// gaps of interactive traffic: 20 ms for voice, 200 ms for typing. Then block normally:
// an idle daemon costs nothing. Garbage collection is not held up, its preemption signal
// interrupts ppoll.
const busyPoll = 250 * time.Millisecond

// Poller waits for a file descriptor to become readable, or for Close. It is for one
// goroutine.
type Poller struct {
	group   *Group
	fds     [3]unix.PollFd // the descriptor to read, the Group's eventfd, an EpollSet or -1
	timeout unix.Timespec
	// interrupted: ppoll returned EINTR; timeout holds the remaining time.
	interrupted  bool
	moderation   moderation
	replacements replacements
}

// Poller returns a Poller for fd, a descriptor of the Group.
func (g *Group) Poller(fd int) Poller {
	return Poller{group: g, fds: [3]unix.PollFd{
		{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(g.closing), Events: unix.POLLIN}, {Fd: -1, Events: unix.POLLIN},
	}}
}

// PollSpin waits until the descriptor is readable; it may also return spuriously. It
// polls for busyPoll without telling the Go scheduler, then blocks like PollBlock. gone
// reports POLLERR, POLLHUP or POLLNVAL on the descriptor.
//
// The raw system call keeps the thread's P: together with the raw calls of the data path
// that is worth a factor of 1.5 to 2 in throughput. GOMAXPROCS must exceed the number of
// goroutines in PollSpin.
func (p *Poller) PollSpin() (gone bool) {
	if !p.interrupted {
		p.timeout = unix.NsecToTimespec(int64(busyPoll)) // the kernel writes the remaining time back
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), uintptr(len(p.fds)),
		uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
	p.interrupted = errno == unix.EINTR // every 10 ms: sysmon preempts a P that long in one goroutine
	if errno == 0 && n == 0 {
		return p.PollBlock()
	}
	return errno == 0 && p.gone()
}

// PollBlock is PollSpin without the busy poll: the Go scheduler gives the P away at once.
func (p *Poller) PollBlock() (gone bool) {
	_, _, errno := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), uintptr(len(p.fds)), 0, 0, 0, 0)
	return errno == 0 && p.gone()
}

func (p *Poller) gone() bool {
	return p.fds[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0
}
