package ipsec

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
	"ipipd/ipsec/esp"
	"ipipd/ipsec/ike"
)

const receiveBuffer = 4 << 20

// door is UDP ports 500 and 4500 of one local address.
type door struct {
	key      doorKey
	manager  *Manager
	users    int
	ike      *net.UDPConn // 500
	nat      *net.UDPConn // 4500
	receiver Receiver     // of the ESP that comes to 4500
}

// openDoor binds both ports in the network namespace of the calling thread.
func openDoor(m *Manager, key doorKey) (*door, error) {
	d := &door{key: key, manager: m}
	var err error
	if d.ike, err = openUDP(key, 500); err != nil {
		return nil, err
	}
	if d.nat, err = openUDP(key, 4500); err != nil {
		d.ike.Close()
		return nil, err
	}
	raw, err := d.nat.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.receiver = newReceiver(m, raw, d)
	go d.serve()
	return d, nil
}

func openUDP(key doorKey, port uint16) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = setUp(int(fd), key) })
		return errors.Join(err, failed)
	}}
	c, err := lc.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(key.local, port).String())
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("UDP port %d of %s is taken, most likely by another IKE daemon (strongSwan, libreswan, racoon): stop that, or have it leave this address: %w", port, key.local, err)
	}
	if err != nil {
		return nil, fmt.Errorf("IKE needs UDP port %d of %s: %w", port, key.local, err)
	}
	return c.(*net.UDPConn), nil
}

func setUp(fd int, key doorKey) error {
	var errs []error
	set := func(level, name int, what string, value int) {
		errs = append(errs, os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value)))
	}
	set(unix.IPPROTO_IP, unix.IP_RECVTOS, "IP_RECVTOS", 1)
	// IKE messages can be longer than a path takes; let routers cut them.
	set(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", unix.IP_PMTUDISC_DONT)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		set(unix.SOL_SOCKET, unix.SO_RCVBUF, "SO_RCVBUF", receiveBuffer)
	}
	if key.mark != 0 {
		set(unix.SOL_SOCKET, unix.SO_MARK, "SO_MARK", int(key.mark))
	}
	if key.device != 0 {
		set(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", key.device)
	}
	return errors.Join(errs...)
}

// serve reads port 500.
func (d *door) serve() {
	buf := make([]byte, packet.MaxSize)
	for {
		n, from, err := d.ike.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			d.manager.deliver(d.key.local, 500, from, buf[:n])
		}
	}
}

// send sends an IKE message. That it may not arrive is what retransmission is for.
func (d *door) send(a ike.Send) {
	if a.LocalPort != 4500 {
		_, _ = d.ike.WriteToUDPAddrPort(a.Payload, a.To)
		return
	}
	b := a.Payload
	if !a.Keepalive {
		b = append(make([]byte, esp.NonESPMarker, esp.NonESPMarker+len(b)), b...)
	}
	_, _ = d.nat.WriteToUDPAddrPort(b, a.To)
}

// Close ends the door's goroutines.
func (d *door) Close() error { return errors.Join(d.ike.Close(), d.nat.Close()) }

// openESP opens the socket of protocol 50 in the network namespace of the
// calling thread.
func openESP(m *Manager) (Closer, Receiver, error) {
	c, err := net.ListenIP("ip4:50", nil)
	if errors.Is(err, os.ErrPermission) {
		return nil, nil, fmt.Errorf("ESP needs a raw socket, and that CAP_NET_RAW: run as root, or setcap cap_net_raw,cap_net_admin+ep on the binary: %w", err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open the ESP socket: %w", err)
	}
	if err := c.SetReadBuffer(receiveBuffer); err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c, newReceiver(m, raw, nil), nil
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	n uint32 // bytes of the message, set by the kernel
}

// receiver reads the ESP socket, or, with a door, its port 4500. It waits by the
// Go runtime's poller, so that Close unblocks it.
type receiver struct {
	manager *Manager
	raw     syscall.RawConn
	door    *door
	msgs    []mmsghdr
	iovs    []unix.Iovec
	names   []unix.RawSockaddrInet4
	control [][64]byte
	ready   func(fd uintptr) bool // made once, so that a Read allocates nothing
	count   int
	errno   unix.Errno
}

func newReceiver(m *Manager, raw syscall.RawConn, d *door) *receiver {
	r := &receiver{manager: m, raw: raw, door: d}
	// A raw call, since it does not block: the scheduler need not be told.
	r.ready = func(fd uintptr) bool {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(unsafe.SliceData(r.msgs))), uintptr(len(r.msgs)), unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EAGAIN {
			return false
		}
		r.count, r.errno = int(n), errno
		return true
	}
	return r
}

