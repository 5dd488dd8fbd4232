package broker

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fastpath"
	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// client is a process that the broker serves: its end of the socket pair.
type client struct {
	t       *testing.T
	socket  int
	ended   chan struct{}
	refused []error // to be read once Serve has ended
}

func serve(t *testing.T, read func() ([]tunnel.Config, error)) (*client, *Server) {
	t.Helper()
	s, peer, err := New(read)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, socket: peer, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		s.Serve(func(err error) { c.refused = append(c.refused, err) })
	}()
	t.Cleanup(func() {
		_ = unix.Close(peer)
		c.await()
	})
	return c, s
}

func (c *client) await() {
	c.t.Helper()
	select {
	case <-c.ended:
	case <-time.After(netlab.Timeout()):
		c.t.Fatal("Serve does not return")
	}
}

// ask sends a request and returns the last message of its answer, without the header, and the descriptor with it.
func (c *client) ask(b []byte, fd int) (kind byte, answer string, got int) {
	c.t.Helper()
	const sequence = 0x01020304
	b = append(privileged.Header(b[0], sequence), b[1:]...)
	if err := privileged.Send(c.socket, b, fd); err != nil {
		c.t.Fatal(err)
	}
	buf := make([]byte, privileged.MaxMessage)
	for {
		n, got, err := privileged.Receive(c.socket, buf)
		if err != nil || n < privileged.HeaderSize || privileged.Sequence(buf) != sequence {
			c.t.Fatal(n, err, buf[:min(n, privileged.HeaderSize)])
		}
		if buf[0] != privileged.Part {
			return buf[0], string(buf[privileged.HeaderSize:n]), got
		}
	}
}

