package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// interfaceControl reads and sets the link attributes of a TUN interface by rtnetlink. The
// interface may have been renamed or moved to another network namespace, and its old name may
// be another interface's by now: it asks the TUN's file descriptor for name and namespace
// each time. It cannot act in another namespace: setns needs CAP_SYS_ADMIN, which ipipd drops.
type interfaceControl struct {
	name string // at creation
	// fd is an rtnetlink socket in netns, the namespace that the interface was created in.
	fd    int
	netns netnsID
	mu    sync.Mutex // held from a request to its reply; guards index
	index int        // as last looked up
}

// netnsID identifies a network namespace by the device and inode of its nsfs file. It is zero
// if the kernel has no TUNGETDEVNETNS (before 5.2).
type netnsID struct{ device, inode uint64 }

// openControl returns the control of a TUN that was created in the calling thread's namespace.
func openControl(tun int, name string) (*interfaceControl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	c := &interfaceControl{fd: fd, name: name}
	c.netns, _ = netnsOf(tun)
	return c, nil
}

// useSocketNetns sets netns to the namespace of the socket fd: the interface was created by another process,
// and may have been moved. Without CAP_NET_ADMIN there netns stays the interface's.
func (c *interfaceControl) useSocketNetns() {
	if fd, err := unix.IoctlRetInt(c.fd, unix.SIOCGSKNS); err == nil {
		c.netns, _ = netnsOfFile(fd)
	}
}

func (c *interfaceControl) close() error {
	if c == nil {
		return nil
	}
	return os.NewSyscallError("close", unix.Close(c.fd))
}

// netnsOf returns the present network namespace of a TUN's interface.
func netnsOf(tun int) (netnsID, error) {
	device, inode, err := privileged.TUNNetns(tun)
	return netnsID{device, inode}, os.NewSyscallError("ioctl TUNGETDEVNETNS", err)
}

// netnsOfFile returns the network namespace of an nsfs file, which it closes.
func netnsOfFile(fd int) (netnsID, error) {
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return netnsID{}, os.NewSyscallError("fstat", err)
	}
	return netnsID{uint64(stat.Dev), stat.Ino}, nil
}

// state returns the state of a TUN's interface; see Device.State.
func (c *interfaceControl) state(tun int) (s State, err error) {
	err = c.withLink(tun, &s, func(int) error { return nil })
	return s, err
}

func (c *interfaceControl) setMTU(tun, mtu int) error {
	var s State
	err := c.withLink(tun, &s, func(fd int) error {
		_, err := linkRequest(fd, unix.RTM_SETLINK, unix.NLM_F_ACK, s.Index, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(mtu)))
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("MTU %d of %s is not accepted: want 68 to 65515: %w", mtu, s.Name, err)
	}
	if err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", s.Name, mtu, err)
	}
	return nil
}

// setQueueLength sets txqueuelen of an interface that is not up.
func (c *interfaceControl) setQueueLength(tun, packets int) error {
	var s State
	err := c.withLink(tun, &s, func(fd int) error {
		_, err := linkRequest(fd, unix.RTM_SETLINK, unix.NLM_F_ACK, s.Index, unix.IFLA_TXQLEN, binary.NativeEndian.AppendUint32(nil, uint32(packets)))
		return err
	})
	if err != nil {
		return fmt.Errorf("set the txqueuelen of %s to %d: %w", s.Name, packets, err)
	}
	return nil
}

// withLink sets s to the interface's state, and calls f with an rtnetlink socket in its
// namespace. If the interface was moved, withLink fails, but sets s.Name and s.Moved.
func (c *interfaceControl) withLink(tun int, s *State, f func(fd int) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	*s = State{Name: c.name}
	name, err := currentName(tun)
	if err != nil {
		return err
	}
	s.Name = name
	elsewhere := fmt.Errorf("%s is in another network namespace", s.Name)
	where, err := netnsOf(tun)
	if err == nil && where != c.netns && c.netns != (netnsID{}) {
		s.Moved = true
		return elsewhere
	}
	// TUNGETDEVNETNS opens a descriptor. If none is left, only the interface that still has
	// its index is ours for certain.
	unsure := errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE)
	err = c.lookup(tun, c.fd, s, func(fd int) error {
		if unsure && s.Index != c.index {
			return elsewhere
		}
		c.index = s.Index
		return f(fd)
	})
	if unsure && (err == elsewhere || errors.Is(err, unix.ENODEV)) {
		*s = State{Name: name, Moved: true}
		return elsewhere
	}
	return err
}

