package netstate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// requester executes netlink requests on sockets that it keeps, in the network namespace
// they were opened in. The zero value opens one for each request instead, in the namespace
// of the calling thread. Its methods are safe for concurrent use.
type requester struct {
	sockets map[int]*requestSocket // by protocol; nil for one that the kernel lacks
	// batch is the socket of requests that configure interfaces: these may wait for the RTNL.
	batch    *requestSocket
	files    [len(netFiles)]netFile
	requests atomic.Int64 // requests so far, except those on batch
}

// netFiles are the names of requester.files.
var netFiles = [...]string{fileTaps: "packet", fileCounters: "snmp", fileIptables: "ip_tables_names", fileRaw: "raw"}

const (
	fileTaps = iota
	fileCounters
	fileIptables
	fileRaw
)

// netFile returns the content of a file in /proc/net.
func (r *requester) netFile(file int) ([]byte, error) { return r.files[file].read(netFiles[file]) }

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
	var err error
	if r.batch, err = openRequestSocket(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	// Strict checks let a dump of routes be limited to an interface; kernels before 4.20 lack them.
	_ = unix.SetsockoptInt(r.batch.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	for i := range r.files {
		if err := r.files[i].open(netFiles[i]); err != nil {
			return err
		}
	}
	return nil
}

func (r *requester) close() {
	for _, s := range r.sockets {
		s.close()
	}
	r.batch.close()
	for i := range r.files {
		r.files[i].close()
	}
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

// dump executes a dump request, up to four times while changes interrupt it.
func (r *requester) dump(req *nl.NetlinkRequest, protocol int, answer uint16) (messages [][]byte, err error) {
	req.Flags |= unix.NLM_F_DUMP
	for range 4 {
		if messages, err = r.execute(req, protocol, answer); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return messages, err
}

// requestSocket is a netlink socket for requests. It is blocking, but reads do not wait: the
// kernel has queued the answer when the request has been sent.
type requestSocket struct {
	protocol int
	mu       sync.Mutex
	fd       int // -1: closed
	seq      uint32
	buffer   []byte
}

func openRequestSocket(protocol int) (*requestSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &requestSocket{protocol: protocol, fd: fd, buffer: make([]byte, maxMessage)}, nil
}

// maxMessage is the longest datagram, in bytes: those of the kernel's dumps have up to 32 KiB.
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
	err = s.each(req, want, func(body []byte) { messages = append(messages, append([]byte(nil), body...)) })
	if err != nil {
		return nil, err
	}
	return messages, nil
}

// each is execute, but calls f with the body of each message, which f must not keep.
func (s *requestSocket) each(req *nl.NetlinkRequest, want uint16, f func(body []byte)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return os.ErrClosed
	}
	s.seq++
	req.Seq = s.seq
	var failed error
	err := s.exchange(req.Serialize(), -1, func(datagram []byte) (done bool, err error) {
		err = eachMessage(datagram, func(m message) {
			switch {
			case done || m.seq != s.seq: // the rest of an earlier answer that failed
				return
			case m.kind == unix.NLMSG_DONE || m.kind == unix.NLMSG_ERROR:
				done = true
				if len(m.body) >= 4 {
					if errno := int32(binary.NativeEndian.Uint32(m.body)); errno != 0 {
						failed = unix.Errno(-errno)
					}
				}
			case m.kind == want:
				f(m.body)
			}
			if m.flags&unix.NLM_F_DUMP_INTR != 0 {
				failed = unix.EINTR
			}
			done = done || m.flags&unix.NLM_F_MULTI == 0
		})
		return done, err
	})
	return cmp.Or(err, failed)
}

// exchange sends requests to the kernel, and calls f with each datagram of the answer until it is done. program is
// the descriptor of the eBPF program that they name, or -1.
func (s *requestSocket) exchange(b []byte, program int, f func(datagram []byte) (done bool, err error)) error {
	if privileged.Brokered() && s.takesPrivilege(b) {
		done, wrong := false, error(nil)
		err := privileged.Exchange(s.protocol, program, b, func(datagram []byte) {
			if !done && wrong == nil {
				done, wrong = f(datagram)
			}
		})
		if err == nil && wrong == nil && !done {
			wrong = fmt.Errorf("the answer of netlink is cut off: %w", unix.EBADMSG)
		}
		return cmp.Or(err, wrong)
	}
	if err := s.send(b); err != nil {
		return err
	}
	for {
		n, err := unix.Read(s.fd, s.buffer)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("read", err)
		}
		if done, err := f(s.buffer[:n]); done || err != nil {
			return err
		}
	}
}

// takesPrivilege reports whether any of the requests may take CAP_NET_ADMIN, as all but RTM_GET… of rtnetlink do.
func (s *requestSocket) takesPrivilege(b []byte) (takes bool) {
	const kindMask, get = 3, 2 // RTNL_KIND_GET
	_ = eachMessage(b, func(m message) { takes = takes || m.kind&kindMask != get })
	return takes || s.protocol != unix.NETLINK_ROUTE
}

func (s *requestSocket) send(b []byte) error {
	for {
		err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return os.NewSyscallError("sendto", err)
		}
	}
}

// atOnce limits the requests of one system call: their errors queue in the socket buffer,
// which by default holds some 250.
const atOnce = 100

// executeAll sends requests, many with one system call, and returns the error of each. If the socket
// fails, its error is returned for all the rest. program is the descriptor of the eBPF program that they name, or -1.
func (s *requestSocket) executeAll(requests []*nl.NetlinkRequest, program int) (failed []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	failed = make([]error, len(requests))
	for first := 0; first < len(requests); first += atOnce {
		last := min(first+atOnce, len(requests))
		if err := s.executeSome(requests[first:last], failed[first:last], program); err != nil {
			copy(failed[first:], slices.Repeat([]error{err}, len(failed)-first))
			break
		}
	}
	return failed
}

// executeSome is executeAll for up to atOnce requests; it returns an error of the socket. It
// asks for an acknowledgement of the last one only: the kernel executes them in order.
func (s *requestSocket) executeSome(requests []*nl.NetlinkRequest, failed []error, program int) error {
	if s.fd < 0 {
		return os.ErrClosed
	}
	first, b := s.seq+1, []byte(nil)
	for i, req := range requests {
		s.seq++
		req.Seq = s.seq
		if i == len(requests)-1 {
			req.Flags |= unix.NLM_F_ACK
		}
		b = append(b, req.Serialize()...)
	}
	return s.exchange(b, program, func(datagram []byte) (done bool, err error) {
		err = eachMessage(datagram, func(m message) {
			i := m.seq - first
			if m.kind != unix.NLMSG_ERROR || i >= uint32(len(requests)) || len(m.body) < 4 {
				return
			}
			if errno := int32(binary.NativeEndian.Uint32(m.body)); errno != 0 {
				failed[i] = unix.Errno(-errno)
			}
			done = m.seq == s.seq
		})
		return done, err
	})
}

// message is a netlink message; body is what follows its nlmsghdr.
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
