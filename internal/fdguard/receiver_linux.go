package fdguard

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Receiver receives messages from a socket that another one can replace while it is in use (see
// RawSocket). One goroutine at a time calls Receive; the other methods are safe for concurrent
// use. It opens and closes nothing.
type Receiver struct {
	fd       int // changed by Receive
	failures int // receives in a row that failed

	pending atomic.Bool // next is not empty
	mu      sync.Mutex  // guards the rest
	next    []replacement
	latest  int                // the last socket given
	opened  func(fd int) error // nil: none yet
}

type replacement struct {
	fd      int
	retired func()
}

// NewReceiver returns a Receiver on the socket fd.
func NewReceiver(fd int) *Receiver { return &Receiver{fd: fd, latest: fd} }

// Watch calls opened with the socket, and with each later one before Receive reads from that.
// opened must not block.
func (r *Receiver) Watch(opened func(fd int) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = opened
	return opened(r.latest)
}

// Replace makes Receive switch from the socket old to fd once old's receive queue is empty,
// and then call retired, which may close old. old stops receiving now; the caller keeps it
// open until retired is called.
func (r *Receiver) Replace(old, fd int, retired func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.opened != nil {
		if err := r.opened(fd); err != nil {
			return err
		}
	}
	dropAll := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	if err := unix.SetsockoptSockFprog(old, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &dropAll}); err != nil {
		return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
	}
	Interrupt(old) // makes it readable; queued messages can still be read
	r.latest = fd
	r.next = append(r.next, replacement{fd, retired})
	r.pending.Store(true)
	return nil
}

// advance switches to the next socket, and reports whether there was one.
func (r *Receiver) advance() bool {
	if !r.pending.Load() {
		return false
	}
	r.mu.Lock()
	next := r.next[0]
	r.next = r.next[1:]
	r.pending.Store(len(r.next) > 0)
	r.mu.Unlock()
	r.fd = next.fd
	next.retired()
	return true
}

// Receive fills msgs[:n] with the messages that the socket has, without waiting for any. onError,
// if it is not nil, is called with each error of recvmmsg, such as ENETDOWN of sk_err. Receive
// fails only after more than maxErrors in a row that are not transient.
func (r *Receiver) Receive(msgs []Message, onError func(unix.Errno)) (n int, err error) {
	for {
		n, errno := recvmmsg(r.fd, msgs)
		switch errno {
		case 0:
			r.failures = 0
			return n, nil
		case unix.EAGAIN:
			r.failures = 0
			if !r.advance() {
				return 0, nil
			}
			continue
		case unix.EINTR:
			continue
		}
		if onError != nil {
			onError(errno)
		}
		if transient(errno) {
			continue
		}
		if r.failures++; r.failures > maxErrors {
			return 0, os.NewSyscallError("recvmmsg", errno)
		}
		if r.failures > 1 {
			delay(errorPause)
		}
		return 0, nil
	}
}
