package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
)

const (
	// Probes without an answer are sent every probeGap: probeRounds times, or up to maxRounds times where pings get
	// lost, too, since hosts and routers limit the rate of ICMP. See Reply.told.
	probeRounds = 3
	maxRounds   = 10
	probeGap    = 600 * time.Millisecond
	// pingSize is the length in bytes of an ordinary ping.
	pingSize = ipv4.HeaderLen + ipv4.ICMPHeaderLen + 8
	// longest is the length in bytes of the longest packet of protocol 4 that is looked at: answers to probes are
	// short, and the socket gets what all tunnels of this host receive.
	longest = 128
	// sendAtOnce packets are sent before answers are read.
	sendAtOnce = 64
)

// prober sends the probes of asks. The high byte of a ping's sequence number is the round, the low byte 0 for a ping of
// ordinary size, n for one of Sizes[n-1].
type prober struct {
	round      int
	echoed     []uint16 // for each ask, a bit for each round whose ordinary ping was answered
	asks       []Ask
	replies    []Reply
	byRemote   map[[2][4]byte][]int // indices of asks, by local and remote
	identifier uint16
	icmp, ipip int // sockets; -1: not open
	senders    map[sender]int
	buffer     []byte
	sent       int
}

// sender is the mark and the device that a socket sends with.
type sender struct {
	mark   uint32
	device string
}

// probe sends the pings and the packets of protocol 4 of asks, and returns what came back for each.
func probe(ctx context.Context, asks []Ask) (replies []Reply, err error) {
	p := &prober{
		asks: asks, replies: make([]Reply, len(asks)), echoed: make([]uint16, len(asks)), byRemote: map[[2][4]byte][]int{}, identifier: uint16(rand.Uint32()),
		icmp: -1, ipip: -1, senders: map[sender]int{}, buffer: make([]byte, 1<<16),
	}
	defer p.close()
	if p.icmp, err = rawSocket(unix.IPPROTO_ICMP); err != nil {
		return nil, err
	}
	for i := range asks {
		pair := [2][4]byte{asks[i].Local.As4(), asks[i].Remote.As4()}
		p.byRemote[pair] = append(p.byRemote[pair], i)
		if len(asks[i].Inner) == 0 || p.ipip >= 0 {
			continue
		}
		if p.ipip, err = rawSocket(unix.IPPROTO_IPIP); err != nil {
			return nil, err
		}
		filter := []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_LEN},
			{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: longest, Jt: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: longest},
			{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		}
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.SetsockoptSockFprog(p.ipip, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
			return nil, os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
		}
	}
	for ; p.round < maxRounds; p.round++ {
		until := time.Now().Add(probeGap)
		for i := range asks {
			p.ask(i)
		}
		for time.Now().Before(until) && !p.complete() && ctx.Err() == nil {
			p.read(time.Until(until))
		}
		if p.complete() || ctx.Err() != nil {
			break
		}
	}
	return p.replies, ctx.Err()
}

// rawSocket opens a non-blocking raw socket.
func rawSocket(protocol int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20)
	return fd, nil
}

func (p *prober) close() {
	for _, fd := range []int{p.icmp, p.ipip} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	for _, fd := range p.senders {
		unix.Close(fd)
	}
}

// complete reports whether all asks are done.
func (p *prober) complete() bool {
	for i := range p.asks {
		if !p.done(i) {
			return false
		}
	}
	return true
}

// done reports whether asks[i] has all answers, or was asked for them often enough.
func (p *prober) done(i int) bool {
	a, r := &p.asks[i], &p.replies[i]
	protocol4 := len(a.Inner) == 0 || r.Reflected || r.ProtocolUnreachable
	sized := len(a.Sizes) == 0 || r.Size == a.Sizes[0]
	return r.Err != nil || r.Echo && protocol4 && sized || p.round >= probeRounds && (r.Echo && r.told() || r.Reporter.IsValid())
}

// ask sends the probes of asks[i] that are not answered yet, and a ping, which shows whether answers get lost.
func (p *prober) ask(i int) {
	a, r := &p.asks[i], &p.replies[i]
	if p.done(i) {
		return
	}
	fd, err := p.sender(sender{a.Mark, a.Device})
	if err != nil {
		r.Err = err
		return
	}
	r.Pings++
	p.send(fd, i, p.ping(a, 0, pingSize), false)
	for _, inner := range a.Inner {
		if !r.Reflected && !r.ProtocolUnreachable {
			p.send(fd, i, p.packet(a, ipv4.ProtocolIPIP, false, inner), true)
		}
	}
	for n, size := range a.Sizes {
		if size > r.Size {
			p.send(fd, i, p.ping(a, n+1, size), false)
		}
	}
}

// sender returns a raw socket bound as s says that sends packets with their IPv4 header (IPPROTO_RAW).
func (p *prober) sender(s sender) (fd int, err error) {
	if fd, ok := p.senders[s]; ok {
		return fd, nil
	}
	if fd, err = rawSocket(unix.IPPROTO_RAW); err != nil {
		return -1, err
	}
	if s.mark != 0 {
		err = os.NewSyscallError("setsockopt SO_MARK", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(s.mark)))
	}
	if err == nil && s.device != "" {
		err = os.NewSyscallError("setsockopt SO_BINDTODEVICE", unix.BindToDevice(fd, s.device))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	p.senders[s] = fd
	return fd, nil
}

