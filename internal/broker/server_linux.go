package broker

import (
	"encoding/binary"
	"errors"
	"os"
	"reflect"

	"golang.org/x/sys/unix"

	"ipipd/internal/fastpath"
	"ipipd/internal/netstate"
	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
)

// Server does what one process requests. The goroutine of Serve does the requests, one after another.
type Server struct {
	socket int
	// read reads the configuration of the process.
	read func() ([]tunnel.Config, error)
	// readings are the last readings that differ: after an undone change the process requests what an older one names.
	readings [][]tunnel.Config
	rules    *rules
	netlink  map[uint32]int // sockets, by protocol
	lookup   int            // the socket for name's ioctl
	sequence uint32         // of the request
	buf, out []byte         // buffers for a request, and for an answer
	datagram []byte         // buffer for a datagram of netlink
}

// maxReadings bounds Server.readings.
const maxReadings = 8

// New returns the Server of a process, for the network namespace of the calling thread, and the process's end of the
// socket pair, which is the caller's. read reads the process's configuration: now, and before a request is refused.
func New(read func() ([]tunnel.Config, error)) (s *Server, peer int, err error) {
	s = &Server{socket: -1, lookup: -1, read: read, netlink: map[uint32]int{}, buf: make([]byte, privileged.MaxMessage), out: make([]byte, privileged.MaxMessage), datagram: make([]byte, privileged.MaxMessage-privileged.HeaderSize)}
	if err := s.reread(); err != nil {
		return nil, -1, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, protocol := range []uint32{unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER, unix.NETLINK_XFRM} {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(protocol))
		if errors.Is(err, unix.EPROTONOSUPPORT) && protocol != unix.NETLINK_ROUTE {
			continue // the process cannot open one either
		}
		if err != nil {
			return nil, -1, os.NewSyscallError("socket", err)
		}
		s.netlink[protocol] = fd
	}
	if s.lookup, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, -1, os.NewSyscallError("socket", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, os.NewSyscallError("socketpair", err)
	}
	s.socket = pair[0]
	return s, pair[1], nil
}

// reread reads the configuration, and makes new rules if it has changed.
func (s *Server) reread() error {
	configs, err := s.read()
	if err != nil {
		return err
	}
	if n := len(s.readings); n == 0 || !reflect.DeepEqual(s.readings[n-1], configs) {
		s.readings = append(s.readings, configs)
		s.readings = s.readings[max(0, len(s.readings)-maxReadings):]
		s.rules = newRules(s.readings...)
	}
	return nil
}

// Serve answers requests until the process closes its end, or until Interrupt; then it closes all descriptors of the
// Server. It calls refused for each request that the rules refuse.
func (s *Server) Serve(refused func(error)) {
	defer s.close()
	for {
		n, fd, err := privileged.Receive(s.socket, s.buf)
		if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ECONNRESET) {
			continue
		}
		if err != nil {
			return
		}
		err = errShort
		if s.sequence = 0; n >= privileged.HeaderSize {
			s.sequence = privileged.Sequence(s.buf)
			err = s.answer(s.buf[0], s.buf[privileged.HeaderSize:n], fd)
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		var no refusal
		if errors.As(err, &no) {
			refused(err)
		}
		if err := s.finish(err); err != nil {
			return
		}
	}
}

// Interrupt makes Serve return. It may be called at any time before Serve has returned.
func (s *Server) Interrupt() { _ = unix.Shutdown(s.socket, unix.SHUT_RDWR) }

