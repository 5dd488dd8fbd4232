package fdguard

import (
	"os"

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