func configured(configs ...tunnel.Config) func() ([]tunnel.Config, error) {
	return func() ([]tunnel.Config, error) { return configs, nil }
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// Messages that are refused, or are no request, leave no descriptor open, and the next request is answered.
func TestServer_hostile(t *testing.T) {
	before := descriptors(t)
	t.Run("requests", func(t *testing.T) {
		c, _ := serve(t, configured(testConfigs()...))
		file, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for i := range 500 {
			for _, b := range [][]byte{{200}, {privileged.Netlink}, request(privileged.AttachTUN, []byte("eth0"), privileged.U32(1)), make([]byte, 1000)} {
				kind, reason, got := c.ask(b, []int{-1, int(file.Fd())}[i%2])
				if kind != privileged.Refused || reason == "" || got >= 0 {
					t.Fatalf("%x: answer %d, %q, descriptor %d", b[:min(len(b), 30)], kind, reason, got)
				}
			}
		}
		// Too many descriptors, and too long.
		if err := unix.Sendmsg(c.socket, []byte{1}, unix.UnixRights(0, 1, 2), nil, 0); err != nil {
			t.Fatal(err)
		}
		if err := unix.Sendmsg(c.socket, make([]byte, privileged.MaxMessage+100), nil, nil, 0); err != nil {
			t.Fatal(err)
		}
		if err := privileged.Send(c.socket, []byte{1, 2}, -1); err != nil { // shorter than a header
			t.Fatal(err)
		}
		if n, _, err := privileged.Receive(c.socket, make([]byte, 1000)); n < privileged.HeaderSize || err != nil {
			t.Fatal(n, err)
		}
		if kind, _, _ := c.ask([]byte{200}, -1); kind != privileged.Refused {
			t.Errorf("answer %d", kind)
		}
		_ = unix.Shutdown(c.socket, unix.SHUT_RDWR)
		c.await()
		if len(c.refused) < 2000 {
			t.Errorf("%d are refused", len(c.refused))
		}
	})
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
}

// A process that reads no answer holds up nobody: Interrupt ends Serve.
func TestServer_Interrupt(t *testing.T) {
	c, s := serve(t, configured(testConfigs()...))
	timeout := unix.Timeval{Usec: 100_000}
	if err := unix.SetsockoptTimeval(c.socket, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	var err error
	for err == nil {
		err = privileged.Send(c.socket, []byte{200}, -1)
	}
	if !errors.Is(err, unix.EAGAIN) {
		t.Fatal(err)
	}
	s.Interrupt()
	c.await()
}

// The configuration is read again for what it does not name. What one of its last maxReadings readings names stays
// allowed.
func TestServer_reread(t *testing.T) {
	now, failed := testConfigs()[:1], error(nil)
	reads := 0
	s, peer, err := New(func() ([]tunnel.Config, error) { reads++; return now, failed })
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(peer)
	defer s.close()
	attach := func(name string) error {
		return s.answer(privileged.AttachTUN, privileged.Append(nil, []byte(name), privileged.U32(unix.IFF_TUN)), -1)
	}
	rps := func() error {
		return s.rules.check(privileged.SetRPS, privileged.Fields{[]byte("t1"), []byte("all")}, object{}, testHost)
	}
	if rps() != nil || attach("t2") == nil || reads != 2 {
		t.Fatalf("%v, read %d times", rps(), reads)
	}
	now = testConfigs()[1:]
	if attach("t9") == nil || len(s.readings) != 2 || s.rules.byName["t2"] == nil || rps() != nil {
		t.Errorf("readings %d", len(s.readings))
	}
	failed = errors.New("a file that is being written")
	if attach("t9") == nil || len(s.readings) != 2 || rps() != nil {
		t.Error("a configuration that cannot be read changes something")
	}
	failed = nil
	for i := range 2 * maxReadings { // another one each time
		now = testConfigs()[1:]
		now[0].Comment = strings.Repeat("x", i)
		_ = attach("t9")
	}
	if len(s.readings) != maxReadings || rps() == nil {
		t.Errorf("%d readings, and the first one counts: %v", len(s.readings), rps())
	}
	if _, _, err := New(func() ([]tunnel.Config, error) { return nil, io.ErrUnexpectedEOF }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

// The kernel does what is allowed, and its errors are passed on.
func TestServer_done(t *testing.T) {
	ns := netlab.New(t)
	configs := testConfigs()
	var c *client
	ns.Do(func() { c, _ = serve(t, configured(configs...)) }) // New in the namespace
	failed := func(want unix.Errno, b []byte, fd int) {
		t.Helper()
		kind, answer, _ := c.ask(b, fd)
		if kind != privileged.Failed || answer != string(privileged.U32(uint32(want))) {
			t.Errorf("answer %d, %q, want %v", kind, answer, want)
		}
	}
	var queue *os.File
	ns.Do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		queue = os.NewFile(uintptr(fd), filepath.Base("/dev/net/tun"))
	})
	defer queue.Close()
	const flags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	attach := request(privileged.AttachTUN, []byte("t1"), privileged.U32(flags|unix.IFF_TUN_EXCL))
	if kind, answer, _ := c.ask(attach, int(queue.Fd())); kind != privileged.Done {
		t.Fatal(kind, answer)
	}
	failed(unix.EEXIST, attach, int(queue.Fd())) // it is a queue already
	if out := ns.Run("ip", "-o", "link", "show", "t1"); !strings.Contains(out, "t1") {
		t.Error(out)
	}
	if kind, answer, _ := c.ask(request(privileged.Netns), int(queue.Fd())); kind != privileged.Done || len(answer) != 20 {
		t.Error(kind, answer)
	}
	kind, _, fd := c.ask(request(privileged.Socket, privileged.U32(unix.IPPROTO_IPIP)), -1)
	if kind != privileged.Done || fd < 0 {
		t.Fatal(kind, fd)
	}
	defer unix.Close(fd)
	if kind, answer, _ := c.ask(request(privileged.SetOption, privileged.U32(unix.SOL_SOCKET), privileged.U32(unix.SO_MARK), privileged.U32(5)), fd); kind != privileged.Done {
		t.Error(kind, answer)
	}
	if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); mark != 5 || err != nil {
		t.Error(mark, err)
	}
}

// The broker hands over the ring buffer of a capture, and keeps no descriptor of it.
func TestServer_captureRing(t *testing.T) {
	if m, err := fastpath.NewCaptureRing(); err != nil {
		t.Skipf("the kernel makes no ring buffer: %v", err)
	} else {
		m.Close()
	}
	c, _ := serve(t, configured(testConfigs()...))
	before := descriptors(t)
	for range 3 {
		kind, answer, fd := c.ask(request(privileged.CaptureRing), -1)
		if kind != privileged.Done || answer != "" || fd < 0 {
			t.Fatalf("answer %d, %q, descriptor %d", kind, answer, fd)
		}
		ring, err := ebpf.NewMapFromFD(fd)
		if err != nil {
			t.Fatal(err)
		}
		if ring.Type() != ebpf.RingBuf || ring.MaxEntries() < 1<<20 {
			t.Errorf("%v", ring)
		}
		ring.Close()
	}
	// One request is served after another: by the next answer the server has closed its own descriptor.
	c.ask([]byte{200}, -1)
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
}
