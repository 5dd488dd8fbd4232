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

func (s *socket) Read(batch []*packet.Buffer) (int, error) {
	n, err := readPacket(s.raw, batch[0].Space())
	if err != nil {
		return 0, err
	}
	batch[0].SetLen(n)
	return 1, nil
}

func (s *socket) ReadError(buf []byte) (int, error) { return readPacket(s.icmp, buf) }

// readPacket reads a packet and restores its IPv4 header to network byte order: BSD kernels
// deliver the total length, less the header length, and the fragment offset in host order.
func readPacket(conn *net.IPConn, buf []byte) (n int, err error) {
	n, _, _, _, err = conn.ReadMsgIP(buf, nil)
	if errors.Is(err, net.ErrClosed) {
		return 0, os.ErrClosed
	}
	if err != nil {
		return 0, err
	}
	if h, err := xipv4.ParseHeader(buf[:n]); err == nil {
		binary.BigEndian.PutUint16(buf[2:], uint16(h.TotalLen))
		binary.BigEndian.PutUint16(buf[6:], uint16(h.Flags)<<13|uint16(h.FragOff))
	}
	return n, nil
}

func (s *socket) Write(batch []*packet.Buffer, path *Path) (n int, err error) {
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

// KernelHandlesIPIP is false: only Linux's module matters.
func KernelHandlesIPIP() bool { return false }
