package ipsec

import (
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipsec/esp"
)

// adopted are the sockets of the process before. Manager.socketsMu guards it.
type adopted struct {
	udp map[boundTo]int
	raw []int
}

type boundTo struct {
	portsKey
	port int
}

// adopt sorts the sockets fds by protocol and binding. It closes those of no use, and duplicate UDP sockets.
func (m *Manager) adopt(fds []int) {
	m.adopted.udp = map[boundTo]int{}
	for _, fd := range fds {
		kind, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		protocol, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if kind == unix.SOCK_RAW && protocol == esp.ProtocolESP {
			m.adopted.raw = append(m.adopted.raw, fd)
			continue
		}
		mark, errMark := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		device, errDevice := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
		local, err := unix.Getsockname(fd)
		at, is4 := local.(*unix.SockaddrInet4)
		if err = errors.Join(err, errMark, errDevice); err != nil || !is4 || kind != unix.SOCK_DGRAM {
			m.closeSocket(fd)
			continue
		}
		key := boundTo{portsKey{netip.AddrFrom4(at.Addr), uint32(mark), device}, at.Port}
		if _, twice := m.adopted.udp[key]; twice {
			m.closeSocket(fd)
			continue
		}
		m.adopted.udp[key] = fd
	}
}

func (a *adopted) take(key portsKey, port int) (fd int, ok bool) {
	fd, ok = a.udp[boundTo{key, port}]
	delete(a.udp, boundTo{key, port})
	return fd, ok
}

// closeAdopted closes the adopted sockets that have not been taken.
func (m *Manager) closeAdopted() {
	for _, fd := range m.adopted.udp {
		m.closeSocket(fd)
	}
	for _, fd := range m.adopted.raw {
		m.closeSocket(fd)
	}
	m.adopted = adopted{}
}

// bootTime returns the time at which CLOCK_BOOTTIME was 0.
func bootTime() time.Time {
	var since unix.Timespec
	now := time.Now()
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &since) != nil {
		return now
	}
	return now.Add(-time.Duration(since.Nano()))
}
