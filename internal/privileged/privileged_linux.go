package privileged

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// parent is the client that asks the parent; nil: the process makes the system calls itself.
var parent atomic.Pointer[client]

type client struct {
	mu       sync.Mutex // held from a request to the end of its answer
	socket   int
	sequence uint32 // of the last request
	buf      []byte
}

// Use makes the parent at the other end of socket do all that follows, for good. The socket must stay open.
func Use(socket int) { parent.Store(&client{socket: socket, buf: make([]byte, MaxMessage)}) }

// Brokered reports whether the parent is asked.
func Brokered() bool { return parent.Load() != nil }

// ask sends a request and returns the n fields of its answer, and the answer's descriptor or -1. part is called with
// each Part before, in a buffer that the next one overwrites.
func (c *client) ask(verb byte, fd, n int, part func([]byte), fields ...[]byte) (answer Fields, got int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sequence++
	if err := Send(c.socket, Append(Header(verb, c.sequence), fields...), fd); err != nil {
		return nil, -1, fmt.Errorf("ask ipipd keep: %w", err)
	}
	for {
		size, got, err := Receive(c.socket, c.buf)
		if err != nil {
			return nil, -1, fmt.Errorf("ask ipipd keep: %w", err)
		}
		if size < HeaderSize || Sequence(c.buf) != c.sequence { // left of a request whose answer was not read
			if got >= 0 {
				_ = unix.Close(got)
			}
			continue
		}
		switch b := c.buf[HeaderSize:size]; c.buf[0] {
		case Part:
			part(b)
		case Failed:
			return nil, -1, unix.Errno(binary.NativeEndian.Uint32(append(b[:len(b):len(b)], 0, 0, 0, 0)))
		case Refused:
			return nil, -1, fmt.Errorf("%w: %s", ErrRefused, b)
		case Text:
			return nil, -1, errors.New(string(b))
		default:
			answer, err = Parse(append([]byte(nil), b...), n)
			return answer, got, err
		}
	}
}

// do is ask for a request whose answer has no parts, fields or descriptor.
func (c *client) do(verb byte, fd int, fields ...[]byte) error {
	_, _, err := c.ask(verb, fd, 0, func([]byte) {}, fields...)
	return err
}

// open is ask for a request whose answer is a descriptor.
func (c *client) open(verb byte, fields ...[]byte) (fd int, err error) {
	_, fd, err = c.ask(verb, -1, 0, func([]byte) {}, fields...)
	if err == nil && fd < 0 {
		err = unix.EMFILE // this process had none left for it
	}
	return fd, err
}

// Exchange has the parent send netlink messages, and calls f with each datagram of the answer, which is f's until it
// returns. program is the descriptor of the eBPF program that the messages name, or -1.
func Exchange(protocol, program int, messages []byte, f func(datagram []byte)) error {
	_, _, err := parent.Load().ask(Netlink, program, 0, f, U32(uint32(protocol)), messages)
	return err
}

// RawSocket opens a raw IPv4 socket, close-on-exec, which is the caller's.
func RawSocket(protocol int) (fd int, err error) {
	c := parent.Load()
	if c == nil {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		return fd, os.NewSyscallError("socket", err)
	}
	fd, err = c.open(Socket, U32(uint32(protocol)))
	return fd, os.NewSyscallError("socket", err)
}

// RingBuffer has the parent make the ring buffer of a capture. The descriptor is the caller's.
func RingBuffer() (fd int, err error) { return parent.Load().open(CaptureRing) }

// SetsockoptInt is setsockopt(2).
func SetsockoptInt(fd, level, name, value int) error {
	if c := parent.Load(); c != nil {
		return c.do(SetOption, fd, U32(uint32(level)), U32(uint32(name)), U32(uint32(value)))
	}
	return unix.SetsockoptInt(fd, level, name, value)
}

// BindUDP is bind(2) of a UDP socket.
func BindUDP(fd int, a *unix.SockaddrInet4) error {
	if c := parent.Load(); c != nil {
		return c.do(Bind, fd, a.Addr[:], U32(uint32(a.Port)))
	}
	return unix.Bind(fd, a)
}

// TUNSetIff is the ioctl TUNSETIFF.
func TUNSetIff(fd int, name string, flags uint16) error {
	if c := parent.Load(); c != nil {
		return c.do(AttachTUN, fd, []byte(name), U32(uint32(flags)))
	}
	ifreq, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifreq.SetUint16(flags)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifreq)
}

// TUNNetns returns device and inode of the network namespace of a TUN interface (TUNGETDEVNETNS, Linux 5.2).
func TUNNetns(queue int) (device, inode uint64, err error) {
	if c := parent.Load(); c != nil {
		answer, _, err := c.ask(Netns, queue, 1, func([]byte) {})
		if err == nil && len(answer[0]) != 16 {
			err = unix.EPROTO
		}
		if err != nil {
			return 0, 0, err
		}
		return binary.NativeEndian.Uint64(answer[0]), binary.NativeEndian.Uint64(answer[0][8:]), nil
	}
	fd, err := unix.IoctlRetInt(queue, unix.TUNGETDEVNETNS)
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	err = unix.Fstat(fd, &stat)
	return uint64(stat.Dev), stat.Ino, err
}

// CountPrograms returns how many eBPF programs are on the ingress of a device (tcx). Without a parent count counts them.
func CountPrograms(device int, count func(device int) (int, error)) (int, error) {
	c := parent.Load()
	if c == nil {
		return count(device)
	}
	answer, _, err := c.ask(Programs, -1, 1, func([]byte) {}, U32(uint32(device)))
	if err != nil {
		return 0, err
	}
	return int(answer.U32(0)), nil
}

// RPS has the parent set rps_cpus of an interface to a mask, or set back what it has set.
func RPS(set bool, ifname, mask string) error {
	verb := byte(ClearRPS)
	if set {
		verb = SetRPS
	}
	return parent.Load().do(verb, -1, []byte(ifname), []byte(mask))
}
