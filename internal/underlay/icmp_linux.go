package underlay

import (
	"os"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
)

// openICMP opens the socket for ICMP errors about outer packets, encrypted ones too. A
// protocol-4 socket with IP_RECVERR would get them as well, but each would also fail its next
// send or receive.
func openICMP() (int, error) {
	// A set bit of ICMP_FILTER discards that type. The kernel tests it before it clones the
	// packet, so a ping flood costs nothing.
	unwanted := ^uint32(1<<ipv4.ICMPUnreachable | 1<<ipv4.ICMPTimeExceeded)
	return newSocket(unix.AF_INET, unix.IPPROTO_ICMP,
		attachFilter(icmpErrorFilter([4]byte{}, [4]byte{})...),
		sockopt(unix.SOL_RAW, unix.ICMP_FILTER, "ICMP_FILTER", int(unwanted)),
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
			fdguard.Wait(s.icmp)
		case err == unix.EINTR:
		case err != nil:
			return 0, os.NewSyscallError("recvfrom", err)
		default:
			return n, nil
		}
	}
}