func (r *receiver) grow(n int) {
	r.msgs, r.iovs = make([]mmsghdr, n), make([]unix.Iovec, n)
	r.names, r.control = make([]unix.RawSockaddrInet4, n), make([][64]byte, n)
	for i := range r.msgs {
		r.msgs[i].Iov = &r.iovs[i]
		r.msgs[i].SetIovlen(1)
	}
}

// maxErrors in a row are the end of a socket.
const maxErrors = 1000

func (r *receiver) Read(batch []*packet.Buffer) (n int, err error) {
	if len(batch) != len(r.msgs) {
		r.grow(len(batch))
	}
	for bad := 0; ; {
		for i, b := range batch {
			space := b.Space()
			r.iovs[i].Base = unsafe.SliceData(space)
			r.iovs[i].SetLen(len(space))
			h := &r.msgs[i].Msghdr
			h.Name, h.Namelen = (*byte)(unsafe.Pointer(&r.names[i])), unix.SizeofSockaddrInet4
			h.Control = &r.control[i][0]
			h.SetControllen(len(r.control[i]))
		}
		if err := r.raw.Read(r.ready); err != nil {
			return 0, os.ErrClosed
		}
		if r.errno != 0 {
			if bad++; bad > maxErrors {
				return 0, os.NewSyscallError("recvmmsg", r.errno)
			}
			continue
		}
		bad = 0
		n = 0
		for i := range r.count {
			batch[i].SetLen(int(r.msgs[i].n))
			if r.take(batch[i], i) {
				batch[n], batch[i] = batch[i], batch[n]
				n++
			}
		}
		if n > 0 {
			return n, nil
		}
	}
}

// take makes what was received the packet that the peer sealed.
func (r *receiver) take(b *packet.Buffer, i int) bool {
	if r.door == nil {
		return r.manager.open(b, 0)
	}
	from := &r.names[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&from.Port))[:])
	switch esp.ClassifyUDP(b.Bytes()) {
	case esp.UDPIKE:
		r.manager.deliver(r.door.key.local, 4500, netip.AddrPortFrom(netip.AddrFrom4(from.Addr), port), b.Bytes()[esp.NonESPMarker:])
		return false
	case esp.UDPESP:
	default:
		return false
	}
	// The socket gives no IP header; ECN is all of it that matters further on.
	if b.Len() > packet.MaxSize-20 {
		return false
	}
	h := b.Push(20)
	clear(h)
	h[0], h[1], h[8], h[9] = 0x45, r.tos(i), 64, esp.ProtocolESP
	binary.BigEndian.PutUint16(h[2:], uint16(b.Len()))
	copy(h[12:], from.Addr[:])
	local := r.door.key.local.As4()
	copy(h[16:], local[:])
	return r.manager.open(b, port)
}

// tos is the type of service that message i came with.
func (r *receiver) tos(i int) byte {
	b := r.control[i][:r.msgs[i].Controllen]
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		size := int(h.Len)
		if size < unix.SizeofCmsghdr || size > len(b) {
			return 0
		}
		if h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && size > unix.CmsgLen(0) {
			return b[unix.CmsgLen(0)]
		}
		if size = unix.CmsgSpace(size - unix.CmsgLen(0)); size > len(b) {
			return 0
		}
		b = b[size:]
	}
	return 0
}
