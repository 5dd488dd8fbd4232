package tunnel

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/test/memory"
	"ipipd/test/netlab"
	"ipipd/tun"
)

func TestLoadIdle(t *testing.T) {
	start := time.Unix(1, 0)
	var p load
	for _, tt := range []struct {
		packets int
		after   time.Duration // from start to the end of the read
		waited  time.Duration
		want    bool
	}{
		{1, 0, time.Second, true}, // first read of an unused interface
		{smallBatch, time.Second, time.Second, false},
		{1, time.Second + idleAfter - 1, idleGap, false},
		{1, time.Second + idleAfter, idleGap, true},
		{1, 2 * time.Second, idleGap - 1, false},
		{smallBatch - 1, 2*time.Second + idleAfter - 1, time.Millisecond, false},
		{smallBatch - 1, 2*time.Second + idleAfter, time.Millisecond, true},
	} {
		now := start.Add(tt.after)
		if got := p.idle(tt.packets, now.Add(-tt.waited), now); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestLoadBusyAgain(t *testing.T) {
	now := time.Unix(1, 0)
	var p load
	if p.busyAgain(smallBatch-1, now) {
		t.Error("few packets, and none before")
	}
	if !p.busyAgain(smallBatch, now.Add(time.Second)) {
		t.Error("many packets at a time are not enough")
	}
	for i := range 3 * busyAfter {
		gap := idleGap - 1
		if i%busyAfter == busyAfter-1 {
			gap = idleGap // once in a while
		}
		if now = now.Add(gap); p.busyAgain(1, now) {
			t.Fatalf("after %d packets, with a long gap now and then", i)
		}
	}
	for i := range busyAfter {
		now = now.Add(idleGap - 1)
		if shortGaps := p.busyAgain(1, now); shortGaps != (i == busyAfter-1) {
			t.Errorf("after %d short gaps: %v", i+1, shortGaps)
		}
	}
	if p.idle(1, now, now.Add(idleAfter-1)) || !p.idle(1, now, now.Add(idleAfter)) {
		t.Error("it is not parked again after idleAfter")
	}
}

// fakeSource is a source that reads batches of these sizes, and then returns err. Its file descriptor
// is always readable.
type fakeSource struct {
	batches []int
	err     error
	carried int
	failure chan error
	fd      int // set by idleWorkers
}

func (s *fakeSource) carry(*buffers) (n int, err error) {
	s.carried++
	if len(s.batches) == 0 {
		return 0, s.err
	}
	n, s.batches = s.batches[0], s.batches[1:]
	return n, nil
}

func (s *fakeSource) failed(err error) { s.failure <- err }

// readable returns a file descriptor that is readable.
func readable(t *testing.T) (fd int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	w.Close()
	return int(r.Fd())
}

// idleWorkers returns workers without threads. in reads a source that is never ready, out reads s.
func idleWorkers(t *testing.T, s source) (p *workers, key int32) {
	t.Helper()
	p, err := newWorkers(0, func(i int) *worker { return newWorker(i, discardSender{}) }, func(func()) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	quiet := memory.NewDevice("quiet", 1480)
	t.Cleanup(func() { quiet.Close() })
	if err := p.in.watch(quiet.Queues()[0].FD(), p.in.add(new(fakeSource))); err != nil {
		t.Fatal(err)
	}
	key = p.out.add(s)
	fd := readable(t)
	if f, ok := s.(*fakeSource); ok {
		f.fd = fd
	}
	if err := p.out.watch(fd, key); err != nil {
		t.Fatal(err)
	}
	return p, key
}

func parkedWorkers(t *testing.T, s source) (p *workers, key int32) {
	t.Helper()
	p, key = idleWorkers(t, s)
	if !p.adopt() || !p.parked.Load() {
		t.Fatal("not adopted")
	}
	return p, key
}

func wasReleased(p *workers) bool {
	select {
	case <-p.released:
		return true
	default:
		return false
	}
}

// memoryTx is a transmitter that records the inner packets.
type memoryTx struct{ sent [][]byte }

func (m *memoryTx) Write(batch []*packet.Buffer, _ []*underlay.Path) (sent, refused int, err error) {
	for _, b := range batch {
		m.sent = append(m.sent, bytes.Clone(b.Bytes()[20:]))
	}
	return len(batch), 0, nil
}

func TestWorkersServeParked(t *testing.T) {
	a, _ := pair(t, nil)
	device, tx := memory.NewDevice("ipip9", 1480), new(memoryTx)
	defer device.Close()
	p, _ := idleWorkers(t, new(fakeSource))
	if err := p.out.watch(device.Queues()[0].FD(), p.out.add(&outbound{
		tunnel: a.Tunnel, queue: device.Queues()[0], tx: tx, ids: idCounter{at: 1, first: 1, end: 9},
	})); err != nil {
		t.Fatal(err)
	}
	if !p.adopt() {
		t.Fatal("not adopted")
	}
	if len(p.in.epoll.Poll()) == 0 {
		t.Error("in does not wait for what out has")
	}
	now := time.Now()
	p.serveParked(0, now) // nothing to read
	var want [][]byte
	for i := range 3 {
		want = append(want, datagram(100+i, nil))
		if err := device.Inject(want[i]); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Millisecond)
		p.serveParked(i%2, now)
	}
	if len(tx.sent) != 3 {
		t.Fatalf("%d packets were sent", len(tx.sent))
	}
	for i := range want {
		if !bytes.Equal(tx.sent[i], want[i]) {
			t.Errorf("packet %d is %x, not %x", i, tx.sent[i], want[i])
		}
	}
	if wasReleased(p) {
		t.Error("out was released")
	}
}

func TestWorkersReleaseLocked(t *testing.T) {
	for name, work := range map[string]func(p *workers, s *fakeSource){
		"it receives much": func(p *workers, s *fakeSource) {
			p.serveParked(smallBatch, time.Now())
			p.park() // returns at once, while in is busy
		},
		"the host sends much": func(p *workers, s *fakeSource) {
			s.batches = []int{smallBatch}
			p.serveParked(0, time.Now())
		},
		"the host sends often": func(p *workers, s *fakeSource) {
			now := time.Now()
			for range busyAfter + 1 {
				s.batches = []int{1}
				p.serveParked(1, now)
				now = now.Add(idleGap - 1)
			}
		},
		"they stop": func(p *workers, s *fakeSource) {
			p.stop()
			p.park() // returns at once
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := new(fakeSource)
			p, _ := parkedWorkers(t, s)
			work(p, s)
			if !wasReleased(p) || wasReleased(p) {
				t.Error("it was not released exactly once")
			}
			for _, e := range p.in.epoll.Poll() {
				if e.Pad == outKey {
					t.Error("in still waits for what out has")
				}
			}
			if p.parked.Load() || len(s.batches) > 0 {
				t.Errorf("parked %v, left %v", p.parked.Load(), s.batches)
			}
		})
	}
}

// park blocks until the work is released.
func TestWorkersPark(t *testing.T) {
	p, _ := idleWorkers(t, new(fakeSource))
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.park()
	}()
	eventually(t, "it is parked", p.parked.Load)
	select {
	case <-done:
		t.Error("it has returned")
	default:
	}
	p.unpark()
	p.unpark() // does nothing
	<-done
}

