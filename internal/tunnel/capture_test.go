package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/test/memory"
	"ipipd/test/netlab"
)

// capturing is a running capture.
type capturing struct {
	t      testing.TB
	engine *Engine
	cancel func()
	ended  chan struct{}
	result capture.Result
	err    error

	mu  sync.Mutex
	out bytes.Buffer
}

// Write appends to the file.
func (c *capturing) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

// file parses what was written so far.
func (c *capturing) file() *netlab.CaptureFile {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := netlab.ReadCapture(bytes.Clone(c.out.Bytes()))
	if err != nil {
		c.t.Fatal(err)
	}
	return f
}

// end ends the capture.
func (c *capturing) end() *netlab.CaptureFile {
	c.t.Helper()
	for _, p := range c.engine.workers { // a packet is captured after it has arrived
		for _, w := range []*worker{p.out, p.in} {
			func() { w.mu.Lock(); defer w.mu.Unlock() }()
		}
	}
	c.cancel()
	return c.await()
}

// await waits until the capture has ended by itself.
func (c *capturing) await() *netlab.CaptureFile {
	c.t.Helper()
	select {
	case <-c.ended:
	case <-time.After(patience):
		c.t.Fatal("the capture does not end")
	}
	f := c.file()
	if c.err != nil || !f.Ended || c.result.Packets != uint64(len(f.Packets)) {
		c.t.Errorf("the capture has ended: %+v, %v, and %d packets are in the file", c.result, c.err, len(f.Packets))
	}
	return f
}

// startCapture starts a capture to w, or if that is nil to capturing.file, and returns once the tunnel is captured.
func startCapture(t testing.TB, e *Engine, name string, o capture.Options, w io.Writer) *capturing {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &capturing{t: t, engine: e, cancel: cancel, ended: make(chan struct{})}
	if w == nil {
		w = c
	}
	tunnel := e.Tunnel(name)
	before := len(rings(tunnel.captures.Load()))
	go func() {
		defer close(c.ended)
		c.result, c.err = e.Capture(ctx, name, o, "test", w)
	}()
	t.Cleanup(func() {
		cancel()
		<-c.ended
	})
	eventually(t, "the tunnel is captured", func() bool { return len(rings(tunnel.captures.Load())) > before })
	return c
}

// Packets of both directions are captured twice, under one packet ID.
func TestEngineCapture(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.Comment = "to the office" })
	of := startCapture(t, a.engine, "", capture.Options{}, nil)
	out, in := datagram(100, nil), datagram(200, nil)
	a.send(t, b, out)
	b.send(t, a, in)
	f := of.end()
	if len(f.Packets) != 4 {
		t.Fatalf("%d packets: %+v", len(f.Packets), f.Packets)
	}
	for i, want := range []struct {
		iface, direction string
		packet           []byte
		outer            bool
	}{
		{"ipip1 (inner)", "out", out, false}, {"ipip1 (outer)", "out", out, true},
		{"ipip1 (outer)", "in", in, true}, {"ipip1 (inner)", "in", in, false},
	} {
		got := f.Packets[i]
		inner := got.Packet
		if want.outer {
			inner = inner[encap.Overhead:]
		}
		if got.Interface != want.iface || got.Direction != want.direction || !bytes.Equal(inner, want.packet) || got.Comment != "" || got.ID == 0 || got.ID != f.Packets[i&^1].ID {
			t.Errorf("packet %d: %+v", i, got)
		}
	}
	if f.Packets[0].ID == f.Packets[2].ID {
		t.Error("both have the same ID")
	}
	if d := f.Interfaces[0].Description; !strings.Contains(d, `comment=to the office`) || !strings.Contains(d, "current-remote-address="+outerB.String()) {
		t.Errorf("the description: %s", d)
	}
	if f.Names[outerB.As4()] != "ipip1-remote" || f.Names[outerA.As4()] != "ipip1-local" {
		t.Errorf("names: %v", f.Names)
	}
	a.send(t, b, out)
	if a.captures.Load() != nil || a.engine.captures.Load() != nil {
		t.Error("it is captured on")
	}
}

