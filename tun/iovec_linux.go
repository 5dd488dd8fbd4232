package tun

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The data path uses raw system calls: the thread keeps its P instead of handing it to the
// Go scheduler. They must not block, hence O_NONBLOCK.

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

// setIovec points iov at b.
func setIovec(iov *unix.Iovec, b []byte) {
	iov.Base = unsafe.SliceData(b)
	iov.SetLen(len(b))
}

// iovecs is for one packet with its virtio_net_hdr: in three parts to read, of many segments to
// write.
type iovecs [1 + maxTCPSegments]unix.Iovec
