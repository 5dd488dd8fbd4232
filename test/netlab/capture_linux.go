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

// Frame is one IPv4 packet as it crossed an interface, without link header.
//
// It may be larger than the interface's MTU where the sender left segmentation
// to the hardware: turn offload off on the wire (see DisableOffload) to see single
// segments.
type Frame struct {
	// Packet is the IPv4 packet and, on Ethernet, what padding follows it.
	Packet []byte
	// Outgoing: it left by the interface, rather than entered.
	Outgoing bool
	// ChecksumPartial: its transport checksum was left to the hardware.
	ChecksumPartial bool
	// At is when the kernel saw it, on the wall clock.
	At time.Time
}

// Recorder keeps what crosses an interface until the test ends.
type Recorder struct {
	t    testing.TB
	file *os.File

	mu     sync.Mutex
	frames []Frame
	more   chan struct{} // closed and replaced when frames grows
}

// Capture records the IPv4 packets that enter or leave by an interface of ns and
// that keep says yes to; a nil keep is for all of them. What crosses the interface
// after Capture has returned is not missed.
//
// A tunnel leaves the fast path while its own interface is captured: see
// CaptureReceived.
func Capture(t testing.TB, ns *NS, ifname string, keep func(Frame) bool) *Recorder {
	t.Helper()
	// ETH_P_ALL, because a socket for ETH_P_IP does not see what leaves.
	return capture(t, ns, ifname, unix.ETH_P_ALL, keep)
}

// CaptureReceived is Capture of what enters by an interface only, which leaves a tunnel
// its fast path.
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
	// SOCK_DGRAM takes the link header off, whatever kind the link is of.
	// Protocol 0 hears nothing until bind says which and where.
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

// readControl takes time and checksum state from the control messages.
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

// Close ends the recording before the test ends. What was recorded stays.
func (r *Recorder) Close() { r.file.Close() }

// Frames is a copy of the list of what was recorded so far.
func (r *Recorder) Frames() []Frame {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Frame(nil), r.frames...)
}

// Matching is what of the record so far checks hold for.
func (r *Recorder) Matching(checks ...Check) (matching []Frame) {
	for _, f := range r.Frames() {
		if Match(f.Packet, checks...) == nil {
			matching = append(matching, f)
		}
	}
	return matching
}

// Await waits for a packet that checks hold for and returns the first, one that
// was recorded before included. It fails the test if none comes.
func (r *Recorder) Await(checks ...Check) Frame {
	r.t.Helper()
	return r.AwaitN(1, checks...)[0]
}

// AwaitN waits for n packets that checks hold for, and returns the first n.
func (r *Recorder) AwaitN(n int, checks ...Check) []Frame {
	r.t.Helper()
	deadline := time.After(Patience())
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
			r.t.Fatalf("%d of %d packets as wanted came within %v. All that came:%s", len(matching), n, Patience(), r.describe(checks))
		}
	}
}

// describe lists the record, and why nothing of it was wanted.
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

// DisableOffload makes an interface hand out what is sent by it in segments with whole
// checksums, as a real NIC's wire would carry it, instead of leaving both to the
// receiver as veth does.
func DisableOffload(ns *NS, ifname string) {
	ns.t.Helper()
	if _, err := exec.LookPath("ethtool"); err != nil {
		ns.t.Skip("needs ethtool (package ethtool)")
	}
	ns.Run("ethtool", "-K", ifname, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
}

// htons puts a 16-bit number in network byte order.
func htons(v uint16) uint16 {
	b := [2]byte{byte(v >> 8), byte(v)}
	return *(*uint16)(unsafe.Pointer(&b))
}