func (p *prober) send(fd, i int, b []byte, protocol4 bool) {
	err := unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: p.asks[i].Remote.As4()})
	switch err {
	case nil, unix.EMSGSIZE, unix.EAGAIN, unix.ENOBUFS, unix.EINTR:
	case unix.EPERM:
		if protocol4 || len(p.asks[i].Inner) == 0 {
			p.replies[i].Err = fmt.Errorf("a local rule drops what is sent: %w", os.NewSyscallError("sendto", err))
		}
	default:
		p.replies[i].Err = os.NewSyscallError("sendto", err)
	}
	if p.sent++; p.sent%sendAtOnce == 0 {
		p.read(0)
	}
}

// packet returns payload behind an IPv4 header.
func (p *prober) packet(a *Ask, protocol uint8, df bool, payload []byte) []byte {
	b := make([]byte, ipv4.HeaderLen, ipv4.HeaderLen+len(payload))
	h := ipv4.Header{
		TotalLen: ipv4.HeaderLen + len(payload), DF: df, TTL: 64, Protocol: protocol,
		Source: a.Local.As4(), Destination: a.Remote.As4(),
	}
	if !df {
		h.ID = uint16(rand.Uint32())
	}
	h.Put(b)
	return append(b, payload...)
}

// ping returns an ICMP echo request of size bytes, IPv4 header included; if sequence is not 0 it has DF=1.
func (p *prober) ping(a *Ask, sequence, size int) []byte {
	b := make([]byte, size-ipv4.HeaderLen)
	b[0] = ipv4.ICMPEchoRequest
	binary.BigEndian.PutUint16(b[4:], p.identifier)
	binary.BigEndian.PutUint16(b[6:], uint16(p.round<<8|sequence))
	binary.BigEndian.PutUint16(b[2:], ipv4.Checksum(b, 0))
	return p.packet(a, ipv4.ProtocolICMP, sequence != 0, b)
}

// read handles what has come, or comes within wait.
func (p *prober) read(wait time.Duration) {
	fds := []unix.PollFd{{Fd: int32(p.icmp), Events: unix.POLLIN}, {Fd: int32(p.ipip), Events: unix.POLLIN}} // poll ignores -1
	n, err := unix.Poll(fds, max(int(wait.Milliseconds()), 0))
	if err != nil || n <= 0 {
		return
	}
	for i := range fds {
		for range 1000 { // a flood must not keep probe from looking at the time
			if fds[i].Revents == 0 {
				break
			}
			n, _, err := unix.Recvfrom(int(fds[i].Fd), p.buffer, 0)
			if err == unix.EINTR {
				continue
			}
			if err != nil { // EAGAIN, or an ICMP error, which the ICMP socket receives in whole
				break
			}
			p.received(p.buffer[:n])
		}
	}
}

func (p *prober) received(b []byte) {
	outer, err := ipv4.Parse(b)
	if err != nil {
		return
	}
	source, destination := outer.Source(), outer.Destination()
	from := p.byRemote[[2][4]byte{destination, source}]
	if outer.Protocol() == ipv4.ProtocolIPIP {
		for _, i := range from {
			p.replies[i].Protocol4 = true
			p.replies[i].Reflected = p.replies[i].Reflected || len(outer.Payload()) == 0
		}
		return
	}
	icmp := outer.Payload()
	if len(icmp) < ipv4.ICMPHeaderLen {
		return
	}
	switch icmp[0] {
	case ipv4.ICMPEchoReply:
		if binary.BigEndian.Uint16(icmp[4:]) != p.identifier {
			return
		}
		for _, i := range from {
			r, sizes := &p.replies[i], p.asks[i].Sizes
			if round, n := icmp[6], int(icmp[7]); n == 0 {
				r.Echo = true
				p.echoed[i] |= 1 << round
				r.Echoes = bits.OnesCount16(p.echoed[i])
			} else if n <= len(sizes) {
				r.Size = max(r.Size, sizes[n-1])
			}
		}
	case ipv4.ICMPUnreachable:
		p.unreachable(source, icmp)
	}
}

// unreachable handles an ICMP destination unreachable, of the asks whose packet it quotes.
func (p *prober) unreachable(from [4]byte, icmp []byte) {
	quoted, _, err := ipv4.ParseHeader(icmp[ipv4.ICMPHeaderLen:])
	if err != nil || quoted.Protocol != ipv4.ProtocolIPIP && quoted.Protocol != ipv4.ProtocolICMP {
		return
	}
	for _, i := range p.byRemote[[2][4]byte{quoted.Source, quoted.Destination}] {
		r := &p.replies[i]
		switch code := icmp[1]; code {
		case ipv4.CodeTooBig:
			if mtu := int(binary.BigEndian.Uint16(icmp[6:])); mtu > 0 && (r.TooBig == 0 || mtu < r.TooBig) {
				r.TooBig = mtu
			}
		case ipv4.CodeProtocolUnreachable:
			r.ProtocolUnreachable = r.ProtocolUnreachable || quoted.Protocol == ipv4.ProtocolIPIP && from == quoted.Destination
		default:
			r.Reporter, r.Code = netip.AddrFrom4(from), int(code)
		}
	}
}
