package underlay

import (
	"encoding/binary"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
)

// Which packets come to which socket. The raw socket's Selection is asked before the
// kernel copies a packet, and so are the filters of the packet sockets; the filter of a
// raw socket is asked of the copy.

// selection is what the raw socket is to be given.
func (r *Reception) selection() fdguard.Selection {
	return fdguard.Selection{Device: r.Device, Local: r.Local, Remote: r.Remote, Mark: r.Mark}
}

// SetReceive implements ReceiveSetter. It has to be called in the network namespace that
// the Socket was opened in.
func (s *socket) SetReceive(r Reception) error {
	s.switching.Lock()
	defer s.switching.Unlock()
	defer s.guard.Release()
	if !s.guard.Acquire() {
		return os.ErrClosed
	}
	if r == s.reception {
		sel := r.selection()
		s.unselected = s.unselected && !sel.Connect(s.raw)
		return nil
	}
	return s.receive(r)
}

// receive does the work of SetReceive. What is to receive is opened before what is to
// receive no more is shut, so that a packet may come twice but is not lost.
func (s *socket) receive(r Reception) (err error) {
	if r.LinkLayer && s.packets == nil {
		if err := s.openPackets(); err != nil {
			return err
		}
	}
	raw, unselected, fresh := s.raw, s.unselected, r.selection() != s.reception.selection()
	if fresh {
		if raw, unselected, err = s.openRaw(r.selection()); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				s.retire(raw)
			}
		}()
	}
	if err := takeAll(raw); err != nil {
		return err
	}
	fromRaw, fromPackets := takeAll, dropAll
	if r.LinkLayer {
		fromRaw, fromPackets = filter(exceptFromLink(r.LinkDevice)...), filter(fromLink(&r)...)
	}
	for _, fd := range s.packets {
		if err := fromPackets(fd); err != nil {
			return err
		}
	}
	if err := fromRaw(raw); err != nil {
		return err
	}
	if err := filter(aboutOurs(r.Local, r.Remote)...)(s.icmp); err != nil {
		return err
	}
	if fresh {
		old := s.raw
		if err := s.rawReceiver.poller.Succeed(old, raw, func() { s.retire(old) }); err != nil {
			return err
		}
	}
	s.raw, s.unselected, s.reception = raw, unselected, r
	return nil
}

// networkHeader is SKF_NET_OFF, from which offsets count from the network header: not
// every interface has an Ethernet header in front of it.
const networkHeader = 1<<32 - 0x100000

// program is a filter in the making: each is adds a condition without which a packet is
// dropped.
type program []bpf.Instruction

func (p program) is(what bpf.Instruction, value uint32) program {
	return append(p, what,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: value, SkipTrue: 1},
		bpf.RetConstant{Val: 0})
}

// address compares four bytes; one that is zero stands for any.
func (p program) address(what bpf.Instruction, a [4]byte) program {
	if a == [4]byte{} {
		return p
	}
	return p.is(what, binary.BigEndian.Uint32(a[:]))
}

// accept is the whole packet.
const accept = 1 << 18

// fromLink is the filter of the packet sockets: protocol-4 packets for this host, by the
// interface and between the addresses of r.
func fromLink(r *Reception) []bpf.Instruction {
	p := program{}.
		is(bpf.LoadExtension{Num: bpf.ExtType}, unix.PACKET_HOST).
		is(bpf.LoadAbsolute{Off: networkHeader + 9, Size: 1}, unix.IPPROTO_IPIP)
	// A filter does not fail with the interface, as a bind to it would.
	if r.LinkDevice != 0 {
		p = p.is(bpf.LoadExtension{Num: bpf.ExtInterfaceIndex}, uint32(r.LinkDevice))
	}
	p = p.address(bpf.LoadAbsolute{Off: networkHeader + 12, Size: 4}, r.Remote)
	p = p.address(bpf.LoadAbsolute{Off: networkHeader + 16, Size: 4}, r.Local)
	return append(p, bpf.RetConstant{Val: accept})
}

// exceptFromLink is the filter of the raw socket beside that of fromLink: what is for it
// by its addresses, and is not taken there.
func exceptFromLink(device int) []bpf.Instruction {
	p := program{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_HOST, SkipTrue: 1},
		bpf.RetConstant{Val: accept},
	}
	if device != 0 {
		p = append(p,
			bpf.LoadExtension{Num: bpf.ExtInterfaceIndex},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(device), SkipTrue: 1},
			bpf.RetConstant{Val: accept})
	}
	return append(p, bpf.RetConstant{Val: 0})
}

// aboutOurs is the filter of the ICMP socket: errors that quote a packet as tunnels from
// local to remote send it, plain or encrypted; zero stands for any address.
func aboutOurs(local, remote [4]byte) []bpf.Instruction {
	const (
		quoted      = 8 // behind the ICMP header
		protocol    = quoted + 9
		source      = quoted + 12
		destination = quoted + 16
	)
	// X is the length of the outer header.
	p := program{bpf.LoadMemShift{Off: 0}}
	p = p.address(bpf.LoadIndirect{Off: source, Size: 4}, local)
	p = p.address(bpf.LoadIndirect{Off: destination, Size: 4}, remote)
	return append(p,
		bpf.LoadIndirect{Off: protocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_IPIP, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ESP, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 3},
		bpf.LoadIndirect{Off: quoted + ipv4.HeaderLen, Size: 2}, // the source port: we send no options
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: ipv4.PortNATT, SkipTrue: 1},
		bpf.RetConstant{Val: 0xffff},
		bpf.RetConstant{Val: 0},
	)
}

// dropAll receives nothing.
var dropAll = filter(bpf.RetConstant{Val: 0})

// takeAll receives everything: without a filter, which would be run for each packet to
// say so.
func takeAll(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	if err == unix.ENOENT { // there is none
		return nil
	}
	return os.NewSyscallError("setsockopt SO_DETACH_FILTER", err)
}
