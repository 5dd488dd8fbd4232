package fdguard

import (
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// busyPoll is how long a thread waits without telling the Go scheduler. Waking through
// the scheduler costs about 50 us (sysmon has to wake first), so wait longer than the
// gaps of interactive traffic: 20 ms for voice, 200 ms for typing. Then block normally:
// an idle daemon costs nothing. Garbage collection is not held up, its preemption signal
// interrupts epoll_pwait.
const busyPoll = 250 * time.Millisecond

// Epoll is an epoll(7) instance. One goroutine at a time calls Wait or Poll; the other
// methods are safe for concurrent use.
type Epoll struct {
	fd     int
	events [64]unix.EpollEvent
	// interrupted: Wait returned early; until is when it stops holding the P.
	interrupted bool
	until       time.Time
}

// NewEpoll returns an empty set; the caller closes it with Close.
func NewEpoll() (*Epoll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &Epoll{fd: fd}, nil
}

// FD returns the set's own descriptor, which is readable while one of the set is. It can be
// in another set.
func (e *Epoll) FD() int { return e.fd }

// Add watches fd for EPOLLIN, level-triggered. The caller must keep fd open during the call;
// closing it later removes it from the set.
func (e *Epoll) Add(fd int, key int32) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd), Pad: key}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, fd, &event))
}

// Remove stops watching fd.
func (e *Epoll) Remove(fd int) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(e.fd, unix.EPOLL_CTL_DEL, fd, nil))
}

// Wait waits for events (EPOLLIN, EPOLLERR or EPOLLHUP) and returns them, valid until the next
// call: Fd is the descriptor, Pad its key. It may return early with none. It waits for
// busyPoll without telling the Go scheduler, then blocks as other system calls do.
//
// The raw system call keeps the thread's P: together with the raw calls of the data path
// that is worth a factor of 1.5 to 2 in throughput. GOMAXPROCS must exceed the number of
// goroutines in Wait.
func (e *Epoll) Wait() []unix.EpollEvent {
	left := busyPoll
	if e.interrupted {
		left = time.Until(e.until)
	}
	if left > 0 {
		n, errno := e.rawWait(int(left.Milliseconds()) + 1)
		if errno == unix.EINTR { // every 10 ms: sysmon preempts a P that long in one goroutine
			if !e.interrupted {
				e.interrupted, e.until = true, time.Now().Add(busyPoll)
			}
			return nil
		}
		if n > 0 {
			e.interrupted = false
			return e.events[:n]
		}
	}
	e.interrupted = false
	n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd), uintptr(unsafe.Pointer(&e.events)), uintptr(len(e.events)), ^uintptr(0), 0, 0)
	if errno != 0 {
		return nil
	}
	return e.events[:n]
}

// Poll is Wait without waiting.
func (e *Epoll) Poll() []unix.EpollEvent {
	n, _ := e.rawWait(0)
	return e.events[:n]
}

func (e *Epoll) rawWait(milliseconds int) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd), uintptr(unsafe.Pointer(&e.events)), uintptr(len(e.events)),
		uintptr(milliseconds), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// Close closes the epoll descriptor.
func (e *Epoll) Close() error { return unix.Close(e.fd) }
