package fdguard

import (
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Message is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type Message struct {
	unix.Msghdr
	N uint32 // bytes of the message, set by the kernel
}

// The system calls of the data path are raw ones: the Go scheduler is not told,
// so that the thread comes back to its goroutine without asking for a processor.
// They do not block: see Poller.

func recvmmsg(fd int, msgs []Message) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// Send hands messages to the kernel, and returns how many it took.
func Send(fd int, msgs []Message) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// maxErrors is how many receives in a row may fail before the socket is taken to
// have failed. Each but the first is followed by errorPause: together a second.
const (
	maxErrors  = 1000
	errorPause = time.Millisecond
)

// passing reports whether an error says nothing about the socket, and is gone once it
// is told: what ICMP said of a packet from the address of a connected socket to that it
// is connected to (icmp_err_convert of Linux; anybody can have sent it), or that the
// kernel had a message that it could not describe (EINVAL), which it has thrown away.
func passing(errno unix.Errno) bool {
	switch errno {
	case unix.EINVAL,
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENOPROTOOPT, unix.ECONNREFUSED, unix.EMSGSIZE,
		unix.EOPNOTSUPP, unix.EHOSTDOWN, unix.ENONET, unix.EPROTO:
		return true
	}
	return false
}

// A thread that takes the packets of a flood as fast as they come takes a few at a time,
// and does as much for those as for many: system calls, a superpacket for the host's TCP,
// a wake-up of whoever reads, who then has that processor no more. So does a NIC without
// adaptive interrupt moderation, and the remedy is the same: above a certain rate packets
// shouldDelay before they are taken. Requests that wait for their answers are below it.
const (
	moderateAbove      = 50_000 // messages a second
	rateOver           = time.Millisecond
	moderateBelowBatch = 64 // and not so many were there the last time
	rxUsecs            = 100 * time.Microsecond
)

// moderation is what a Poller remembers for that.
type moderation struct {
	since time.Time // when counting began
	count int       // messages since then
	last  int       // messages that were taken the last time
	flood bool      // what the last count showed
}

// observe counts n messages.
func (m *moderation) observe(n int) {
	m.count += n
	m.last = n
}

// shouldDelay reports whether the next messages are to gather.
func (m *moderation) shouldDelay(now time.Time) bool {
	if d := now.Sub(m.since); d >= rateOver {
		m.flood = float64(m.count) >= moderateAbove*d.Seconds()
		m.since, m.count = now, 0
	}
	return m.flood && m.last < moderateBelowBatch
}

// delay lets messages gather, or an error go away.
func (w *Poller) delay(d time.Duration) {
	w.timeout, w.interrupted = unix.NsecToTimespec(int64(d)), false
	unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&w.timeout)), 0, 0)
}

// Receive waits until the Poller's socket has messages and fills msgs[:n] with
// them, n > 0, or until its EpollSet has something, n = 0. After Close it returns
// os.ErrClosed. An error that came to the socket from elsewhere (sk_err, such as
// ENETDOWN), or of one message that the kernel could not describe (EINVAL), is not
// the end of receiving: failed, if it is not nil, is told of it.
func (w *Poller) Receive(msgs []Message, failed func(unix.Errno)) (n int, err error) {
	if w.moderation.shouldDelay(time.Now()) {
		w.delay(rxUsecs)
	}
	for bad := 0; ; {
		n, errno := recvmmsg(int(w.fds[0].Fd), msgs)
		switch {
		case w.group.Closed():
			return 0, os.ErrClosed
		case errno == 0:
			w.moderation.observe(n)
			return n, nil
		case errno == unix.EAGAIN:
			bad = 0
			if w.succeed() {
				continue
			}
			w.fds[2].Revents = 0
			if w.PollSpin(); w.fds[2].Revents != 0 {
				return 0, nil
			}
		case errno == unix.EINTR:
		default:
			if failed != nil {
				failed(errno)
			}
			if passing(errno) {
				continue
			}
			if bad++; bad > maxErrors {
				return 0, os.NewSyscallError("recvmmsg", errno)
			}
			if bad > 1 {
				w.delay(errorPause)
			}
		}
	}
}
