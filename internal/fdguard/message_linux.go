package fdguard

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Message is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type Message struct {
	unix.Msghdr
	N uint32 // msg_len: bytes received or sent, set by the kernel
}

// The data path uses raw system calls: the thread keeps its P instead of handing it to
// the Go scheduler. They must not block, hence MSG_DONTWAIT; see Epoll for waiting.

func recvmmsg(fd int, msgs []Message) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// Send is sendmmsg(2) with MSG_DONTWAIT. n is the number of messages sent; errno is about
// msgs[0], so n is 0 if it is set.
func Send(fd int, msgs []Message) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// maxErrors is how many receives in a row may fail before Receive gives up. Each but the
// first is followed by errorPause, so that takes a second.
const (
	maxErrors  = 1000
	errorPause = time.Millisecond
)

// transient reports whether errno is a one-shot error that says nothing about the socket:
// an ICMP error for a connected socket (icmp_err_convert, net/ipv4/icmp.c; anybody can
// forge one), or a packet dropped because virtio_net_hdr cannot describe it (EINVAL).
func transient(errno unix.Errno) bool {
	switch errno {
	case unix.EINVAL,
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENOPROTOOPT, unix.ECONNREFUSED, unix.EMSGSIZE,
		unix.EOPNOTSUPP, unix.EHOSTDOWN, unix.ENONET, unix.EPROTO:
		return true
	}
	return false
}

// Receive moderation, as with NIC interrupts: above a message rate, wait a little before
// each receive so that batches grow, because the cost per batch (system calls, a wake-up
// of the reading process) hardly depends on its size. Request-response traffic stays
// below the rate and is never delayed.
const (
	moderateAbove      = 50_000           // messages per second
	rateInterval       = time.Millisecond // over which the rate is measured
	moderateBelowBatch = 64               // larger batches need no delay
	rxDelay            = 100 * time.Microsecond
)

// moderation is a Receiver's moderation state.
type moderation struct {
	since     time.Time // start of the current rate interval
	count     int       // messages in it
	last      int       // messages in the last batch
	aboveRate bool      // in the last complete interval
}

// observe counts a batch of n messages.
func (m *moderation) observe(n int) {
	m.count += n
	m.last = n
}

// shouldDelay reports whether to delay the next receive.
func (m *moderation) shouldDelay(now time.Time) bool {
	if d := now.Sub(m.since); d >= rateInterval {
		m.aboveRate = float64(m.count) >= moderateAbove*d.Seconds()
		m.since, m.count = now, 0
	}
	return m.aboveRate && m.last < moderateBelowBatch
}
