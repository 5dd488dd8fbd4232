package netstate

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// startWatch runs Watch in a namespace until the test ends, and returns the number
// of its calls so far and a function that ends it early.
func startWatch(t *testing.T, ns *netlab.NS) (calls *atomic.Int64, stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	calls = new(atomic.Int64)
	done := make(chan struct{})
	var err error
	go func() {
		defer close(done)
		ns.Do(func() { err = Watch(ctx, func(map[int]bool) { calls.Add(1) }) })
	}()
	stop = func() error { cancel(); <-done; return err }
	t.Cleanup(func() { stop() })
	eventually(t, "the first call", func() bool { return calls.Load() > 0 })
	return calls, stop
}

// quiet waits until changes stop, so that the next call is the test's.
func quiet(calls *atomic.Int64) int64 {
	for {
		before := calls.Load()
		time.Sleep(4 * debounce)
		if now := calls.Load(); now == before {
			return now
		}
	}
}

func TestWatch_everyKind(t *testing.T) {
	l := newLab(t)
	calls, _ := startWatch(t, l.host)
	for _, change := range [][]string{
		{"ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.2"},
		{"ip", "rule", "add", "fwmark", "7", "lookup", "5"},
		{"ip", "address", "add", "192.0.2.77/24", "dev", "eth0"},
		{"ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "mtu", "1400"},
		{"nft", "add", "table", "ip", "t"},
		{"ip", "xfrm", "policy", "add", "src", "192.0.2.1", "dst", "198.51.100.1", "dir", "out", "action", "block"},
		{"tc", "qdisc", "add", "dev", "eth0", "clsact"},
		{"tc", "filter", "add", "dev", "eth0", "egress", "protocol", "ip", "u32", "match", "u32", "0", "0"},
		{"tc", "qdisc", "add", "dev", "eth0", "root", "pfifo"},
		{"ip", "link", "set", "eth0", "promisc", "on"},
		{"ip", "link", "set", "eth0", "down"},
	} {
		before := quiet(calls)
		start := time.Now()
		if out, err := l.host.Try(change[0], change[1:]...); err != nil {
			t.Logf("%s: not tested, as it fails here: %s", strings.Join(change, " "), strings.TrimSpace(out))
			continue
		}
		eventually(t, strings.Join(change, " "), func() bool { return calls.Load() > before })
		// Not resync, unless this machine is very slow.
		if took := time.Since(start); took > resync/2 {
			t.Logf("%s: only after %v", strings.Join(change, " "), took)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Run("down-and-up-at-once", func(t *testing.T) {
		l := newLab(t)
		var index, other int
		l.host.Do(func() {
			var err error
			if index, err = DeviceIndex("eth0"); err != nil {
				t.Error(err)
			}
			other, _ = DeviceIndex("lo")
		})
		ctx, cancel := context.WithCancel(context.Background())
		var listens, down, wrong atomic.Bool
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			l.host.Do(func() {
				_ = Watch(ctx, func(wentDown map[int]bool) {
					listens.Store(true)
					down.Store(down.Load() || wentDown[index])
					wrong.Store(wrong.Load() || wentDown[other])
				})
			})
		}()
		defer func() { cancel(); <-ended }()
		eventually(t, "it listens", listens.Load)
		l.host.Run("ip", "link", "set", "lo", "mtu", "1400") // is up, and reported
		l.host.Run("ip", "link", "set", "eth0", "down")
		l.host.Run("ip", "link", "set", "eth0", "up")
		eventually(t, "it is said that it was down", down.Load)
		if wrong.Load() {
			t.Error("it is said of lo, which was not")
		}
	})
}

func TestWatch_debounce(t *testing.T) {
	ns, other := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
	calls, _ := startWatch(t, ns)
	before, start := quiet(calls), time.Now()
	const changes = 2000
	addRoutes(t, ns, changes)
	most := int64(time.Since(start)/debounce) + 3
	if n := calls.Load() - before; n > most {
		t.Errorf("%d calls for %d changes in %v, want %d at most", n, changes, time.Since(start), most)
	}
	eventually(t, "a call", func() bool { return calls.Load() > before })
}

// The reader is blocked while more changes come than its receive buffer holds, so that
// the kernel drops some: the next read fails with ENOBUFS.
func TestWatch_droppedMessages(t *testing.T) {
	ns, other := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
	var s *os.File
	ns.Do(func() {
		var err error
		if s, err = families[0].subscribe(); err != nil {
			t.Fatal(err)
		}
	})
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) })
	if err != nil {
		t.Fatal(err)
	}
	addRoutes(t, ns, 500) // nobody reads
	reader := &overflowCounter{File: s}
	changes, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() { ended <- readChanges(reader, func([]byte) {}, changes) }()
	seen := func(what string) {
		t.Helper()
		select {
		case <-changes:
		case err := <-ended:
			t.Fatalf("%s: it ended: %v", what, err)
		case <-time.After(netlab.Timeout()):
			t.Fatalf("%s: not signalled", what)
		}
	}
	seen("what was dropped")
	for drained := false; !drained; {
		select {
		case <-changes:
		case <-time.After(2 * debounce):
			drained = true
		}
	}
	if reader.overflows.Load() == 0 {
		t.Error("the socket did not overflow: this tests nothing")
	}
	ns.Run("ip", "link", "set", "eth0", "mtu", "1400")
	seen("a change after that")
	s.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("watch ended with %v", err)
	}
}

// overflowCounter counts reads that fail with ENOBUFS.
type overflowCounter struct {
	*os.File
	overflows atomic.Int64
}

func (c *overflowCounter) Read(b []byte) (int, error) {
	n, err := c.File.Read(b)
	if errors.Is(err, unix.ENOBUFS) {
		c.overflows.Add(1)
	}
	return n, err
}

func TestWatch_contextEnds(t *testing.T) {
	ns := netlab.New(t)
	before := goleak.IgnoreCurrent()
	fds := openFiles(t)
	for range 3 {
		calls, stop := startWatch(t, ns)
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Errorf("Follow returned %v", err)
		}
		n := calls.Load()
		ns.Run("ip", "link", "set", "lo", "down")
		ns.Run("ip", "link", "set", "lo", "up")
		if time.Sleep(2 * debounce); calls.Load() != n {
			t.Error("called after the end")
		}
	}
	goleak.VerifyNone(t, before)
	if now := openFiles(t); now > fds {
		t.Errorf("%d files open, %d before", now, fds)
	}
}

func TestWatch_endedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	netlab.New(t).Do(func() {
		if err := Watch(ctx, func(map[int]bool) {}); !errors.Is(err, context.Canceled) {
			t.Errorf("Follow returned %v", err)
		}
	})
}