// lookup looks the interface up by name, and calls f if the TUN still has that name
// afterwards, as it may be another interface's otherwise.
func (c *interfaceControl) lookup(tun, fd int, s *State, f func(fd int) error) error {
	for range 10 {
		found, err := linkRequest(fd, unix.RTM_GETLINK, 0, 0, unix.IFLA_IFNAME, append([]byte(s.Name), 0))
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("look up interface %s: %w", s.Name, err)
		}
		name, gone := currentName(tun)
		switch {
		case gone != nil:
			return gone
		case err == nil && name == s.Name:
			*s = found
			return f(fd)
		}
		s.Name = name
	}
	return fmt.Errorf("look up interface %s: %w", s.Name, unix.ENODEV)
}

// currentName returns the present name of a TUN's interface (TUNGETIFF).
func currentName(tun int) (string, error) {
	ifreq, err := unix.NewIfreq("")
	if err != nil {
		return "", err
	}
	if err := unix.IoctlIfreq(tun, unix.TUNGETIFF, ifreq); err != nil {
		return "", os.NewSyscallError("ioctl TUNGETIFF", err)
	}
	return ifreq.Name(), nil
}

// linkSequence is nlmsg_seq of the last linkRequest.
var linkSequence atomic.Uint32

// linkRequest sends a request of type kind with one attribute, and returns the state in the
// reply: zero for an acknowledgement.
func linkRequest(fd int, kind, flags uint16, index int, attribute uint16, value []byte) (State, error) {
	const header = unix.SizeofNlMsghdr + unix.SizeofIfInfomsg
	b := make([]byte, header+unix.SizeofRtAttr+(len(value)+3)&^3)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	sequence := linkSequence.Add(1)
	binary.NativeEndian.PutUint32(b[8:], sequence)
	binary.NativeEndian.PutUint32(b[unix.SizeofNlMsghdr+4:], uint32(index)) // ifi_index
	binary.NativeEndian.PutUint16(b[header:], uint16(unix.SizeofRtAttr+len(value)))
	binary.NativeEndian.PutUint16(b[header+2:], attribute)
	copy(b[header+unix.SizeofRtAttr:], value)
	if kind != unix.RTM_GETLINK && privileged.Brokered() {
		var answer []byte
		if err := privileged.Exchange(unix.NETLINK_ROUTE, -1, b, func(datagram []byte) { answer = bytes.Clone(datagram) }); err != nil {
			return State{}, err
		}
		return parseLink(answer)
	}
	var err error = unix.EINTR
	for err == unix.EINTR {
		err = unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return State{}, os.NewSyscallError("sendto", err)
	}
	reply := make([]byte, 32<<10) // the reply is one datagram, queued before sendto returned
	for {
		n, _, err := unix.Recvfrom(fd, reply, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return State{}, os.NewSyscallError("recvfrom", err)
		case n >= unix.SizeofNlMsghdr && binary.NativeEndian.Uint32(reply[8:]) != sequence:
			// the reply to an earlier request, which was not read
		default:
			return parseLink(reply[:n])
		}
	}
}

var errBadLinkReply = errors.New("the kernel's answer is not an interface")

// parseLink parses the reply to a linkRequest: an RTM_NEWLINK or NLMSG_ERROR.
func parseLink(b []byte) (s State, err error) {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil || len(messages) != 1 {
		return s, errBadLinkReply
	}
	m := messages[0]
	switch {
	case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
		if code := int32(binary.NativeEndian.Uint32(m.Data)); code != 0 {
			return s, unix.Errno(-code)
		}
		return s, nil // an acknowledgement
	case m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg:
		return s, errBadLinkReply
	}
	s.Index = int(binary.NativeEndian.Uint32(m.Data[4:]))
	flags := binary.NativeEndian.Uint32(m.Data[8:])
	s.Up, s.Carrier = flags&unix.IFF_UP != 0, flags&unix.IFF_LOWER_UP != 0
	attrs, err := syscall.ParseNetlinkRouteAttr(&m)
	if err != nil {
		return s, errBadLinkReply
	}
	for _, a := range attrs {
		switch {
		case a.Attr.Type == unix.IFLA_IFNAME:
			s.Name = unix.ByteSliceToString(a.Value)
		case a.Attr.Type == unix.IFLA_MTU && len(a.Value) == 4:
			s.MTU = int(binary.NativeEndian.Uint32(a.Value))
		}
	}
	return s, nil
}

// setCarrier sets the carrier of the interface that queue fd belongs to.
func setCarrier(fd int, carrier bool) error {
	value := 0
	if carrier {
		value = 1
	}
	return os.NewSyscallError("ioctl TUNSETCARRIER", unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, value))
}
