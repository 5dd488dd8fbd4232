package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// requester executes netlink requests on sockets that it keeps, in the network namespace
// they were opened in. The zero value opens one for each request instead, in the namespace
// of the calling thread. Its methods are safe for concurrent use.
type requester struct {
	sockets map[int]*requestSocket // by protocol; nil for one that the kernel lacks
	// library configures interfaces, and batch makes many requests at once. They have sockets
	// of their own: that may wait for the RTNL.
	library  netlink.Handle
	batch    *requestSocket
	requests atomic.Int64 // made so far, the library's aside
}

// fresh opens a socket for each request, in the network namespace of the calling thread.
var fresh = new(requester)

// open opens the sockets. After an error the caller closes the requester all the same.
func (r *requester) open() error {
	r.sockets = map[int]*requestSocket{}
	for _, p := range []int{unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER, unix.NETLINK_XFRM} {
		s, err := openRequestSocket(p)
		if err != nil && p == unix.NETLINK_ROUTE {
			return err
		}
		r.sockets[p] = s
	}
	library, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	r.library = *library
	r.batch, err = openRequestSocket(unix.NETLINK_ROUTE)
	return err
}

func (r *requester) close() {
	for _, s := range r.sockets {
		s.close()
	}
	r.batch.close()
	// On a copy: a method that still runs reads the Handle, and fails with os.ErrClosed.
	library := r.library
	library.Close()
}

// execute returns the messages of one type that answer a request, each from behind its
// header.
func (r *requester) execute(req *nl.NetlinkRequest, protocol int, answer uint16) (messages [][]byte, err error) {
	r.requests.Add(1)
	s, kept := r.sockets[protocol]
	if !kept {
		if s, err = openRequestSocket(protocol); err != nil {
			return nil, err
		}
		defer s.close()
	}
	if s == nil {
		return nil, unix.EPROTONOSUPPORT
	}
	return s.execute(req, answer)
}

// dump executes a dump request, again while it is interrupted by a change.
func (r *requester) dump(req *nl.NetlinkRequest, protocol int, answer uint16) (messages [][]byte, err error) {
	req.Flags |= unix.NLM_F_DUMP
	for range 4 {
		if messages, err = r.execute(req, protocol, answer); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return messages, err
}

// requestSocket is a netlink socket for requests. It blocks, and does not wait: the kernel
// has queued the answer when the request has been sent.
type requestSocket struct {
	mu     sync.Mutex
	fd     int // -1: closed
	seq    uint32
	buffer []byte
}

func openRequestSocket(protocol int) (*requestSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &requestSocket{fd: fd, buffer: make([]byte, maxMessage)}, nil
}

// maxMessage is the longest message, in bytes: the kernel's dumps take 32 KiB each.
const maxMessage = 64 << 10

func (s *requestSocket) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

// execute sends a request and reads the answer to its end. A dump that was interrupted by
// a change is an error of EINTR.
func (s *requestSocket) execute(req *nl.NetlinkRequest, want uint16) (messages [][]byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil, os.ErrClosed
	}
	s.seq++
	req.Seq = s.seq
	if err := unix.Sendto(s.fd, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	var failed error
	for done := false; !done; {
		n, err := unix.Read(s.fd, s.buffer)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("read", err)
		}
		err = eachMessage(s.buffer[:n], func(m message) {
			switch {
			case done || m.seq != s.seq: // the end of an answer that failed
				return
			case m.kind == unix.NLMSG_DONE || m.kind == unix.NLMSG_ERROR:
				done = true
				if len(m.body) >= 4 {
					if errno := int32(binary.NativeEndian.Uint32(m.body)); errno != 0 {
						failed = unix.Errno(-errno)
					}
				}
			case m.kind == want:
				messages = append(messages, append([]byte(nil), m.body...))
			}
			if m.flags&unix.NLM_F_DUMP_INTR != 0 {
				failed = unix.EINTR
			}
			done = done || m.flags&unix.NLM_F_MULTI == 0
		})
		if err != nil {
			return nil, err
		}
	}
	if failed != nil {
		return nil, failed
	}
	return messages, nil
}

// acksAtOnce limits the acknowledgements that wait in the socket's buffer: a default one
// takes some 250.
const acksAtOnce = 100

// executeAll sends requests, many with one system call, and returns the error of each. err
// is one of the socket.
func (s *requestSocket) executeAll(requests []*nl.NetlinkRequest) (failed []error, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil, os.ErrClosed
	}
	for some := range slices.Chunk(requests, acksAtOnce) {
		first, b := s.seq+1, []byte(nil)
		for _, req := range some {
			s.seq++
			req.Seq = s.seq
			req.Flags |= unix.NLM_F_ACK
			b = append(b, req.Serialize()...)
		}
		if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return failed, os.NewSyscallError("sendto", err)
		}
		for want := len(failed) + len(some); len(failed) < want; {
			n, err := unix.Read(s.fd, s.buffer)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return failed, os.NewSyscallError("read", err)
			}
			err = eachMessage(s.buffer[:n], func(m message) {
				// One for each request, in their order.
				if m.kind == unix.NLMSG_ERROR && m.seq-first < uint32(len(some)) && len(m.body) >= 4 {
					var failure error
					if errno := int32(binary.NativeEndian.Uint32(m.body)); errno != 0 {
						failure = unix.Errno(-errno)
					}
					failed = append(failed, failure)
				}
			})
			if err != nil {
				return failed, err
			}
		}
	}
	return failed, nil
}

// message is a netlink message; body is what follows its header.
type message struct {
	kind, flags uint16
	seq         uint32
	body        []byte
}

// eachMessage calls f with each message of a datagram.
func eachMessage(b []byte, f func(message)) error {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return fmt.Errorf("a netlink message is cut off: %w", unix.EBADMSG)
		}
		f(message{
			kind:  binary.NativeEndian.Uint16(b[4:]),
			flags: binary.NativeEndian.Uint16(b[6:]),
			seq:   binary.NativeEndian.Uint32(b[8:]),
			body:  b[unix.SizeofNlMsghdr:n],
		})
		b = b[min(len(b), align(n)):]
	}
	return nil
}

// align rounds up to the length of a netlink message or attribute with its padding.
func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// nlaTypeMask is NLA_TYPE_MASK: the type of a netlink attribute without its flags.
const nlaTypeMask = 0x3fff

// eachAttr calls f with the type, without flags, and the value of each netlink attribute
// in b.
func eachAttr(b []byte, f func(kind uint16, value []byte) error) error {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return unix.EINVAL
		}
		if err := f(binary.NativeEndian.Uint16(b[2:])&nlaTypeMask, b[unix.SizeofNlAttr:n]); err != nil {
			return err
		}
		b = b[min(len(b), align(n)):]
	}
	return nil
}

// u32 decodes a 32-bit attribute in the host's byte order; 0 if it has another size.
func u32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}
