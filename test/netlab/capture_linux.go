package netlab

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Frame is one IPv4 packet as it crossed an interface, without link-layer header.
//
// It may exceed the interface's MTU if segmentation was left to the hardware: use
// DisableOffload to see single segments.
type Frame struct {
	// Packet is the IPv4 packet with any Ethernet padding.
	Packet []byte
	// Outgoing is set for transmitted packets (PACKET_OUTGOING).
	Outgoing bool
	// ChecksumPartial: the transport checksum was left to the hardware (TP_STATUS_CSUMNOTREADY).
	ChecksumPartial bool
	// At is the kernel's receive time, on the wall clock.
	At time.Time
}

// Recorder keeps the captured packets of an interface until the test ends.
type Recorder struct {
	t    testing.TB
	file *os.File

	mu     sync.Mutex
	frames []Frame
	more   chan struct{} // closed and replaced when frames grows
}

// Capture records the IPv4 packets that enter or leave by an interface of ns, filtered by
// keep unless that is nil. The socket is open when Capture returns: later packets are not
// missed.
//
// A tunnel leaves the fast path while its own interface is captured: see CaptureReceived.
func Capture(t testing.TB, ns *NS, ifname string, keep func(Frame) bool) *Recorder {
	t.Helper()
	// ETH_P_ALL, because a socket for ETH_P_IP does not see outgoing packets.
	return capture(t, ns, ifname, unix.ETH_P_ALL, keep)
}

// CaptureReceived is Capture of incoming packets only (ETH_P_IP), which does not disable the
// fast path.
func CaptureReceived(t testing.TB, ns *NS, ifname string) *Recorder {
	t.Helper()
	return capture(t, ns, ifname, unix.ETH_P_IP, nil)
}

func capture(t testing.TB, ns *NS, ifname string, protocol uint16, keep func(Frame) bool) *Recorder {
	t.Helper()
	var file *os.File
	var err error
	ns.Do(func() { file, err = openCapture(ifname, protocol) })
	if errors.Is(err, os.ErrPermission) {
		t.Skip("needs root (CAP_NET_RAW) to capture packets")
	}
	if err != nil {
		t.Fatalf("capture on %s: %v", ifname, err)
	}
	r := &Recorder{t: t, file: file, more: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.record(keep)
	}()
	t.Cleanup(func() {
		file.Close()
		<-done
	})
	return r
}

func openCapture(ifname string, protocol uint16) (*os.File, error) {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, err
	}
	// SOCK_DGRAM removes the link-layer header of any link type. With protocol 0 the socket
	// receives nothing until bind.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	for _, option := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64 << 20},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1},
		{unix.SOL_PACKET, unix.PACKET_AUXDATA, 1},
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			unix.Close(fd)
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: ifi.Index}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "capture on "+ifname), nil
}

// record reads until the socket is closed.
func (r *Recorder) record(keep func(Frame) bool) {
	conn, err := r.file.SyscallConn()
	if err != nil {
		return
	}
	buf, control := make([]byte, 1<<17), make([]byte, 256)
	for {
		var n, controlLen int
		var from unix.Sockaddr
		var readErr error
		err := conn.Read(func(fd uintptr) bool {
			n, controlLen, _, from, readErr = unix.Recvmsg(int(fd), buf, control, 0)
			return !errors.Is(readErr, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		link, _ := from.(*unix.SockaddrLinklayer)
		if readErr != nil || link == nil || link.Protocol != htons(unix.ETH_P_IP) {
			continue // ENETDOWN, when the interface goes down, is not the end
		}
		frame := Frame{Packet: append([]byte(nil), buf[:n]...), Outgoing: link.Pkttype == unix.PACKET_OUTGOING}
		frame.readControl(control[:controlLen])
		if keep != nil && !keep(frame) {
			continue
		}
		r.mu.Lock()
		r.frames = append(r.frames, frame)
		close(r.more)
		r.more = make(chan struct{})
		r.mu.Unlock()
	}
}

// readControl takes the timestamp and the checksum state from the control messages.
func (f *Frame) readControl(control []byte) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= 4:
			f.ChecksumPartial = *(*uint32)(unsafe.Pointer(&m.Data[0]))&unix.TP_STATUS_CSUMNOTREADY != 0
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS:
			if len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
				f.At = time.Unix((*unix.Timespec)(unsafe.Pointer(&m.Data[0])).Unix())
			}
		}
	}
}

// Close ends the capture before the test ends. The record stays.
func (r *Recorder) Close() { r.file.Close() }

// Frames returns a copy of the list of the packets so far.
func (r *Recorder) Frames() []Frame {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Frame(nil), r.frames...)
}

// Matching returns the packets so far that pass checks.
func (r *Recorder) Matching(checks ...Check) (matching []Frame) {
	for _, f := range r.Frames() {
		if Match(f.Packet, checks...) == nil {
			matching = append(matching, f)
		}
	}
	return matching
}

// Await waits for a packet that passes checks and returns the first, which may have been
// recorded before. It fails the test if none comes.
func (r *Recorder) Await(checks ...Check) Frame {
	r.t.Helper()
	return r.AwaitN(1, checks...)[0]
}

// AwaitN waits for n packets that pass checks, and returns the first n.
func (r *Recorder) AwaitN(n int, checks ...Check) []Frame {
	r.t.Helper()
	deadline := time.After(Timeout())
	var matching []Frame
	for seen := 0; ; {
		r.mu.Lock()
		fresh, more := r.frames[seen:], r.more
		r.mu.Unlock()
		seen += len(fresh)
		for _, f := range fresh {
			if Match(f.Packet, checks...) != nil {
				continue
			}
			if matching = append(matching, f); len(matching) == n {
				return matching
			}
		}
		select {
		case <-more:
		case <-deadline:
			r.t.Fatalf("%d of %d packets as wanted came within %v. All that came:%s", len(matching), n, Timeout(), r.describe(checks))
		}
	}
}

// describe lists the record, and why no packet matched.
func (r *Recorder) describe(checks []Check) string {
	const most = 20
	var s strings.Builder
	for i, f := range r.Frames() {
		if i == most {
			s.WriteString("\n\t…")
			break
		}
		s.WriteString("\n\t" + Describe(f.Packet))
		if err := Match(f.Packet, checks...); err != nil {
			s.WriteString(" (" + strings.ReplaceAll(err.Error(), "\n", "; ") + ")")
		}
	}
	if s.Len() == 0 {
		return " nothing"
	}
	return s.String()
}

// DisableOffload turns off segmentation and checksum offload and GRO of an interface
// (ethtool -K), so that a veth carries segments with complete checksums, as a cable does.
func DisableOffload(ns *NS, ifname string) {
	ns.t.Helper()
	if _, err := exec.LookPath("ethtool"); err != nil {
		ns.t.Skip("needs ethtool (package ethtool)")
	}
	ns.Run("ethtool", "-K", ifname, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
}

// htons converts from host to network byte order.
func htons(v uint16) uint16 {
	b := [2]byte{byte(v >> 8), byte(v)}
	return *(*uint16)(unsafe.Pointer(&b))
}
