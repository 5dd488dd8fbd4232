// Package fdguard lets Close run concurrently with system calls on the same file
// descriptors: there is no lock per packet, and no descriptor number is reused while a
// call is in flight. It waits for descriptors (Poller, EpollSet) and moves batches of
// messages through them. Linux only.
package fdguard

import (
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Group guards the file descriptors of one device or socket. Its methods may be
// called by several goroutines.
type Group struct {
	closing int // eventfd, readable from Close on
	// users is twice the number of calls in progress, plus one after Close.
	// Whoever brings it to exactly one releases the file descriptors.
	users   atomic.Int64
	once    sync.Once
	closed  chan struct{}
	release func()
}

// New makes an open Group. release closes the file descriptors that it guards; it
// is called once, after Close, when the last call has left.
func New(release func()) (*Group, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &Group{closing: fd, closed: make(chan struct{}), release: release}, nil
}

// Acquire announces a call that uses the file descriptors; Release must follow it,
// whatever it returns. It is false after Close.
func (d *Group) Acquire() bool { return d.users.Add(2)&1 == 0 }

// Release ends what Acquire began.
func (d *Group) Release() {
	if d.users.Add(-2) == 1 {
		d.once.Do(func() {
			d.release()
			_ = unix.Close(d.closing)
			close(d.closed)
		})
	}
}

// Closed reports whether Close was called.
func (d *Group) Closed() bool { return d.users.Load()&1 != 0 }

// Close wakes every Poller and returns when the last call has left and the file
// descriptors are closed. It may be called more than once. wake, if it is not nil,
// wakes those who wait for something else: the first Close calls it.
func (d *Group) Close(wake func()) {
	d.users.Add(2)
	if d.users.Or(1)&1 == 0 {
		// It stays readable, so that it wakes everyone who polls, now or later.
		_, _ = unix.Write(d.closing, []byte{0: 1, 7: 0})
		if wake != nil {
			wake()
		}
	}
	d.Release()
	<-d.closed
}

// busyPoll is how long a waiting thread keeps its processor, because the next
// packet is probably near: that of a call comes after 20 ms, and a key is pressed
// after 200. After it the wait is one that the Go scheduler knows of, which has no
// end and costs an idle daemon nothing, but whose end costs the packet some 50 us:
// the runtime wakes its monitor, and that the thread again. The garbage collector
// need not wait for it: its preemption signal interrupts the system call.
const busyPoll = 250 * time.Millisecond

// Poller waits until a file descriptor has something to read, or until Close. One
// goroutine uses it.
type Poller struct {
	group   *Group
	fds     [3]unix.PollFd // the one to read, the Group's eventfd, and a EpollSet or -1
	timeout unix.Timespec
	// interrupted: a signal ended the last wait, and timeout is what was left of it.
	interrupted bool
	moderation  moderation
	successors  successors
}

// Poller makes a Poller for fd.
func (d *Group) Poller(fd int) Poller {
	return Poller{group: d, fds: [3]unix.PollFd{
		{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(d.closing), Events: unix.POLLIN}, {Fd: -1, Events: unix.POLLIN},
	}}
}

// PollSpin returns when there is something to do, or for no reason at all. gone says
// that what the file descriptor stands for is no more.
//
// Its first system call is one that the Go scheduler is not told of, so that the
// thread comes back to its goroutine without asking for a processor. With those
// of the data path that is worth a factor of 1.5 to 2 in throughput. Therefore
// GOMAXPROCS must be larger than the number of goroutines that wait so.
func (w *Poller) PollSpin() (gone bool) {
	if !w.interrupted {
		w.timeout = unix.NsecToTimespec(int64(busyPoll)) // the kernel writes the remaining time back
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.fds)), uintptr(len(w.fds)),
		uintptr(unsafe.Pointer(&w.timeout)), 0, 0, 0)
	w.interrupted = errno == unix.EINTR // as it is every 10 ms, by the monitor
	if errno == 0 && n == 0 {
		return w.PollBlock()
	}
	return errno == 0 && w.gone()
}

// PollBlock is PollSpin for one who is in no hurry.
func (w *Poller) PollBlock() (gone bool) {
	_, _, errno := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.fds)), uintptr(len(w.fds)), 0, 0, 0, 0)
	return errno == 0 && w.gone()
}

func (w *Poller) gone() bool {
	return w.fds[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0
}
