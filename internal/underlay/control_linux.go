package underlay

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// control is a buffer of control messages, made of bytes that the kernel reads
// as struct cmsghdr; every message starts at a multiple of 8.
type control struct {
	buf [128]byte
	n   int
}

func (c *control) reset() { c.n = 0 }

// add appends a control message and returns its data, size zero bytes.
func (c *control) add(level, typ int32, size int) []byte {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.buf[c.n]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	data := c.buf[c.n+unix.CmsgLen(0) : c.n+unix.CmsgLen(size)]
	clear(data)
	c.n += unix.CmsgSpace(size)
	return data
}

// addPath adds what the kernel must know to route along path. The source is told
// even where the header has it, because rules such as `ip rule from` look there.
func (c *control) addPath(path *Path) {
	// struct in_pktinfo: ipi_ifindex, ipi_spec_dst (the source), ipi_addr (unused).
	info := c.add(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	binary.NativeEndian.PutUint32(info, uint32(path.Device))
	copy(info[4:], path.Local[:])
	if path.Mark != 0 {
		binary.NativeEndian.PutUint32(c.add(unix.SOL_SOCKET, unix.SO_MARK, 4), path.Mark)
	}
}

// attach makes the control messages those of a message.
func (c *control) attach(h *unix.Msghdr) {
	h.Control = &c.buf[0]
	h.SetControllen(c.n)
}
