package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

// Packets are delivered unchanged, and counted at both ends.
func TestOutboundForward(t *testing.T) {
	a, b := pair(t, nil)
	for _, n := range []int{20, 28, 84, 576, 1480} {
		p := datagram(n, nil)
		if got := a.send(t, b, p); !bytes.Equal(got, p) {
			t.Errorf("%d bytes a to b: got %x", n, got)
		}
		if got := b.send(t, a, p); !bytes.Equal(got, p) {
			t.Errorf("%d bytes b to a: got %x", n, got)
		}
	}
	const sum = 20 + 28 + 84 + 576 + 1480
	for _, s := range []*endpoint{a, b} {
		eventually(t, "all are counted", func() bool { s := s.Status(); return s.TxPacket+s.RxPacket == 10 })
		if s := s.Status(); s.TxPacket != 5 || s.TxByte != sum || s.RxPacket != 5 || s.RxByte != sum {
			t.Errorf("counted %d packets, %d bytes out and %d, %d in; want 5 and %d each", s.TxPacket, s.TxByte, s.RxPacket, s.RxByte, sum)
		}
	}
}

// Bytes after the inner Total Length are neither sent nor counted.
func TestOutboundForward_trailingBytes(t *testing.T) {
	a, b := pair(t, nil)
	p := datagram(100, nil)
	if got := a.send(t, b, append(bytes.Clone(p), 1, 2, 3)); !bytes.Equal(got, p) {
		t.Errorf("got %d bytes", len(got))
	}
	eventually(t, "it is counted without them", func() bool { return a.Status().TxByte == 100 })
}

// A GRO or GSO packet counts as its segments, headers included.
func TestCountSegments(t *testing.T) {
	tcp := func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolTCP }
	for _, x := range []struct {
		name           string
		inner          []byte
		size           uint16
		packets, bytes uint64
	}{
		{"TCP with options", datagram(20+32+2500, tcp), 1000, 3, 3*52 + 2500},
		{"TCP, the last one full", datagram(20+32+2000, tcp), 1000, 2, 2*52 + 2000},
		{"UDP", datagram(20+8+301, nil), 100, 4, 4*28 + 301},
		{"not a superpacket", datagram(400, nil), 0, 1, 400},
	} {
		t.Run(x.name, func(t *testing.T) {
			a, _ := pair(t, nil)
			if x.inner[9] == ipv4.ProtocolTCP {
				x.inner[20+12] = 8 << 4
			}
			outer := encap.Outer{Local: outerB.As4(), Remote: outerA.As4(), DSCP: encap.InheritDSCP}
			buf := packet.New(packet.MaxSize)
			buf.Set(x.inner)
			inner, err := ipv4.Parse(buf.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			outer.Encapsulate(buf, inner, 1)
			offload := packet.Offload{}
			if x.size != 0 {
				offload = packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: x.size}
			}
			if err := a.socket.Inject(buf.Bytes(), offload); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is counted", func() bool { return a.Status().RxPacket > 0 })
			if s := a.Status(); s.RxPacket != x.packets || s.RxByte != x.bytes {
				t.Errorf("counted %d packets of %d bytes, want %d of %d; drops %v", s.RxPacket, s.RxByte, x.packets, x.bytes, s.Drops)
			}
		})
	}
}

// Each packet that is not sent is counted under its drop reason.
func TestOutboundForward_drops(t *testing.T) {
	v6 := make([]byte, 60)
	v6[0] = 0x60
	local, remote := outerA.As4(), outerB.As4()
	for name, p := range map[string][]byte{
		"inner-not-ipv4":  v6,
		"inner-malformed": {0x45, 0, 0, 20},
		"inner-ttl-zero":  datagram(40, func(h *ipv4.Header) { h.TTL = 0 }),
		"loop":            datagram(40, func(h *ipv4.Header) { h.Source, h.Destination = local, remote }),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, nil)
			if err := a.device.Inject(p); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is counted", func() bool { return a.Status().Drops[name] == 1 })
			if s := a.Status(); len(s.Drops) != 1 || s.TxPacket != 0 {
				t.Errorf("dropped %v, sent %d", s.Drops, s.TxPacket)
			}
			a.send(t, b, datagram(40, nil)) // the next packet passes
		})
	}
}

