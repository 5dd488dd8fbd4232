package encap

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
)

// openICMP opens the socket that hears errors about outer packets: those of
// protocol 4, and those of tunnels that are encrypted. A raw
// socket of protocol 4 with IP_RECVERR would hear them too, but it would also
// fail its next send or receive with each of them.
func openICMP() (int, error) {
	const (
		unreachable, timeExceeded = 3, 11
		headerLength              = 8 // of the ICMP header
		protocolOffset            = 9 // in the IPv4 header
	)
	// ICMP_FILTER has a bit for each type that is not wanted. It is asked before
	// the packet is cloned, so that a ping flood costs nothing.
	unwanted := ^uint32(1<<unreachable | 1<<timeExceeded)
	return newSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP,
		filter(
			// X is the length of the outer header; behind it and the ICMP header
			// is the quoted header.
			bpf.LoadMemShift{Off: 0},
			bpf.LoadIndirect{Off: headerLength + protocolOffset, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_IPIP, SkipTrue: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ESP, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 3},
			bpf.LoadIndirect{Off: headerLength + ipv4.HeaderLen, Size: 2}, // the source port: we send no options
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: portNAT, SkipTrue: 1},
			bpf.RetConstant{Val: 0xffff},
			bpf.RetConstant{Val: 0},
		),
		option(unix.SOL_RAW, unix.ICMP_FILTER, "ICMP_FILTER", int(unwanted)),
	)
}

func (s *socket) ReadError(buf []byte) (n int, err error) {
	defer s.door.Leave()
	if !s.door.Enter() {
		return 0, os.ErrClosed
	}
	for {
		n, _, err := unix.Recvfrom(s.icmp, buf, unix.MSG_DONTWAIT)
		switch {
		case s.door.Closed():
			return 0, os.ErrClosed
		case err == unix.EAGAIN:
			s.icmpWaiter.Rest()
		case err == unix.EINTR:
		case err != nil:
			return 0, os.NewSyscallError("recvfrom", err)
		default:
			return n, nil
		}
	}
}

// MinPMTU is the Floor of a PathMTU by the operator's net.ipv4.route.min_pmtu, as it
// is for what the kernel itself learns; DefaultFloor if that cannot be read.
func MinPMTU() int {
	b, err := os.ReadFile("/proc/sys/net/ipv4/route/min_pmtu")
	if err != nil {
		return DefaultFloor
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || n < MinPathMTU {
		return DefaultFloor
	}
	return n
}
