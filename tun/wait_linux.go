package tun

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the data path are raw ones: the Go scheduler is not told,
// so that the thread comes back to its goroutine without asking for a processor.
// They do not block: see door.Poller.

func readv(fd int, iov []unix.Iovec) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

func writev(fd int, iov []unix.Iovec) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return errno
}

// setIovec makes iov stand for b.
func setIovec(iov *unix.Iovec, b []byte) {
	iov.Base = unsafe.SliceData(b)
	iov.SetLen(len(b))
}