// With loss, reordering and corruption, each received packet is delivered or has a drop reason.
func TestTunnelDecapsulate_faultyNetwork(t *testing.T) {
	a, b := pair(t, nil)
	b.socket.SetFaults(memory.Faults{}) // no faults from b to a
	a.socket.SetFaults(memory.Faults{Duplicate: 0.1, Reorder: 0.1, Corrupt: 0.5, Seed: 1})
	const n = 2000
	done := make(chan struct{})
	go func() {
		defer close(done)
		batch := packet.NewBatch(64, packet.MaxSize)
		for {
			if _, err := b.device.ReceiveBatch(batch); err != nil {
				return
			}
		}
	}()
	for range n {
		if err := a.device.Inject(datagram(60, nil)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a has sent everything", func() bool { return a.Status().TxPacket == n })
	eventually(t, "b has accounted for all that arrived", func() bool {
		s := b.Status()
		sum := s.RxPacket
		for _, drops := range []map[string]uint64{s.Drops, s.ProcessDrops} {
			for _, n := range drops {
				sum += n
			}
		}
		return sum >= n-1 // one may be held back by the reordering wire
	})
	if s := b.Status(); len(s.Drops)+len(s.ProcessDrops) < 4 {
		t.Errorf("half of the packets were damaged, and the only reasons are %v and %v", s.Drops, s.ProcessDrops)
	}
	b.engine.Close()
	<-done
}

// Neither direction of the data path allocates.
func TestOutboundForward_allocations(t *testing.T) {
	a, b := pair(t, nil)
	p, syn := datagram(1480, nil), datagram(40, nil)
	testAllocations(t, b, func(i int) {
		if i%2 == 0 {
			a.device.Inject(p)
		} else {
			a.device.Inject(syn)
		}
	})
}

// testAllocations injects packets and receives them at b, and fails if there is one allocation per batch or more.
// The timers of both ends allocate less meanwhile: AllocsPerRun sets GOMAXPROCS to 1, and a waiting worker keeps that P.
func testAllocations(t *testing.T, b *endpoint, inject func(i int)) {
	t.Helper()
	const packets, queued = 4096, 1024
	got := packet.NewBatch(64, packet.MaxSize)
	transfer := func() {
		for range packets / queued {
			for i := range queued {
				inject(i)
			}
			for have := 0; have < queued; {
				n, err := b.device.ReceiveBatch(got)
				if err != nil {
					t.Fatal(err)
				}
				have += n
			}
		}
	}
	for range 2 { // the in-memory queues grow once
		transfer()
	}
	if n := testing.AllocsPerRun(20, transfer); n >= packets/batchSize {
		t.Errorf("%.0f allocations for %d packets", n, packets)
	}
}

// The ICMP 3/4 to the inner sender has the path MTU less 20.
func TestTunnelSendICMPError_tooBig(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.DontFragment, c.MTU = true, 2000 })
	p := datagram(1481, func(h *ipv4.Header) { h.DF = true })
	if err := a.device.Inject(p); err != nil {
		t.Fatal(err)
	}
	checkTooBig(t, a, p, 1480)
	if n := a.Status().Drops["too-big"]; n != 1 {
		t.Errorf("too-big is %d", n)
	}
}

