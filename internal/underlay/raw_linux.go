package underlay

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/packet"
)

// openRaw opens a protocol-4 socket with a filter that drops everything, and adds it to the
// receive sockets.
func (s *socket) openRaw() (fd int, err error) {
	// If its receive buffer is full, the kernel answers the peer with ICMP 3/2, unless it has a
	// protocol-4 handler of its own.
	fd, err = newSocket(unix.AF_INET, unix.IPPROTO_IPIP, dropAll, rcvbuf(s.options.ReceiveBuffer),
		// Otherwise the kernel learns a path MTU from each ICMP 3/4 that quotes protocol 4,
		// forged ones too, and fragments by it what the fragmenting socket sends. PathMTU
		// decides which messages to believe.
		sockopt(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_INTERFACE))
	if err != nil {
		return -1, err
	}
	s.addReceiveSocket(fd)
	return fd, nil
}

// rawReceiver receives outer packets from the protocol-4 socket. There is no offload metadata:
// DeriveOffload recovers what it can.
type rawReceiver struct {
	socket   *socket
	messages *fdguard.Receiver
	onError  func(unix.Errno) // method value made once: making one allocates
	msgs     []fdguard.Message
	iovs     []unix.Iovec
}

func (r *rawReceiver) Watch(opened func(fd int) error) error { return r.messages.Watch(opened) }

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
	n, err = r.messages.Receive(r.msgs[:len(batch)], r.onError)
	for i := range n {
		// A truncated packet (MSG_TRUNC) needs no check here: ParseOuter drops a packet shorter
		// than its total length.
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

// countVnetHdrError counts the packets that failed because virtio_net_hdr cannot describe them
// (EINVAL).
func (s *socket) countVnetHdrError(errno unix.Errno) {
	if errno == unix.EINVAL {
		s.vnetHdrErrors.Add(1)
	}
}

// socketDrops returns the kernel's count of packets dropped because the receive buffer was full,
// modulo 2^32.
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
