package underlay

import (
	"os"

	"golang.org/x/sys/unix"
)

// openICMP opens the socket that hears errors about outer packets: those of
// protocol 4, and those of tunnels that are encrypted. A raw
// socket of protocol 4 with IP_RECVERR would hear them too, but it would also
// fail its next send or receive with each of them.
func openICMP() (int, error) {
	const unreachable, timeExceeded = 3, 11
	// ICMP_FILTER has a bit for each type that is not wanted. It is asked before
	// the packet is cloned, so that a ping flood costs nothing.
	unwanted := ^uint32(1<<unreachable | 1<<timeExceeded)
	return newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP,
		filter(aboutOurs([4]byte{}, [4]byte{})...),
		option(unix.SOL_RAW, unix.ICMP_FILTER, "ICMP_FILTER", int(unwanted)),
	)
}

func (s *socket) ReadError(buf []byte) (n int, err error) {
	defer s.guard.Release()
	if !s.guard.Acquire() {
		return 0, os.ErrClosed
	}
	for {
		n, _, err := unix.Recvfrom(s.icmp, buf, unix.MSG_DONTWAIT)
		switch {
		case s.guard.Closed():
			return 0, os.ErrClosed
		case err == unix.EAGAIN:
			s.icmpPoller.PollBlock()
		case err == unix.EINTR:
		case err != nil:
			return 0, os.NewSyscallError("recvfrom", err)
		default:
			return n, nil
		}
	}
}