// The comment of a dropped packet has the reason and the remedy.
func TestEngineCapture_drops(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment, c.MTU = true, 2000 })
	all, drops := startCapture(t, a.engine, "", capture.Options{}, nil), startCapture(t, a.engine, "", capture.Options{Drops: true}, nil)
	a.send(t, b, datagram(100, nil))
	ttl := datagram(60, func(h *ipv4.Header) { h.TTL = 0 })
	big := datagram(1481, func(h *ipv4.Header) { h.DF = true })
	damaged := datagram(80, nil)
	damaged[10]++
	for _, p := range [][]byte{ttl, big} {
		if err := a.device.Inject(p); err != nil {
			t.Fatal(err)
		}
	}
	stranger, peer := outerPacket(t, outerB.Next().As4(), damaged), outerPacket(t, outerB.As4(), damaged)
	for _, p := range [][]byte{peer, stranger} {
		if err := a.socket.Inject(p, packet.Offload{}); err != nil {
			t.Fatal(err)
		}
	}
	a.drop(drop.OuterErrorIgnored)
	b.send(t, a, datagram(101, nil)) // the ICMP error comes first
	if a.device.ReceiveWithin(patience) == nil {
		t.Fatal("the packet does not come out")
	}
	eventually(t, "all are counted", func() bool { s := a.Status(); return len(s.Drops) == 4 && len(s.ProcessDrops) == 1 })
	type seen struct {
		iface, direction, reason string
		n                        int
		packet                   string
	}
	want := map[seen]bool{
		{"ipip1 (inner)", "out", "inner-ttl-zero", 1, string(ttl)}:       true,
		{"ipip1 (inner)", "out", "too-big", 1, string(big)}:              true,
		{"ipip1 (outer)", "in", "received-checksum", 1, string(peer)}:    true,
		{"no tunnel (outer)", "in", "unknown-peer", 1, string(stranger)}: true,
		{"ipip1 (outer)", "in", "outer-error-ignored", 1, ""}:            true,
	}
	for name, f := range map[string]*netlab.CaptureFile{"all": all.end(), "drops": drops.end()} {
		got, others := map[seen]bool{}, 0
		for _, p := range f.Packets {
			if p.Comment == "" {
				others++
				continue
			}
			n, text := 1, strings.TrimPrefix(p.Comment, "1 packet ")
			if _, err := fmt.Sscanf(text, "%d packets ", &n); err == nil {
				_, text, _ = strings.Cut(text, "packets ")
			}
			for r := range drop.All() {
				if text == r.Error()+"; remedy: "+r.Remedy() {
					got[seen{p.Interface, p.Direction, r.String(), n, string(p.Packet)}] = true
				}
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: dropped %+v, want %+v", name, got, want)
		}
		if wanted := map[string]int{"all": 5, "drops": 0}[name]; others != wanted { // two packets, twice, and the ICMP error
			t.Errorf("%s: %d others, want %d", name, others, wanted)
		}
	}
}

// outerPacket returns an outer packet to outerA.
func outerPacket(t *testing.T, from [4]byte, inner []byte) []byte {
	t.Helper()
	h := ipv4.Header{TotalLen: 20 + len(inner), ID: 9, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: from, Destination: outerA.As4()}
	p := append(make([]byte, 20), inner...)
	h.Put(p)
	return p
}