// checkTooBig expects an ICMP 3/4 about p, with that MTU, from the device of s.
func checkTooBig(t *testing.T, s *endpoint, p []byte, mtu int) {
	t.Helper()
	b := s.device.ReceiveWithin(patience)
	if b == nil {
		t.Fatalf("no ICMP message; dropped %v", s.Status().Drops)
	}
	m, err := ipv4.Parse(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	icmp := m.Payload()
	inner, err := ipv4.Parse(p)
	if err != nil {
		t.Fatal(err)
	}
	if m.Protocol() != 1 || icmp[0] != 3 || icmp[1] != 4 || m.Destination() != inner.Source() {
		t.Errorf("got %x", m.Bytes())
	}
	if got := int(binary.BigEndian.Uint16(icmp[6:])); got != mtu {
		t.Errorf("it says %d bytes, want %d", got, mtu)
	}
	if !bytes.HasPrefix(p, icmp[8:8+28]) {
		t.Errorf("it quotes %x", icmp[8:])
	}
}

// An ICMP 3/4 from the outer path sets the path MTU. The next packet above it gets an ICMP error and
// is not sent.
func TestControlTooBig(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	a.send(t, b, p)
	if err := a.socket.InjectError(outerError(outerA, outerB, p, 4, 1400)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the route has it", func() bool { return a.Status().PathMTU == 1400 })
	if err := a.device.Inject(p); err != nil {
		t.Fatal(err)
	}
	checkTooBig(t, a, p, 1380)
	a.send(t, b, datagram(1380, func(h *ipv4.Header) { h.DF = true }))
}

// The path MTU expires after ten minutes (RFC 1191, section 6.3), and with it the route's.
func TestControlUpdateRoute_pathMTUExpires(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	if err := a.socket.InjectError(outerError(outerA, outerB, p, 4, 1400)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the route has it", func() bool { return a.Status().PathMTU == 1400 })
	now := time.Now()
	a.do(t, func(c *control) { c.updateRoute(now.Add(9 * time.Minute)) })
	if got := a.Status().PathMTU; got != 1400 {
		t.Errorf("after nine minutes the path MTU is %d", got)
	}
	a.do(t, func(c *control) { c.updateRoute(now.Add(10 * time.Minute)) })
	if got := a.Status().PathMTU; got != 1500 {
		t.Errorf("after ten minutes the path MTU is %d", got)
	}
	if got := a.send(t, b, p); !bytes.Equal(got, p) {
		t.Error("a packet of the whole size was changed on its way")
	}
}

func TestEngineReceiveICMPErrors_unknownTunnel(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	if err := a.socket.InjectError(outerError(outerA, netip.MustParseAddr("203.0.113.9"), p, 4, 1400)); err != nil {
		t.Fatal(err)
	}
	a.send(t, b, p)
	if s := a.Status(); s.PathMTU != 1500 {
		t.Errorf("path MTU is %d", s.PathMTU)
	}
}

// After an ICMP protocol unreachable each packet of an inner sender gets host unreachable (3/1), until
// a packet of the peer is received.
func TestControlUnreachableError(t *testing.T) {
	a, b := pair(t, nil)
	b.socket.SetFaults(memory.Faults{})
	p := datagram(100, nil)
	if err := a.socket.InjectError(outerError(outerA, outerB, p, 2, 0)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a believes it", a.unreachable.Load)
	for range 2 {
		if err := a.device.Inject(p); err != nil {
			t.Fatal(err)
		}
		a.awaitHostUnreachable(t)
	}
	eventually(t, "it warns", func() bool { return a.warned(warning.PeerNotSetUp) })
	b.send(t, a, p)
	eventually(t, "a believes it", func() bool { return !a.unreachable.Load() && !a.warned(warning.PeerNotSetUp) })
}

// Look-ups in the table work while other tunnels start and end.
func TestEngineRegister_concurrent(t *testing.T) {
	a, b := pair(t, nil)
	device := b.device // Engine.Start replaces b.device
	stop := make(chan struct{})
	var churn sync.WaitGroup
	churn.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			cfg := Default()
			cfg.RemoteAddress = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}).String()
			other, err := b.engine.Start(t.Context(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			if err := other.Close(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 500 {
		if err := a.device.Inject(datagram(100, nil)); err != nil {
			t.Fatal(err)
		}
		if device.ReceiveWithin(patience) == nil {
			t.Fatal("a packet was lost")
		}
	}
	close(stop)
	churn.Wait()
}

// A drop of no tunnel is counted for the process, and a tunnel's for that tunnel only, so that none is counted twice.
func TestEngineCount(t *testing.T) {
	a, _ := pair(t, nil)
	cfg := Default()
	cfg.RemoteAddress = "203.0.113.7"
	second, err := a.engine.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.engine.count(drop.UnknownPeer, 2)
	a.count(drop.TooBig, 3)
	process := map[string]uint64{"unknown-peer": 2}
	for tunnel, want := range map[*Tunnel]map[string]uint64{a.Tunnel: {"too-big": 3}, second: {}} {
		s := tunnel.Status()
		if d := cmp.Diff(want, s.Drops); d != "" {
			t.Error(d)
		}
		if d := cmp.Diff(process, s.ProcessDrops); d != "" {
			t.Error(d)
		}
	}
}

// A second tunnel with the same outer addresses is rejected.
func TestEngineStart_duplicateAddresses(t *testing.T) {
	a, _ := pair(t, nil)
	first := a.device
	cfg := Default()
	cfg.RemoteAddress = outerB.String()
	if _, err := a.engine.Start(t.Context(), cfg); err == nil {
		t.Fatal("the second one started")
	}
	if !a.device.Closed() {
		t.Error("the interface of the second one is still there")
	}
	if first.Closed() {
		t.Error("the first one suffered")
	}
}

// A failed Start leaves neither an interface nor a table entry.
func TestEngineStart_cleanUp(t *testing.T) {
	a, _ := pair(t, nil)
	a.network.set(func(w *fakeNetwork) { w.configureErr = errors.New("no") })
	cfg := Default()
	cfg.RemoteAddress = "203.0.113.1"
	if _, err := a.engine.Start(t.Context(), cfg); err == nil {
		t.Fatal("it started")
	}
	if !a.device.Closed() || len(*a.engine.table.Load()) != 1 {
		t.Error("something is left")
	}
}

// A large MTU on a lossy path is warned of once.
func TestControlWarnFragments(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.MTU = 65515 })
	eventually(t, "it says what a large MTU means", func() bool { return a.warned(warning.Fragments) })
	feed(t, a, datagram(100, nil))
	read := func() { // waits for two reads: one may have been under way
		before := a.network.reassemblies()
		eventually(t, "the counters are read", func() bool { return a.network.reassemblies() > before+1 })
	}
	read()
	a.network.set(func(w *fakeNetwork) { w.reasmOKs, w.reasmFails = 100000, 9 })
	read()
	a.network.set(func(w *fakeNetwork) { w.reasmOKs, w.reasmFails = 100000, 50 }) // one in 2,000
	read()
	if a.warned(warning.FragmentLoss) {
		t.Error("warned although hardly anything is lost")
	}
	for range 3 {
		a.network.set(func(w *fakeNetwork) { w.reasmFails += 1000 })
		eventually(t, "it warns", func() bool { return a.warned(warning.FragmentLoss) })
	}
	if n, m := a.network.logLines(warning.Fragments), a.network.logLines(warning.FragmentLoss); n != 1 || m != 1 {
		t.Errorf("logged %d and %d times", n, m)
	}
}

// Outer packets routed back into the tunnel are all counted, and logged once.
func TestTunnelDrop_loop(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.DontFragment = true })
	local, remote := outerA.As4(), outerB.As4()
	for range 5 {
		// It is above the path MTU, and must not get an ICMP error.
		p := datagram(1480, func(h *ipv4.Header) { h.Source, h.Destination, h.Protocol, h.DF = local, remote, 4, true })
		if err := a.device.Inject(p); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are counted", func() bool { return a.Status().Drops["loop"] == 5 })
	eventually(t, "it warns", func() bool { return a.warned(warning.RouteLoop) })
	if n := a.network.logLines(warning.RouteLoop); n != 1 {
		t.Errorf("logged %d times", n)
	}
	a.do(t, func(c *control) {
		for now := time.Now(); c.warned(warning.RouteLoop); c.round(now) { // as the timer would run it
			if now = c.next(now); now.IsZero() {
				t.Error("it never ends")
				break
			}
		}
	})
	if s := a.Status(); len(s.Drops) != 1 {
		t.Errorf("dropped %v", s.Drops)
	}
}

// Probes keep both ends running, and with packet loss both are lost.
func TestControlProbe(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.Keepalive = keepalive.Config{Interval: time.Second, Retries: 2} })
	eventually(t, "both hear each other", func() bool {
		return a.Status().KeepaliveState == "up" && b.Status().KeepaliveState == "up"
	})
	b.socket.SetFaults(memory.Faults{Loss: 1})
	a.socket.SetFaults(memory.Faults{Loss: 1})
	eventually(t, "a has lost b", func() bool { return a.Status().KeepaliveState == "lost" && !a.device.Running() })
	b.socket.SetFaults(memory.Faults{})
	a.socket.SetFaults(memory.Faults{})
	eventually(t, "a is back", func() bool { return a.Status().KeepaliveState == "up" && a.device.Running() })
}

