package underlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/privileged"
)

// socket is the Socket of Linux. Its file descriptors:
//
//	raw            protocol 4. Receives what the packet sockets do not. While they
//	               receive everything it stays open, so that the kernel does not answer
//	               ICMP 3/2. A spare stands by.
//	icmp           receives ICMP errors.
//	hdrincl        sends packets with their own outer header (IP_HDRINCL).
//	fragmenting    sends packets that the kernel has to fragment.
//	link           sends Ethernet frames; -1 where AF_PACKET is refused.
//	packetSockets  AF_PACKET, one for each packetReceiver; bound by the first
//	               SetReceive with LinkLayer.
//
// All are opened at first, so that no change needs another one.
//
// The sockets that only send are opened so that they receive nothing: the kernel would clone
// each packet to every raw socket of its protocol before it runs the socket's filter.
type socket struct {
	guard                            *fdguard.Group
	icmp, hdrincl, fragmenting, link int
	packetSockets                    []int
	protocolCmsg                     bool // hdrincl accepts IP_PROTOCOL as a control message
	receivers                        []Receiver
	options                          SocketOptions

	receptionMu  sync.Mutex // guards the fields up to partial
	raw          *fdguard.RawSocket
	packetsBound int // how many of packetSockets are bound, and in fanoutGroup
	fanoutGroup  int
	reception    Reception
	partial      bool // setReceiveLocked has failed since: filters may differ from reception

	// receiveSockets are the sockets that receive, the spare of raw, and former raw sockets that
	// still have packets queued.
	overflowMu     sync.Mutex // guards receiveSockets and overflows
	receiveSockets []*dropCounter
	overflows      uint64 // read so far, closed sockets included
	// vnetHdrErrors counts packets that the kernel dropped because virtio_net_hdr cannot
	// describe them.
	vnetHdrErrors atomic.Uint64
}

const (
	defaultReceiveBuffer = 8 << 20
	// sendBufferSize holds a batch of 64 KiB packets. Queueing is left to the interface.
	sendBufferSize = 4 << 20
	// routedBufferSize is the buffer of the sockets that the kernel routes. Packets that wait for an ARP reply
	// count, up to unres_qlen_bytes (208 KiB) a neighbor. The neighbor table (gc_thresh3, 1024) is full before
	// the buffer is, so that dead neighbors do not stop the packets to others. It is a limit, not memory.
	routedBufferSize = 256 << 20
)

// OpenSocket opens the sockets in the network namespace of the calling thread. It needs
// CAP_NET_RAW; with CAP_NET_ADMIN the buffers may exceed the system's limits.
func OpenSocket(o SocketOptions) (Socket, error) {
	s := &socket{icmp: -1, hdrincl: -1, fragmenting: -1, link: -1}
	s.guard = fdguard.New(func() { fdguard.Interrupt(s.icmp) }, s.closeAll)
	if err := s.open(o); err != nil {
		s.Close()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("the raw sockets need CAP_NET_RAW: %s: %w", privileged.Remedy, err)
		}
		return nil, err
	}
	return s, nil
}

func (s *socket) open(o SocketOptions) (err error) {
	if o.ReceiveBuffer == 0 {
		o.ReceiveBuffer = defaultReceiveBuffer
	}
	s.options = o
	for _, fd := range o.Adopt {
		s.receiveSockets = append(s.receiveSockets, &dropCounter{fd: fd, announced: true})
	}
	if s.icmp, err = openICMP(); err != nil {
		return err
	}
	if s.hdrincl, err = openHdrincl(); err != nil {
		return err
	}
	s.protocolCmsg = supportsProtocolCmsg(s.hdrincl)
	if s.fragmenting, err = openFragmenting(); err != nil {
		return err
	}
	receivers := max(o.Receivers, 1)
	switch s.link, err = openLink(); {
	case errors.Is(err, unix.EAFNOSUPPORT):
		receivers = 0
	case err != nil:
		return err
	}
	raws, packets := s.adopt(o.Adopt, receivers)
	if s.raw, err = fdguard.OpenRaw(raws, s.openRaw, s.closeReceiveSocket); err != nil {
		return err
	}
	s.receivers = []Receiver{&rawReceiver{socket: s, messages: s.raw.Receiver, onError: s.countVnetHdrError}}
	for len(packets) < receivers {
		fd, err := s.openPacket()
		if err != nil {
			return err
		}
		s.addReceiveSocket(fd)
		packets = append(packets, fd)
	}
	s.packetSockets = packets
	for _, fd := range packets {
		s.receivers = append(s.receivers, &packetReceiver{socket: s, messages: fdguard.NewReceiver(fd), onError: s.countVnetHdrError})
	}
	defer s.announce()
	if len(raws) > 0 {
		s.partial = true // the filters are those of the process before
		return nil
	}
	return s.setReceiveLocked(Reception{LinkLayer: o.PacketReceive, LinkDevice: o.Device, Device: o.Device})
}

