package underlay

import (
	"slices"

	"golang.org/x/sys/unix"
)

// A process that takes the place of another one takes over its receive sockets, with what they have
// queued and their filters, which stay until the first SetReceive: no packet is lost, and the kernel
// answers none. The sockets that only send, and that of ICMP errors, it opens anew.

// adopt takes over the receive sockets that are as open would make them, and closes the others.
// packets are as many packet sockets as open would make, or none.
func (s *socket) adopt(fds []int, receivers int) (raws, packets []int) {
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	namespace := namespaceOf(s.icmp)
	groups := map[int]int{} // of each packet socket in a group, its fanout group
	for _, fd := range fds {
		domain, typ, protocol := socketOption(fd, unix.SO_DOMAIN), socketOption(fd, unix.SO_TYPE), socketOption(fd, unix.SO_PROTOCOL)
		switch {
		case typ != unix.SOCK_RAW || namespaceOf(fd) != namespace:
			s.closeReceiveSocket(fd)
		case domain == unix.AF_INET && protocol == unix.IPPROTO_IPIP && rcvbuf(s.options.ReceiveBuffer)(fd) == nil:
			raws = append(raws, fd)
			noteOwn(fd)
		case domain == unix.AF_PACKET && packetOption(fd, unix.PACKET_VNET_HDR) == 1 && rcvbuf(s.options.ReceiveBuffer)(fd) == nil:
			packets = append(packets, fd)
			if group := packetOption(fd, unix.PACKET_FANOUT); group != 0 { // with the flags in bit 31
				groups[fd] = group
			}
		default:
			s.closeReceiveSocket(fd)
		}
	}
	// Bound sockets first: bindPacketSockets goes on with those after them.
	bound := func(fd int) bool { return groups[fd] != 0 }
	unbound := slices.DeleteFunc(slices.Clone(packets), bound)
	packets = append(slices.DeleteFunc(packets, func(fd int) bool { return !bound(fd) }), unbound...)
	s.packetsBound = len(groups)
	if len(groups) > 0 {
		s.fanoutGroup = groups[packets[0]] & 0xffff
	}
	for _, group := range groups {
		if group != groups[packets[0]] {
			receivers = -1 // they are of two processes
		}
	}
	if len(packets) != receivers {
		for _, fd := range packets {
			s.closeReceiveSocket(fd)
		}
		packets, s.packetsBound, s.fanoutGroup = nil, 0, 0
	}
	return raws, packets
}

// socketOption returns -1 if the socket has no such option.
func socketOption(fd, name int) int {
	value, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name)
	if err != nil {
		return -1
	}
	return value
}

func packetOption(fd, name int) int {
	value, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, name)
	if err != nil {
		return -1
	}
	return value
}

// namespaceOf returns the inode of a socket's network namespace; 0 without CAP_NET_ADMIN there.
func namespaceOf(fd int) uint64 {
	namespace, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return 0
	}
	defer unix.Close(namespace)
	var stat unix.Stat_t
	if unix.Fstat(namespace, &stat) != nil {
		return 0
	}
	return stat.Ino
}

// announce calls Opened with the receive sockets that it has not been called with.
func (s *socket) announce() {
	s.overflowMu.Lock()
	defer s.overflowMu.Unlock()
	for _, o := range s.receiveSockets {
		if !o.announced && s.options.Opened != nil {
			o.announced = true
			s.options.Opened(o.fd)
		}
	}
}
