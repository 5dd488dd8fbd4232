package tun

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
	"ipipd/internal/vnet"
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

// Scratch is the memory with which any number of Queues are read and written, by one goroutine at a
// time. The zero value is ready for use; what is large is allocated when first needed.
type Scratch struct {
	splitScratch
	read      []byte // where a superpacket is read to
	coalescer coalescer
	vnetHdr   [vnet.HeaderLen]byte
	// iovecs are for one packet with its virtio_net_hdr: in three parts to read, of many
	// segments to write.
	iovecs [1 + maxTCPSegments]unix.Iovec
}

func (s *Scratch) readSpace() []byte {
	if s.read == nil {
		s.read = make([]byte, packet.MaxSize+1)
	}
	return s.read
}