// Of a batch that was sent in part the file says how many packets were dropped, and of one that was not sent which.
func TestTunnelSent(t *testing.T) {
	a, _ := pair(t, nil)
	of := startCapture(t, a.engine, "", capture.Options{}, nil)
	batch := packet.NewBatch(3, 100)
	for _, b := range batch {
		b.Set(outerPacket(t, outerA.As4(), datagram(40, nil)))
	}
	captures := a.captures.Load()
	a.Tunnel.sent(captures, batch, 1, 0, errors.New("no"))
	a.Tunnel.sent(captures, batch[:2], 0, 0, errors.New("no"))
	f := of.end()
	var comments []string
	for _, p := range f.Packets {
		what, _, _ := strings.Cut(p.Comment, ": the kernel")
		comments = append(comments, what)
	}
	const whole = "dropped: send-failed"
	if got, want := fmt.Sprintf("%q", comments), fmt.Sprintf("%q", []string{"2 packets " + whole, "", "", "", "", "", "", whole, whole, whole, whole}); got != want {
		t.Errorf("the comments are %s, want %s", got, want)
	}
	if n := a.Status().Drops["send-failed"]; n != 4 {
		t.Errorf("%d are counted", n)
	}
}

// stuck is a writer that blocks until free is closed.
type stuck struct{ free chan struct{} }

func (w stuck) Write(p []byte) (int, error) {
	<-w.free
	return len(p), nil
}

// A capture that is not read delays no packet, and says how many packets it has missed.
func TestEngineCapture_slowReader(t *testing.T) {
	a, b := pair(t, nil)
	w := stuck{make(chan struct{})}
	of := startCapture(t, a.engine, "", capture.Options{}, w)
	free := sync.OnceFunc(func() { close(w.free) })
	t.Cleanup(free) // runs before startCapture's, which waits for the capture
	const n = 8000
	received := make(chan int)
	go func() {
		batch, have := packet.NewBatch(64, packet.MaxSize), 0
		for have < n {
			got, err := b.device.ReceiveBatch(batch)
			if err != nil {
				break
			}
			have += got
		}
		received <- have
	}()
	for i := range n {
		if err := a.device.Inject(datagram(1480, nil)); err != nil {
			t.Fatal(err)
		}
		if i%256 == 0 { // no more than the in-memory queues hold
			eventually(t, "they have arrived", func() bool { return b.Status().RxPacket >= uint64(i) })
		}
	}
	select {
	case have := <-received:
		if have != n {
			t.Errorf("%d of %d came out", have, n)
		}
	case <-time.After(patience):
		t.Fatal("packets wait for who reads the capture")
	}
	if s := a.Status(); len(s.Drops) > 0 || s.TxPacket != n {
		t.Errorf("dropped %v, sent %d", s.Drops, s.TxPacket)
	}
	free()
	of.cancel()
	<-of.ended
	if r := of.result; of.err != nil || r.Packets+r.Missed != 2*n || r.Missed == 0 {
		t.Errorf("%+v, %v, and there were %d", r, of.err, 2*n)
	}
}

// A writer that fails ends the capture, and its ring is removed.
func TestEngineCapture_writerFails(t *testing.T) {
	a, b := pair(t, nil)
	r, w := io.Pipe()
	of := startCapture(t, a.engine, "", capture.Options{}, w)
	if _, err := r.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	a.send(t, b, datagram(100, nil))
	select {
	case <-of.ended:
	case <-time.After(patience):
		t.Fatal("it goes on")
	}
	if !errors.Is(of.err, io.ErrClosedPipe) || a.captures.Load() != nil {
		t.Errorf("%v", of.err)
	}
}

// No more than capture.MaxRings captures run at once.
func TestEngineCapture_limit(t *testing.T) {
	a, _ := pair(t, nil)
	var of []*capturing
	for range capture.MaxRings {
		of = append(of, startCapture(t, a.engine, "", capture.Options{}, nil))
	}
	if _, err := a.engine.Capture(t.Context(), "", capture.Options{}, "test", io.Discard); err != ErrCaptures {
		t.Errorf("one more: %v", err)
	}
	if _, err := a.engine.Capture(t.Context(), "other", capture.Options{}, "test", io.Discard); err != os.ErrNotExist {
		t.Errorf("no such tunnel: %v", err)
	}
	of[0].end()
	startCapture(t, a.engine, "", capture.Options{}, nil).end()
}

