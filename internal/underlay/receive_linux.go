package underlay

import (
	"encoding/binary"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/ipv4"
)

// Which packets each socket receives. The raw socket's Binding is matched before the kernel
// clones a packet, and so are the packet sockets' filters; a raw socket's filter is run on the
// clone.

// binding returns what the raw socket is bound and connected to.
func (r *Reception) binding() fdguard.Binding {
	return fdguard.Binding{Device: r.Device, Local: r.Local, Remote: r.Remote, Mark: r.Mark}
}

// SetReceive implements ReceiveSetter. Call it in the network namespace that the Socket was
// opened in.
func (s *socket) SetReceive(r Reception) error {
	s.receptionMu.Lock()
	defer s.receptionMu.Unlock()
	defer s.guard.Release()
	if !s.guard.Acquire() {
		return os.ErrClosed
	}
	defer s.announce()
	if r == s.reception && !s.partial {
		s.raw.Connect()
		return nil
	}
	err := s.setReceiveLocked(r)
	s.partial = err != nil
	return err
}

// setReceiveLocked switches to r. receptionMu is held, except in open. Filters are widened
// before others are narrowed, so that a packet may come twice but is not lost. On error some
// filters may be changed.
func (s *socket) setReceiveLocked(r Reception) error {
	if r.LinkLayer {
		if err := s.bindPacketSockets(); err != nil {
			return err
		}
	}
	if err := s.raw.Change(r.binding(), func(raw int) error { return s.setFilters(raw, &r) }); err != nil {
		return err
	}
	s.reception = r
	return nil
}

// setFilters sets the filters for r, where raw is the raw socket that receives from now on.
func (s *socket) setFilters(raw int, r *Reception) error {
	if err := detachFilter(raw); err != nil {
		return err
	}
	setRawFilter, setPacketFilter := detachFilter, dropAll
	if r.LinkLayer {
		setRawFilter, setPacketFilter = attachFilter(rawFilter(r.LinkDevice)...), attachFilter(packetFilter(r)...)
	}
	for _, fd := range s.packetSockets {
		if err := setPacketFilter(fd); err != nil {
			return err
		}
	}
	time.Sleep(batchDelivery)
	if err := setRawFilter(raw); err != nil {
		return err
	}
	return attachFilter(icmpErrorFilter(r.Local, r.Remote)...)(s.icmp)
}

// batchDelivery is longer than the kernel takes to deliver a NAPI batch. It shows a whole batch
// (netif_receive_skb_list) to the packet sockets before the raw sockets: a packet that the former
// rejected by their old filter must not meet the latter's new one. Of a flood over 50,400 changes,
// 1 packet was lost with it and 23 without; meanwhile packets come twice.
const batchDelivery = 100 * time.Microsecond

// networkHeader is SKF_NET_OFF: offsets from it count from the network header. Not every
// interface has an Ethernet header.
const networkHeader = 1<<32 - 0x100000

// program is a socket filter under construction: each require adds a condition.
type program []bpf.Instruction

// require drops packets for which what does not load value.
func (p program) require(what bpf.Instruction, value uint32) program {
	return append(p, what,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: value, SkipTrue: 1},
		bpf.RetConstant{Val: 0})
}

// requireAddress compares four bytes with a, in network byte order; zero matches any address.
func (p program) requireAddress(what bpf.Instruction, a [4]byte) program {
	if a == [4]byte{} {
		return p
	}
	return p.require(what, binary.BigEndian.Uint32(a[:]))
}

// accept, as a filter's result, keeps the whole packet.
const accept = 1 << 18

// packetFilter is the filter of the packet sockets: protocol-4 packets to this host, by the
// interface and between the addresses of r.
func packetFilter(r *Reception) []bpf.Instruction {
	p := program{}.
		require(bpf.LoadExtension{Num: bpf.ExtType}, unix.PACKET_HOST).
		require(bpf.LoadAbsolute{Off: networkHeader + 9, Size: 1}, unix.IPPROTO_IPIP)
	// Unlike a bind, a filter survives the removal of the interface.
	if r.LinkDevice != 0 {
		p = p.require(bpf.LoadExtension{Num: bpf.ExtInterfaceIndex}, uint32(r.LinkDevice))
	}
	p = p.requireAddress(bpf.LoadAbsolute{Off: networkHeader + 12, Size: 4}, r.Remote)
	p = p.requireAddress(bpf.LoadAbsolute{Off: networkHeader + 16, Size: 4}, r.Local)
	return append(p, bpf.RetConstant{Val: accept})
}

// rawFilter is the filter of the raw socket beside packetFilter: all packets that the packet
// sockets do not receive.
func rawFilter(device int) []bpf.Instruction {
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

// icmpErrorFilter is the filter of the ICMP socket: errors that quote an outer packet from local
// to remote, encrypted or not; zero is any address.
func icmpErrorFilter(local, remote [4]byte) []bpf.Instruction {
	const (
		quoted      = ipv4.ICMPHeaderLen // the quoted packet, from the ICMP header
		protocol    = quoted + ipv4.OffProtocol
		source      = quoted + ipv4.OffSource
		destination = quoted + ipv4.OffDestination
	)
	// X is the length of the message's IPv4 header.
	p := program{bpf.LoadMemShift{Off: 0}}
	p = p.requireAddress(bpf.LoadIndirect{Off: source, Size: 4}, local)
	p = p.requireAddress(bpf.LoadIndirect{Off: destination, Size: 4}, remote)
	return append(p,
		bpf.LoadIndirect{Off: protocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_IPIP, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ESP, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 3},
		bpf.LoadIndirect{Off: quoted + ipv4.HeaderLen, Size: 2}, // UDP source port: no outer options
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: ipv4.PortNATT, SkipTrue: 1},
		bpf.RetConstant{Val: 0xffff},
		bpf.RetConstant{Val: 0},
	)
}

// dropAll is a set-up step: a filter that drops every packet.
var dropAll = attachFilter(bpf.RetConstant{Val: 0})

// detachFilter removes the filter, so that the socket receives everything. A filter that accepts
// everything would cost a run per packet.
func detachFilter(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	if err == unix.ENOENT { // there is none
		return nil
	}
	return os.NewSyscallError("setsockopt SO_DETACH_FILTER", err)
}
