package underlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
)

// socket is Linux's Socket. Which file descriptor does what:
//
//	raw     protocol 4. Receives what the packets do not, and is open while they
//	        do so that the kernel does not answer ICMP 3/2 to the peer. A new one takes
//	        its place when it is to receive from other addresses.
//	icmp    receives ICMP errors.
//	whole   sends outer packets as they are (IP_HDRINCL).
//	cut     sends outer packets that the kernel cuts into fragments.
//	link    sends Ethernet frames.
//	packets receive from the link layer, one for each Receiver but the first;
//	        opened when SetReceive first asks for them.
//
// Nothing that only sends can receive: the kernel clones a packet for each raw
// socket of its protocol, and only then asks the socket's filter.
type socket struct {
	guard                                 *fdguard.Group
	raw, icmp, hdrincl, fragmenting, link int
	packets                               []int
	tellsProtocol                         bool // hdrincl takes IP_PROTOCOL
	receivers                             []Receiver
	epollSets                             []fdguard.EpollSet // one for each of them
	options                               SocketOptions

	switching       sync.Mutex // guards raw, packets and reception
	reception       Reception
	unselected      bool // raw is not connected to reception.Remote
	rawReceiver     *rawReceiver
	packetReceivers []*packetReceiver
	packetsOpened   chan struct{} // closed when there are packets, and by Close
	icmpPoller      fdguard.Poller

	// receiving are the sockets that receive, former raw ones that still hold packets
	// among them.
	overflowing sync.Mutex // guards receiving and overflowed
	receiving   []*overflow
	overflowed  uint64 // of sockets that are closed
	// undescribed counts packets that the kernel threw away because
	// virtio_net_hdr has no words for them.
	undescribed atomic.Uint64
}

const (
	receiveBuffer = 8 << 20
	// sendBuffer holds a batch of 64 KiB packets. Queues are the interface's business.
	sendBuffer = 4 << 20
)

// OpenSocket opens the outer door in the network namespace of the calling thread.
// It needs CAP_NET_RAW; with CAP_NET_ADMIN the buffers can be larger than the
// system's limits.
//
// A goroutine in Receiver.Read keeps its processor for a quarter of a second of
// waiting, which makes it fast. Lock it to its thread, and make GOMAXPROCS larger
// than the number of such goroutines, or they hold up all others.
func OpenSocket(o SocketOptions) (Socket, error) {
	s := &socket{raw: -1, icmp: -1, hdrincl: -1, fragmenting: -1, link: -1, packetsOpened: make(chan struct{})}
	if err := s.open(o); err != nil {
		if s.guard != nil {
			s.Close()
		}
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("the raw sockets need CAP_NET_RAW: run as root, or setcap cap_net_raw,cap_net_admin+ep on the binary: %w", err)
		}
		return nil, err
	}
	return s, nil
}

func (s *socket) open(o SocketOptions) (err error) {
	if o.ReceiveBuffer == 0 {
		o.ReceiveBuffer = receiveBuffer
	}
	if s.guard, err = fdguard.New(s.closeAll); err != nil {
		return err
	}
	if s.icmp, err = openICMP(); err != nil {
		return err
	}
	s.icmpPoller = s.guard.Poller(s.icmp)
	if s.hdrincl, err = openHdrincl(); err != nil {
		return err
	}
	s.tellsProtocol = takesProtocol(s.hdrincl)
	if s.fragmenting, err = openFragmenting(); err != nil {
		return err
	}
	if s.link, err = openLink(); err != nil {
		return err
	}
	s.options = o
	s.reception = Reception{Device: o.Device}
	if s.raw, _, err = s.openRaw(s.reception.selection()); err != nil {
		return err
	}
	for i := range 1 + max(o.Receivers, 1) {
		others, err := fdguard.NewEpollSet()
		if err != nil {
			return err
		}
		s.epollSets = append(s.epollSets, others)
		w := watch{s, others}
		if i == 0 {
			s.rawReceiver = newRawReceiver(w, s.raw)
			s.receivers = append(s.receivers, s.rawReceiver)
			continue
		}
		r := &packetReceiver{watch: w, opened: s.packetsOpened, failed: s.failed}
		s.packetReceivers = append(s.packetReceivers, r)
		s.receivers = append(s.receivers, r)
	}
	return s.receive(Reception{LinkLayer: o.PacketReceive, LinkDevice: o.Device, Device: o.Device})
}

