package underlay

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/packet"
)

// openRaw opens a protocol-4 socket for a selection, and notes it as one that receives.
// Its filter drops everything. unselected is what Selection.Select did not get done.
func (s *socket) openRaw(sel fdguard.Selection) (fd int, unselected bool, err error) {
	// If this buffer is full the kernel answers protocol unreachable (ICMP 3/2)
	// to the peer, unless it has a protocol-4 handler of its own.
	fd, err = newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IPIP, dropAll, receives(s.options.ReceiveBuffer),
		// Else the kernel learns a path MTU from each ICMP 3/4 that quotes protocol 4,
		// a forged one as well, and fragments by it what openFragmenting's socket sends. Which to
		// believe is PathMTU's business.
		option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_INTERFACE),
		func(fd int) error {
			selected, err := sel.Select(fd)
			unselected = !selected
			return err
		})
	if err != nil {
		return -1, false, err
	}
	fdguard.Drain(fd) // of what came between socket and dropAll, from anybody
	s.opened(fd)
	return fd, unselected, nil
}

// rawReceiver receives from the protocol-4 socket: outer packets whole, but
// nothing about inner checksums or segments.
type rawReceiver struct {
	watch
	poller fdguard.Poller
	failed func(unix.Errno) // made once, so that a Read allocates nothing
	msgs   []fdguard.Message
	iovs   []unix.Iovec
}

func newRawReceiver(w watch, fd int) *rawReceiver {
	r := &rawReceiver{watch: w, poller: w.socket.guard.Poller(fd), failed: w.socket.failed}
	r.poller.Watch(w.others)
	return r
}

func (r *rawReceiver) Read(batch []*packet.Buffer) (n int, err error) {
	defer r.socket.guard.Release()
	if !r.socket.guard.Acquire() {
		return 0, os.ErrClosed
	}
	r.grow(len(batch))
	for i, b := range batch {
		space := b.Space()
		r.iovs[i].Base = unsafe.SliceData(space)
		r.iovs[i].SetLen(len(space))
	}
	n, err = r.poller.Receive(r.msgs[:len(batch)], r.failed)
	for i := range n {
		// Of a packet larger than the Buffer the kernel gave the first bytes
		// (MSG_TRUNC). Its header says more than is there: ParseOuter refuses it.
		batch[i].SetLen(int(r.msgs[i].N))
	}
	return n, err
}

func (r *rawReceiver) grow(n int) {
	if n <= len(r.msgs) {
		return
	}
	r.msgs, r.iovs = make([]fdguard.Message, n), make([]unix.Iovec, n)
	for i := range r.msgs {
		r.msgs[i].Iov = &r.iovs[i]
		r.msgs[i].SetIovlen(1)
	}
}

// failed counts what the kernel could not describe.
func (s *socket) failed(errno unix.Errno) {
	if errno == unix.EINVAL {
		s.undescribed.Add(1)
	}
}

// socketDrops is the kernel's count of packets that a full receive buffer cost.
func socketDrops(fd int) (uint32, error) {
	const (
		skMeminfoDrops = 8 // SK_MEMINFO_DROPS
		skMeminfoVars  = 9
	)
	var info [skMeminfoVars]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, os.NewSyscallError("getsockopt SO_MEMINFO", errno)
	}
	return info[skMeminfoDrops], nil
}