func (s *socket) Receivers() []Receiver { return s.receivers }

func (s *socket) PacketSockets() bool { return s.link >= 0 }

func (s *socket) Close() error {
	s.guard.Close()
	return nil
}

func (s *socket) closeAll() {
	for _, o := range s.receiveSockets {
		_ = unix.Close(o.fd)
	}
	for _, fd := range []int{s.icmp, s.hdrincl, s.fragmenting, s.link} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// dropCounter is a receive socket with the kernel's drop count when it was last read.
type dropCounter struct {
	fd        int
	last      uint32
	announced bool // to SocketOptions.Opened
}

// addReceiveSocket takes ownership of fd: closeReceiveSocket or Close closes it.
func (s *socket) addReceiveSocket(fd int) {
	s.overflowMu.Lock()
	defer s.overflowMu.Unlock()
	s.receiveSockets = append(s.receiveSockets, &dropCounter{fd: fd})
}

// closeReceiveSocket adds the drops of fd to overflows and closes it.
func (s *socket) closeReceiveSocket(fd int) {
	s.overflowMu.Lock()
	defer s.overflowMu.Unlock()
	s.receiveSockets = slices.DeleteFunc(s.receiveSockets, func(o *dropCounter) bool {
		if o.fd != fd {
			return false
		}
		s.overflows += o.delta()
		if o.announced && s.options.Closed != nil {
			s.options.Closed(fd)
		}
		_ = unix.Close(fd)
		return true
	})
}

func (s *socket) Overflows() uint64 {
	s.overflowMu.Lock()
	defer s.overflowMu.Unlock()
	defer s.guard.Release()
	if s.guard.Acquire() { // after Close: the last count
		for _, o := range s.receiveSockets {
			s.overflows += o.delta()
		}
	}
	return s.overflows + s.vnetHdrErrors.Load()
}

// delta returns the packets dropped since the last call; 0 on error.
func (o *dropCounter) delta() uint64 {
	drops, err := socketDrops(o.fd)
	if err != nil {
		return 0
	}
	delta := drops - o.last // modulo 2^32
	o.last = drops
	return uint64(delta)
}

// newSocket opens a close-on-exec raw socket and runs the set-up steps; it closes the socket if one
// of them fails.
func newSocket(domain, protocol int, setUp ...func(fd int) error) (int, error) {
	var fd int
	var err error
	if domain == unix.AF_INET {
		fd, err = privileged.RawSocket(protocol)
	} else {
		fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		err = os.NewSyscallError("socket", err)
	}
	if err != nil {
		return -1, err
	}
	for _, step := range setUp {
		if err := step(fd); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	noteOwn(fd)
	return fd, nil
}

// sockopt is a set-up step: setsockopt with an int.
func sockopt(level, name int, what string, value int) func(int) error {
	return func(fd int) error {
		return os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
	}
}

// bufferSize is a set-up step: the size of a socket buffer in bytes. force is the option that
// needs CAP_NET_ADMIN; limited is its fallback, capped by the system's limit.
func bufferSize(force, limited, bytes int) func(int) error {
	return func(fd int) error {
		if privileged.SetsockoptInt(fd, unix.SOL_SOCKET, force, bytes) == nil {
			return nil
		}
		return os.NewSyscallError("setsockopt buffer size", unix.SetsockoptInt(fd, unix.SOL_SOCKET, limited, bytes))
	}
}

func rcvbuf(bytes int) func(int) error { return bufferSize(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, bytes) }
func sndbuf(bytes int) func(int) error { return bufferSize(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, bytes) }

// attachFilter is a set-up step: a classic BPF program, whose result is how many bytes of a
// packet the socket receives.
func attachFilter(program ...bpf.Instruction) func(int) error {
	return func(fd int) error {
		raw, err := bpf.Assemble(program)
		if err != nil {
			return fmt.Errorf("assemble socket filter: %w", err)
		}
		code := make([]unix.SockFilter, len(raw))
		for i, r := range raw {
			code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
		}
		prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
		return os.NewSyscallError("setsockopt SO_ATTACH_FILTER",
			unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog))
	}
}