func (s *socket) Receivers() []Receiver { return s.receivers }

func (s *socket) Close() error {
	s.guard.Close(func() {
		s.switching.Lock()
		defer s.switching.Unlock()
		if s.packets == nil { // whoever waits for them waits no more
			close(s.packetsOpened)
		}
	})
	return nil
}

func (s *socket) closeAll() {
	for _, l := range s.epollSets {
		_ = l.Close()
	}
	for _, o := range s.receiving {
		_ = unix.Close(o.fd)
	}
	for _, fd := range []int{s.icmp, s.hdrincl, s.fragmenting, s.link} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// overflow is what the kernel last said it threw away at a receive socket.
type overflow struct {
	fd   int
	last uint32
}

// opened notes a socket that receives. The caller has opened it, and it is closed by
// retire or with s.
func (s *socket) opened(fd int) {
	s.overflowing.Lock()
	defer s.overflowing.Unlock()
	s.receiving = append(s.receiving, &overflow{fd: fd})
}

// retire closes a socket that received.
func (s *socket) retire(fd int) {
	s.overflowing.Lock()
	defer s.overflowing.Unlock()
	s.receiving = slices.DeleteFunc(s.receiving, func(o *overflow) bool {
		if o.fd != fd {
			return false
		}
		s.overflowed += o.news()
		_ = unix.Close(fd)
		return true
	})
}

func (s *socket) Overflows() uint64 {
	s.overflowing.Lock()
	defer s.overflowing.Unlock()
	defer s.guard.Release()
	if s.guard.Acquire() { // after Close the last count stands
		for _, o := range s.receiving {
			s.overflowed += o.news()
		}
	}
	return s.overflowed + s.undescribed.Load()
}

// news is what was thrown away since it was last asked.
func (o *overflow) news() uint64 {
	drops, err := socketDrops(o.fd)
	if err != nil {
		return 0
	}
	news := drops - o.last // modulo 2^32
	o.last = drops
	return uint64(news)
}

// newSocket opens a socket that is closed on exec and when one of the set-up
// steps fails.
func newSocket(domain, typ, protocol int, setUp ...func(fd int) error) (int, error) {
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	for _, step := range setUp {
		if err := step(fd); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// option is a set-up step: setsockopt with an int.
func option(level, name int, what string, value int) func(int) error {
	return func(fd int) error {
		return os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
	}
}

// buffer is a set-up step: the size of a buffer, which only CAP_NET_ADMIN may
// put above the system's limit.
func buffer(force, limited, bytes int) func(int) error {
	return func(fd int) error {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, bytes) == nil {
			return nil
		}
		return os.NewSyscallError("setsockopt buffer size", unix.SetsockoptInt(fd, unix.SOL_SOCKET, limited, bytes))
	}
}

func receives(bytes int) func(int) error { return buffer(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, bytes) }
func sends(bytes int) func(int) error    { return buffer(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, bytes) }

// filter is a set-up step: a classic BPF program that says how much of a packet
// the socket receives.
func filter(program ...bpf.Instruction) func(int) error {
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

// KernelHandlesIPIP reports whether this kernel has a protocol-4 handler of its
// own, which then gets every packet as well, and may answer ICMP 3/3 to a peer
// that it has no tunnel for.
func KernelHandlesIPIP() bool {
	for _, module := range []string{"tunnel4", "ipip"} {
		if _, err := os.Stat("/sys/module/" + module); err == nil {
			return true
		}
	}
	modules, _ := os.ReadFile("/proc/modules")
	for line := range strings.Lines(string(modules)) {
		if strings.HasPrefix(line, "tunnel4 ") || strings.HasPrefix(line, "ipip ") {
			return true
		}
	}
	return false
}
