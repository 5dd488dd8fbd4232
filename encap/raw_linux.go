package encap

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/door"
	"ipipd/internal/packet"
)

// openRaw opens the protocol-4 socket.
func openRaw(o SocketOptions) (int, error) {
	// If this buffer is full the kernel answers protocol unreachable (ICMP 3/2)
	// to the peer, unless it has a protocol-4 handler of its own.
	return newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IPIP, dropAll, receives(o.ReceiveBuffer))
}

// rawReceiver receives from the protocol-4 socket: outer packets whole, but
// nothing about inner checksums or segments.
type rawReceiver struct {
	socket *socket
	fd     int
	waiter door.Waiter
	msgs   []mmsghdr
	iovs   []unix.Iovec
}

func newRawReceiver(s *socket, fd int) *rawReceiver {
	return &rawReceiver{socket: s, fd: fd, waiter: s.door.Waiter(fd)}
}

func (r *rawReceiver) Read(batch []*packet.Buffer) (n int, err error) {
	defer r.socket.door.Leave()
	if !r.socket.door.Enter() {
		return 0, os.ErrClosed
	}
	r.grow(len(batch))
	for i, b := range batch {
		space := b.Space()
		r.iovs[i].Base = unsafe.SliceData(space)
		r.iovs[i].SetLen(len(space))
	}
	n, err = receive(r.socket, r.fd, &r.waiter, r.msgs[:len(batch)])
	for i := range n {
		// Of a packet larger than the Buffer the kernel gave the first bytes
		// (MSG_TRUNC). Its header says more than is there: ParseOuter refuses it.
		batch[i].SetLen(int(r.msgs[i].n))
	}
	return n, err
}

func (r *rawReceiver) grow(n int) {
	if n <= len(r.msgs) {
		return
	}
	r.msgs, r.iovs = make([]mmsghdr, n), make([]unix.Iovec, n)
	for i := range r.msgs {
		r.msgs[i].Iov = &r.iovs[i]
		r.msgs[i].SetIovlen(1)
	}
}

// badPackets is how many packets in a row may fail to be received before the
// socket is taken to have failed.
const badPackets = 1000

// receive fills msgs[:n], n > 0, or fails. An error that came to the socket from
// elsewhere (sk_err, such as ENETDOWN), or a packet that the kernel could not
// describe (EINVAL), is not the end of receiving.
func receive(s *socket, fd int, w *door.Waiter, msgs []mmsghdr) (n int, err error) {
	for bad := 0; ; {
		n, errno := recvmmsg(fd, msgs)
		switch {
		case s.door.Closed():
			return 0, os.ErrClosed
		case errno == 0:
			return n, nil
		case errno == unix.EAGAIN:
			w.Wait()
		case errno == unix.EINTR:
		default:
			if errno == unix.EINVAL {
				s.undescribed.Add(1)
			}
			if bad++; bad > badPackets {
				return 0, os.NewSyscallError("recvmmsg", errno)
			}
		}
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