// A capture ends after Options.Count packets.
func TestEngineCapture_count(t *testing.T) {
	a, b := pair(t, nil)
	of := startCapture(t, a.engine, "", capture.Options{Count: 3, InnerOnly: true}, nil)
	for range 3 {
		a.send(t, b, datagram(100, nil))
	}
	if f := of.await(); len(f.Packets) != 3 {
		t.Errorf("%d packets", len(f.Packets))
	}
}

// A capture goes on while its tunnel changes, or is made again, and ends with it.
func TestEngineCapture_apply(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	const t1 = "name=t1 remote-address=198.51.100.1 keepalive=off"
	apply(t, e, t1, "name=t2 remote-address=198.51.100.2")
	first := e.Tunnel("t1")
	of := startCapture(t, e, "t1", capture.Options{}, nil)
	apply(t, e, t1+" dscp=46", "name=t2 remote-address=198.51.100.2")
	if e.Tunnel("t1") != first || first.captures.Load() == nil {
		t.Fatal("it is not captured after a change")
	}
	apply(t, e, t1+" dscp=46 tun-queues=2")
	second := e.Tunnel("t1")
	if second == first {
		t.Fatal("the tunnel was not made again")
	}
	eventually(t, "the tunnel that was made again is captured", func() bool { return second.captures.Load() != nil })
	second.drop(drop.TooBig)
	eventually(t, "what it drops is in the file", func() bool { return len(of.file().Packets) == 1 })
	apply(t, e, "name=t2 remote-address=198.51.100.2")
	of.await()
	if e.captures.Load() != nil {
		t.Error("there is a capture")
	}
}

// Close of the Engine ends a capture.
func TestEngineCapture_close(t *testing.T) {
	a, _ := pair(t, nil)
	of := startCapture(t, a.engine, "", capture.Options{}, nil)
	if err := a.engine.Close(); err != nil {
		t.Fatal(err)
	}
	of.await()
}

// Captures come and go while packets pass.
func TestEngineCapture_churn(t *testing.T) {
	a, b := pair(t, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
				if _, err := a.engine.Capture(ctx, "", capture.Options{Snaplen: 64}, "test", io.Discard); err != nil {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	for range 300 {
		a.send(t, b, datagram(100, nil))
		b.send(t, a, datagram(100, nil))
	}
	close(stop)
	wg.Wait()
	if s := a.Status(); len(s.Drops) > 0 || a.captures.Load() != nil || a.engine.captures.Load() != nil {
		t.Errorf("dropped %v", s.Drops)
	}
}

// Capturing a packet does not allocate.
func TestEngineCapture_allocations(t *testing.T) {
	a, b := pair(t, nil)
	startCapture(t, b.engine, "", capture.Options{}, io.Discard)
	startCapture(t, a.engine, "", capture.Options{}, io.Discard)
	const batch = 64
	p, got := datagram(1480, nil), packet.NewBatch(batch, packet.MaxSize)
	transfer := func() {
		for range batch {
			a.device.Inject(p)
		}
		for have := 0; have < batch; {
			n, err := b.device.ReceiveBatch(got)
			if err != nil {
				t.Fatal(err)
			}
			have += n
		}
	}
	for range 2 * 1024 / batch { // the in-memory queues grow once
		transfer()
	}
	if allocs := testing.AllocsPerRun(200, transfer); allocs > batch/16 { // the captures' timers may allocate
		t.Errorf("%.2f allocations for %d packets", allocs, batch)
	}
}

// sendDrop does not allocate: with a full queue it is called for each batch.
func TestSendDrop(t *testing.T) {
	full := error(&os.SyscallError{Syscall: "sendmmsg", Err: syscall.ENOBUFS})
	for err, want := range map[error]drop.Reason{
		full: drop.QueueFull, drop.FragmentFailed: drop.FragmentFailed, syscall.EMSGSIZE: drop.TooBig,
		syscall.ENETUNREACH: drop.NoPath, syscall.EPERM: drop.SendFailed,
	} {
		if got := sendDrop(err); got != want {
			t.Errorf("%v is %v, want %v", err, got, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { sendDrop(full) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
