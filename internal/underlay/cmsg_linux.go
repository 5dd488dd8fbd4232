package underlay

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cmsgBuffer is a sequence of control messages, struct cmsghdr each, aligned to 8 bytes.
type cmsgBuffer struct {
	buf [128]byte
	n   int
}

func (c *cmsgBuffer) reset() { c.n = 0 }

// add appends a control message and returns its data: size zeroed bytes.
func (c *cmsgBuffer) add(level, typ int32, size int) []byte {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.buf[c.n]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	data := c.buf[c.n+unix.CmsgLen(0) : c.n+unix.CmsgLen(size)]
	clear(data)
	c.n += unix.CmsgSpace(size)
	return data
}

// addPath adds what the kernel needs to route along path. The source address is passed even if
// the header has it, because `ip rule from` is matched against this one.
func (c *cmsgBuffer) addPath(path *Path) {
	// struct in_pktinfo: ipi_ifindex, ipi_spec_dst (the source), ipi_addr (unused).
	info := c.add(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	binary.NativeEndian.PutUint32(info, uint32(path.Device))
	copy(info[4:], path.Local[:])
	if path.Mark != 0 {
		binary.NativeEndian.PutUint32(c.add(unix.SOL_SOCKET, unix.SO_MARK, 4), path.Mark)
	}
}

// attach sets the control messages of h. c must stay unchanged until h is sent.
func (c *cmsgBuffer) attach(h *unix.Msghdr) {
	h.Control = &c.buf[0]
	h.SetControllen(c.n)
}
