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
