package fdguard

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Binding restricts which packets the kernel delivers to a raw socket, by bind and connect
// (raw_v4_match). Unlike a socket filter this comes before the packet is cloned. The zero
// value matches every packet of the socket's protocol. Packets that no raw socket matches
// are the kernel's to answer (ICMP protocol unreachable) and to count (IpInUnknownProtos).
type Binding struct {
	// Device is the index of the ingress interface, or of the VRF it is enslaved to
	// (SO_BINDTOIFINDEX); 0 matches any.
	Device int
	// Local and Remote are the destination and source address, in network byte order;
	// zero matches any.
	Local, Remote [4]byte
	// Mark is the SO_MARK for the route lookup to Remote; 0 is none. It is set only with
	// a Local.
	Mark uint32
}

// Bind applies the Binding to a raw socket that is not bound yet. connected is false if
// connect(2) failed, as without a route to Remote: then any source matches, and Connect
// may be retried.
func (b *Binding) Bind(fd int) (connected bool, err error) {
	set := func(level, name int, what string, value int) {
		if err == nil && value != 0 {
			err = os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
		}
	}
	set(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", b.Device)
	if b.Local != [4]byte{} {
		// Local need not be configured yet, as on a VRRP backup. IP_FREEBIND would
		// allow that for bind(2), but not for connect(2).
		set(unix.IPPROTO_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT", 1)
		set(unix.SOL_SOCKET, unix.SO_MARK, "SO_MARK", int(b.Mark))
		if err == nil {
			err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: b.Local}))
		}
	}
	return err == nil && b.Connect(fd), err
}

// Connect connects fd to Remote, the last step of Bind. It reports success, or that there
// is no Remote.
func (b *Binding) Connect(fd int) (connected bool) {
	return b.Remote == [4]byte{} || unix.Connect(fd, &unix.SockaddrInet4{Addr: b.Remote}) == nil
}

// Drain empties the receive queue of a socket.
func Drain(fd int) {
	for {
		if _, _, err := unix.Recvfrom(fd, nil, unix.MSG_DONTWAIT); err == unix.EAGAIN || err == unix.EBADF {
			return
		}
	}
}

// replacements is the queue of sockets that a Poller will switch to.
type replacements struct {
	pending atomic.Bool // list is not empty
	mu      sync.Mutex  // of list
	list    []replacement
}

type replacement struct {
	fd      int
	retired func()
}

// Replace makes Receive switch from the socket old to fd once old's receive queue is
// empty, and then call retired, which may close old. It exists because a raw socket cannot
// be rebound: once disconnected it receives nothing any more. old stops receiving now; the
// caller keeps it open until retired is called. Replace is safe for concurrent use.
func (p *Poller) Replace(old, fd int, retired func()) error {
	dropAll := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	if err := unix.SetsockoptSockFprog(old, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &dropAll}); err != nil {
		return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
	}
	_ = unix.Shutdown(old, unix.SHUT_RD) // wakes poll; queued messages can still be read
	p.replacements.mu.Lock()
	defer p.replacements.mu.Unlock()
	p.replacements.list = append(p.replacements.list, replacement{fd, retired})
	p.replacements.pending.Store(true)
	return nil
}

// nextSocket switches to the next socket, and reports whether there was one.
func (p *Poller) nextSocket() bool {
	if !p.replacements.pending.Load() {
		return false
	}
	p.replacements.mu.Lock()
	next := p.replacements.list[0]
	p.replacements.list = p.replacements.list[1:]
	p.replacements.pending.Store(len(p.replacements.list) > 0)
	p.replacements.mu.Unlock()
	p.fds[0].Fd = int32(next.fd)
	next.retired()
	return true
}