// A packet from any other source than the remote is dropped as unknown-peer.
func TestInboundCarry_unknownPeer(t *testing.T) {
	a, b := pair(t, nil)
	outer := encap.Outer{Local: [4]byte{203, 0, 113, 1}, Remote: outerA.As4(), DSCP: encap.InheritDSCP}
	buf := packet.New(1500)
	buf.Set(datagram(100, nil))
	inner, err := ipv4.Parse(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	outer.Encapsulate(buf, inner, 1)
	if err := a.socket.Inject(buf.Bytes(), packet.Offload{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is counted", func() bool { return a.Status().ProcessDrops["unknown-peer"] == 1 })
	if p := datagram(60, nil); !bytes.Equal(b.send(t, a, p), p) {
		t.Error("it reached the host")
	}
}

// BenchmarkTunnel moves a batch from one device to the other, through two threads.
func BenchmarkTunnel(b *testing.B) {
	for _, n := range []int{64, 1480} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			const batch = 64
			x, y := pair(b, nil)
			p := datagram(n, nil)
			got := packet.NewBatch(batch, packet.MaxSize)
			b.SetBytes(batch * int64(n))
			b.ReportAllocs()
			for b.Loop() {
				for range batch {
					x.device.Inject(p)
				}
				for have := 0; have < batch; {
					k, err := y.device.ReceiveBatch(got)
					if err != nil {
						b.Fatal(err)
					}
					have += k
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
		})
	}
}
