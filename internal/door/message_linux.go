package door

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
// They do not block: see Waiter.

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
// have failed.
const maxErrors = 1000

// A thread that is woken for every few packets of a flood does little else: each time
// it takes the processor from whoever brings them, and gives it back. So does a NIC
// without interrupt moderation, and the remedy is the same: the packets gather before
// they are taken. Requests that wait for their answers come further apart than that.
const (
	floodGap  = 30 * time.Microsecond // the wait for a packet of a flood is shorter
	floodFew  = 32                    // and not so many were there the last time
	gatherFor = 100 * time.Microsecond
)

// flooded reports whether packets are to gather, after so many were taken and the next
// one was waited for that long.
func flooded(taken int, waited time.Duration) bool { return taken < floodFew && waited < floodGap }

// await waits for a message, and for more if they come in a flood. others says that
// somebody else is waited for, and there.
func (w *Waiter) await() (others bool) {
	since := time.Now()
	w.fds[2].Revents = 0
	w.Wait()
	if others = w.fds[2].Revents != 0; !others && flooded(w.taken, time.Since(since)) {
		w.timeout, w.interrupted = unix.NsecToTimespec(int64(gatherFor)), false
		unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&w.timeout)), 0, 0)
	}
	return others
}

// Receive waits until the Waiter's socket has messages and fills msgs[:n] with
// them, n > 0, or until its Lookout has something, n = 0. After Close it returns
// os.ErrClosed. An error that came to the socket from elsewhere (sk_err, such as
// ENETDOWN), or of one message that the kernel could not describe (EINVAL), is not
// the end of receiving: failed, if it is not nil, is told of it.
func (w *Waiter) Receive(msgs []Message, failed func(unix.Errno)) (n int, err error) {
	for bad := 0; ; {
		n, errno := recvmmsg(int(w.fds[0].Fd), msgs)
		switch {
		case w.door.Closed():
			return 0, os.ErrClosed
		case errno == 0:
			w.taken = n
			return n, nil
		case errno == unix.EAGAIN:
			if w.await() {
				w.taken = floodFew // what comes next may be the answer
				return 0, nil
			}
		case errno == unix.EINTR:
		default:
			if failed != nil {
				failed(errno)
			}
			if bad++; bad > maxErrors {
				return 0, os.NewSyscallError("recvmmsg", errno)
			}
		}
	}
}
