//go:build !linux

package underlay

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"syscall"

	xipv4 "golang.org/x/net/ipv4"

	"ipipd/internal/packet"
)

// socket is the Socket of other systems: one packet per call, through the Go runtime's poller.
// It is built, not tuned. It ignores the Path: the header has the destination.
type socket struct {
	raw, icmp *net.IPConn
	sender    *xipv4.RawConn
}

// OpenSocket opens the sockets. It needs root.
func OpenSocket(o SocketOptions) (Socket, error) {
	if o.PacketReceive || o.Device != 0 {
		return nil, errors.New("receiving from one interface or from the link layer needs Linux")
	}
	raw, err := net.ListenIP("ip4:4", nil)
	if err != nil {
		return nil, rootNeeded(err)
	}
	sender, err := xipv4.NewRawConn(raw)
	if err != nil {
		raw.Close()
		return nil, rootNeeded(err)
	}
	icmp, err := net.ListenIP("ip4:icmp", nil)
	if err != nil {
		raw.Close()
		return nil, rootNeeded(err)
	}
	return &socket{raw: raw, icmp: icmp, sender: sender}, nil
}

func rootNeeded(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return errors.Join(errors.New("the raw sockets need root"), err)
	}
	return err
}

func (s *socket) Receivers() []Receiver { return []Receiver{s} }
func (s *socket) NewSender() Sender     { return s }
func (s *socket) Overflows() uint64     { return 0 }

func (s *socket) Close() error { return errors.Join(s.raw.Close(), s.icmp.Close()) }

func (s *socket) Watch(opened func(fd int) error) error {
	conn, err := s.raw.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = opened(int(fd)) }); err != nil {
		return err
	}
	return failed
}

func (s *socket) Read(batch []*packet.Buffer) (int, error) {
	conn, err := s.raw.SyscallConn()
	if err != nil {
		return 0, err
	}
	buf, n := batch[0].Space(), 0
	var failed error
	err = conn.Read(func(fd uintptr) (done bool) { // the descriptor is non-blocking
		n, _, failed = syscall.Recvfrom(int(fd), buf, 0)
		return true
	})
	switch {
	case errors.Is(err, net.ErrClosed):
		return 0, os.ErrClosed
	case err != nil:
		return 0, err
	case failed == syscall.EAGAIN || failed == syscall.EINTR:
		return 0, nil
	case failed != nil:
		return 0, os.NewSyscallError("recvfrom", failed)
	}
	toNetworkOrder(buf[:n])
	batch[0].SetLen(n)
	return 1, nil
}

func (s *socket) ReadError(buf []byte) (n int, err error) {
	n, _, _, _, err = s.icmp.ReadMsgIP(buf, nil)
	if errors.Is(err, net.ErrClosed) {
		return 0, os.ErrClosed
	}
	if err != nil {
		return 0, err
	}
	toNetworkOrder(buf[:n])
	return n, nil
}

// toNetworkOrder restores a received IPv4 header to network byte order: BSD kernels deliver the
// total length, less the header length, and the fragment offset in host order.
func toNetworkOrder(p []byte) {
	if h, err := xipv4.ParseHeader(p); err == nil {
		binary.BigEndian.PutUint16(p[2:], uint16(h.TotalLen))
		binary.BigEndian.PutUint16(p[6:], uint16(h.Flags)<<13|uint16(h.FragOff))
	}
}

func (s *socket) Write(batch []*packet.Buffer, _ []*Path) (n int, err error) {
	for _, b := range batch {
		h, failed := parseHeader(b.Bytes())
		if failed == nil {
			failed = s.sender.WriteTo(h, b.Bytes()[h.Len:], nil)
		}
		switch {
		case errors.Is(failed, net.ErrClosed):
			return n, os.ErrClosed
		case failed != nil:
			err = failed
		default:
			n++
		}
	}
	return n, err
}

// parseHeader parses the header of an outer packet, which has no options.
func parseHeader(p []byte) (*xipv4.Header, error) {
	if len(p) < xipv4.HeaderLen || p[0] != 0x45 {
		return nil, syscall.EINVAL
	}
	offset := binary.BigEndian.Uint16(p[6:])
	return &xipv4.Header{
		Version:  4,
		Len:      xipv4.HeaderLen,
		TOS:      int(p[1]),
		TotalLen: len(p),
		ID:       int(binary.BigEndian.Uint16(p[4:])),
		Flags:    xipv4.HeaderFlags(offset >> 13),
		FragOff:  int(offset & 0x1fff),
		TTL:      int(p[8]),
		Protocol: int(p[9]),
		Src:      net.IP(p[12:16]),
		Dst:      net.IP(p[16:20]),
	}, nil
}

// Own is true: only Linux tells of others' sockets.
func Own(uint64) bool { return true }