func (s *Server) close() {
	for _, fd := range s.netlink {
		_ = unix.Close(fd)
	}
	for _, fd := range []int{s.lookup, s.socket} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

var errShort = refuse("a broken request")

// errAnswered means that the answer has been sent.
var errAnswered = errors.New("answered")

// finish sends the last message of an answer: done, or err.
func (s *Server) finish(err error) error {
	var errno unix.Errno
	var no refusal
	switch {
	case err == errAnswered:
		return nil
	case err == nil:
		return s.send(privileged.Done, nil, -1)
	case errors.As(err, &no):
		return s.send(privileged.Refused, []byte(no), -1)
	case errors.As(err, &errno):
		return s.send(privileged.Failed, privileged.U32(uint32(errno)), -1)
	}
	return s.send(privileged.Text, []byte(err.Error()), -1)
}

func (s *Server) send(kind byte, b []byte, fd int) error {
	s.out = append(append(s.out[:0], privileged.Header(kind, s.sequence)...), b...)
	return privileged.Send(s.socket, s.out, fd)
}

// answer checks a request and does it.
func (s *Server) answer(verb byte, b []byte, fd int) error {
	f, err := parse(verb, b)
	if err != nil {
		return err
	}
	o := describe(fd)
	if err = s.rules.check(verb, f, o, host{s.name, table}); err != nil {
		// It may be in a configuration that the process has read, and this one has not.
		if s.reread() == nil {
			err = s.rules.check(verb, f, o, host{s.name, table})
		}
	}
	if err != nil {
		return err
	}
	switch verb {
	case privileged.Netlink:
		return s.exchange(f.U32(0), f[1], fd)
	case privileged.Socket:
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(f.U32(0)))
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		return answered(s.send(privileged.Done, nil, socket))
	case privileged.SetOption:
		return unix.SetsockoptInt(fd, int(f.U32(0)), int(f.U32(1)), int(f.U32(2)))
	case privileged.Bind:
		return unix.Bind(fd, &unix.SockaddrInet4{Port: int(f.U32(1)), Addr: [4]byte(f[0])})
	case privileged.AttachTUN:
		return privileged.TUNSetIff(fd, string(f[0]), uint16(f.U32(1)))
	case privileged.Netns:
		device, inode, err := privileged.TUNNetns(fd)
		if err != nil {
			return err
		}
		value := binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, device), inode)
		return answered(s.send(privileged.Done, privileged.Append(nil, value), -1))
	case privileged.Programs:
		n, err := fastpath.CountPrograms(int(f.U32(0)))
		if err != nil {
			return err
		}
		return answered(s.send(privileged.Done, privileged.Append(nil, privileged.U32(uint32(n))), -1))
	case privileged.SetRPS:
		return netstate.SetRPS(string(f[0]), string(f[1]))
	case privileged.ClearRPS:
		return netstate.ClearRPS(string(f[0]), string(f[1]))
	case privileged.CaptureRing:
		ring, err := fastpath.NewCaptureRing()
		if err != nil {
			return err
		}
		defer ring.Close()
		return answered(s.send(privileged.Done, nil, ring.FD()))
	}
	return refuse("an unknown request %d", verb)
}

// answered returns errAnswered if err is nil, else err: why the answer could not be sent.
func answered(err error) error {
	if err != nil {
		return err
	}
	return errAnswered
}

// exchange sends checked messages of netlink, and passes on the answer.
func (s *Server) exchange(protocol uint32, b []byte, program int) error {
	fd, ok := s.netlink[protocol]
	if !ok {
		return unix.EPROTONOSUPPORT
	}
	setProgram(b, program)
	// The answer to changes ends with the acknowledgement of the last message.
	last := 0
	for next := 0; next < len(b); next += int(binary.NativeEndian.Uint32(b[next:])) {
		last = next
	}
	if protocol == unix.NETLINK_ROUTE {
		flags := binary.NativeEndian.Uint16(b[last+6:])
		binary.NativeEndian.PutUint16(b[last+6:], flags|unix.NLM_F_ACK)
	}
	sequence, answer := b[last+8:last+12], s.datagram
	for { // discard what is left of the answer to an exchange that failed
		if _, _, err := unix.Recvfrom(fd, answer, unix.MSG_DONTWAIT); err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			break
		}
	}
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(fd, answer, unix.MSG_DONTWAIT) // the kernel has queued it
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		}
		if err := s.send(privileged.Part, answer[:n], -1); err != nil {
			return err
		}
		if ends(answer[:n], sequence) {
			return nil
		}
	}
}

// ends reports whether a datagram has the end of the answer to the message with that sequence number.
func ends(b, sequence []byte) bool {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		kind, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		if string(b[8:12]) == string(sequence) && (kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR || flags&unix.NLM_F_MULTI == 0) {
			return true
		}
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return true
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return false
}

// describe says what a descriptor is, which may be anything.
func describe(fd int) (o object) {
	if fd < 0 {
		return o
	}
	o.hasDescriptor = true
	var s unix.Stat_t
	if unix.Fstat(fd, &s) != nil {
		return o
	}
	const major, minor = 10, 200 // of /dev/net/tun
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		o.tun = s.Rdev == unix.Mkdev(major, minor)
	case unix.S_IFSOCK:
		o.domain, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		o.typ, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	}
	return o
}

// name returns the name of an interface; "" if it is gone.
func (s *Server) name(index uint32) string {
	ifreq, err := unix.NewIfreq("")
	if err != nil {
		return ""
	}
	ifreq.SetUint32(index)
	if unix.IoctlIfreq(s.lookup, unix.SIOCGIFNAME, ifreq) != nil {
		return ""
	}
	return ifreq.Name()
}

func table(index uint32) uint32 {
	table, err := netstate.RouteTable(int(index))
	if err != nil {
		return 0
	}
	return table
}