// Without anything to receive, in has no thread that could do the work of out.
func TestWorkersPark_nothingToReceive(t *testing.T) {
	p, err := newWorkers(0, func(i int) *worker { return newWorker(i, discardSender{}) }, func(func()) {})
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if p.park(); p.parked.Load() {
		t.Error("it is parked")
	}
}

// After remove a source is not read any more, whoever serves it.
func TestWorkerRemove(t *testing.T) {
	s := &fakeSource{batches: []int{1, 1, 1, 1}}
	p, key := parkedWorkers(t, s)
	p.serveParked(0, time.Now())
	p.out.remove(key, s.fd)
	p.out.remove(key)
	p.serveParked(0, time.Now())
	if p.out.carryAll(p.out.epoll.Poll()); s.carried != 1 {
		t.Errorf("read %d times", s.carried)
	}
	if events := p.out.epoll.Poll(); len(events) != 0 {
		t.Errorf("its file descriptor is still waited for: %v", events)
	}
}

// A source that fails is told of it once, and not waited for any more; one that is closed is not told.
func TestWorkerCarryLocked_failure(t *testing.T) {
	gone := errors.New("gone")
	for _, err := range []error{gone, os.ErrClosed} {
		s := &fakeSource{err: err, failure: make(chan error, 2)}
		p, _ := parkedWorkers(t, s)
		for range 3 {
			p.serveParked(0, time.Now())
		}
		if s.carried != 1 || err == gone && len(p.out.epoll.Poll()) != 0 { // a closed one is not in the set
			t.Errorf("%v: read %d times", err, s.carried)
		}
		if err == gone {
			if got := <-s.failure; got != gone {
				t.Errorf("told %v", got)
			}
		}
		if len(s.failure) != 0 {
			t.Errorf("%v: told %v", err, <-s.failure)
		}
	}
}

// The number of a descriptor that was removed and closed may be another source's when its last event is
// handled.
func TestWorkerCarryLocked_staleEvent(t *testing.T) {
	s := &fakeSource{batches: []int{1}}
	p, key := idleWorkers(t, s)
	p.out.carryAll([]unix.EpollEvent{{Events: unix.EPOLLIN, Fd: int32(s.fd), Pad: key + 1}})
	if p.out.carryAll(p.out.epoll.Poll()); s.carried != 1 {
		t.Errorf("read %d times", s.carried)
	}
}

// A superpacket of more segments than a batch has is forwarded whole: its memory is the worker's.
func TestOutboundCarry_superpacket(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.MTU = 9000 })
	ns := netlab.New(t)
	var device tun.Device
	var err error
	ns.Do(func() { device, err = tun.Open(tun.Options{MTU: 9000}) })
	if err != nil {
		t.Skipf("needs root: %v", err)
	}
	defer device.Close()
	ns.Run("ip", "address", "add", "10.0.0.1/24", "dev", device.Name())
	ns.Run("ip", "link", "set", "up", "dev", device.Name())
	const segments, size = 60, 1000
	w := newWorker(0, discardSender{})
	if batch := len(w.outbound(a.Tunnel)); batch >= segments {
		t.Fatalf("a batch of %d takes all segments", batch)
	}
	ns.Do(func() {
		conn, err := net.Dial("udp4", "10.0.0.2:9")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		raw, _ := conn.(*net.UDPConn).SyscallConn()
		raw.Control(func(fd uintptr) {
			if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size); err != nil {
				t.Skipf("this kernel has no UDP_SEGMENT: %v", err)
			}
		})
		if _, err := conn.Write(make([]byte, segments*size)); err != nil {
			t.Fatal(err)
		}
	})
	tx := new(memoryTx)
	o := &outbound{tunnel: a.Tunnel, queue: device.Queues()[0], tx: tx, ids: idCounter{at: 1, first: 1, end: 900}}
	n, err := o.carry(&w.buffers)
	if n < segments || err != nil || w.scratch.Pending() {
		t.Errorf("%d packets, %v, and some are left: %v", n, err, w.scratch.Pending())
	}
	sent := 0
	for _, p := range tx.sent {
		if len(p) == 20+8+size {
			sent++
		}
	}
	if sent != segments {
		t.Errorf("%d of %d segments were sent", sent, segments)
	}
}
