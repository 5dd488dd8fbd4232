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

	"go.uber.org/goleak"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPacketsComeOutAsTheyWentIn(t *testing.T) {
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
	for _, s := range []*side{a, b} {
		eventually(t, "all are counted", func() bool { s := s.Status(); return s.TxPacket+s.RxPacket == 10 })
		if s := s.Status(); s.TxPacket != 5 || s.TxByte != sum || s.RxPacket != 5 || s.RxByte != sum {
			t.Errorf("counted %d packets, %d bytes out and %d, %d in; want 5 and %d each", s.TxPacket, s.TxByte, s.RxPacket, s.RxByte, sum)
		}
	}
}

func TestWhatIsBehindTheTotalLengthIsNeitherSentNorCounted(t *testing.T) {
	a, b := pair(t, nil)
	p := datagram(100, nil)
	if got := a.send(t, b, append(bytes.Clone(p), 1, 2, 3)); !bytes.Equal(got, p) {
		t.Errorf("got %d bytes", len(got))
	}
	eventually(t, "it is counted without them", func() bool { return a.Status().TxByte == 100 })
}

// What the peer sent as several packets is counted as several, however few the link
// has made of them.
func TestASuperpacketCountsAsWhatItStandsFor(t *testing.T) {
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

func TestEveryPacketThatIsNotSentIsCountedUnderItsName(t *testing.T) {
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
			a.send(t, b, datagram(40, nil)) // and the next one passes
		})
	}
}

// A hostile wire: every packet that comes in is delivered or has a reason why not.
func TestAFaultyWireLosesNothingUncounted(t *testing.T) {
	a, b := pair(t, nil)
	b.socket.SetFaults(memory.Faults{}) // b to a is whole
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
		for _, n := range s.Drops {
			sum += n
		}
		return sum >= n-1 // one may be held back by the reordering wire
	})
	if s := b.Status(); len(s.Drops) < 4 {
		t.Errorf("half of the packets were damaged, and the only reasons are %v", s.Drops)
	}
	b.host.Close()
	<-done
}

// Carrying a packet from one device to the other allocates nothing, either way.
func TestTheDataPathDoesNotAllocate(t *testing.T) {
	a, b := pair(t, nil)
	const batch = 64
	p, syn := datagram(1480, nil), datagram(40, nil)
	got := packet.NewBatch(batch, packet.MaxSize)
	carry := func() {
		for range batch / 2 {
			a.device.Inject(p)
			a.device.Inject(syn)
		}
		for have := 0; have < batch; {
			n, err := b.device.ReceiveBatch(got)
			if err != nil {
				t.Fatal(err)
			}
			have += n
		}
	}
	for range 2 * 1024 / batch { // the rings of the test keep their memory once they had it
		carry()
	}
	if allocs := testing.AllocsPerRun(200, carry); allocs >= 1 {
		t.Errorf("%.2f allocations for %d packets", allocs, batch)
	}
}

func TestTooBigIsToldToTheInnerSenderWithThePathMTULess20(t *testing.T) {
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

// checkTooBig expects the ICMP 3/4 about p at the host of s.
func checkTooBig(t *testing.T, s *side, p []byte, mtu int) {
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

// An ICMP 3/4 from the outer path: the path MTU is learnt, and the sender of the next
// packet that does not fit is told, without its going there to be refused.
func TestThePathMTUIsLearntFromTheOuterPath(t *testing.T) {
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

// What was learnt is forgotten, so that a path that became better is found out
// (RFC 1191, section 6.3): the state machine's ten minutes reach the route.
func TestALearntPathMTUIsForgottenAfterTenMinutes(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	if err := a.socket.InjectError(outerError(outerA, outerB, p, 4, 1400)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the route has it", func() bool { return a.Status().PathMTU == 1400 })
	now := time.Now()
	a.followRoute(now.Add(9 * time.Minute))
	if got := a.Status().PathMTU; got != 1400 {
		t.Errorf("after nine minutes the path MTU is %d", got)
	}
	a.followRoute(now.Add(10 * time.Minute))
	if got := a.Status().PathMTU; got != 1500 {
		t.Errorf("after ten minutes the path MTU is %d", got)
	}
	if got := a.send(t, b, p); !bytes.Equal(got, p) {
		t.Error("a packet of the whole size was changed on its way")
	}
}

func TestAnErrorThatQuotesNoTunnelIsIgnored(t *testing.T) {
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

// Nothing there takes protocol 4: the inner sender is told that its host cannot be
// reached, for each packet that it sends, until the peer is heard.
func TestProtocolUnreachableIsToldToInnerSendersUntilThePeerIsHeard(t *testing.T) {
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
		m := a.device.ReceiveWithin(patience)
		if m == nil {
			t.Fatal("the inner sender is told nothing")
		}
		if icmp := m.Bytes()[ipv4.HeaderLen:]; icmp[0] != 3 || icmp[1] != 1 {
			t.Errorf("the inner sender is told %d/%d", icmp[0], icmp[1])
		}
	}
	if n := a.world.logged("takes protocol 4"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	b.send(t, a, p) // b is there after all
	eventually(t, "a believes it", func() bool { return !a.unreachable.Load() })
}

// The look-up by (source, destination) works while tunnels come and go.
func TestPacketsFindTheirTunnelWhileOthersStartAndEnd(t *testing.T) {
	a, b := pair(t, nil)
	device := b.device // Start replaces it
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
			other, err := b.host.Start(t.Context(), cfg)
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

func TestTwoTunnelsWithTheSameOuterAddressesAreRefused(t *testing.T) {
	a, _ := pair(t, nil)
	first := a.device
	cfg := Default()
	cfg.RemoteAddress = outerB.String()
	if _, err := a.host.Start(t.Context(), cfg); err == nil {
		t.Fatal("the second one started")
	}
	if !a.device.Closed() {
		t.Error("the interface of the second one is still there")
	}
	if first.Closed() {
		t.Error("the first one suffered")
	}
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	a, _ := pair(t, nil)
	a.world.set(func(w *world) { w.refuse = errors.New("no") })
	cfg := Default()
	cfg.RemoteAddress = "203.0.113.1"
	if _, err := a.host.Start(t.Context(), cfg); err == nil {
		t.Fatal("it started")
	}
	if !a.device.Closed() || len(*a.host.table.Load()) != 1 {
		t.Error("something is left")
	}
}

// The local address and the MTU come from the route, and follow it.
func TestATunnelFollowsItsRoute(t *testing.T) {
	a, b := pair(t, nil)
	a.world.set(func(w *world) { w.route = netstate.Route{Source: [4]byte{192, 0, 2, 99}, MTU: 1400} })
	eventually(t, "the address and the MTU are the route's", func() bool {
		s := a.Status()
		return s.CurrentLocalAddress == "192.0.2.99" && s.ActualMTU == 1380
	})
	if s, _ := a.device.State(); s.MTU != 1380 {
		t.Errorf("the device has an MTU of %d", s.MTU)
	}
	if err := a.device.Inject(datagram(100, nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b does not know who that is", func() bool { return b.Status().Drops["unknown-peer"] == 1 })

	a.world.set(func(w *world) { w.err = errors.New("no route") })
	a.world.set(func(w *world) { w.route, w.err = netstate.Route{Source: outerA.As4(), MTU: 1500}, nil })
	eventually(t, "it has come back", func() bool { return a.Status().CurrentLocalAddress == outerA.String() })
	a.send(t, b, datagram(1480, nil))
}

func TestALargeMTUOnALossyPathIsWarnedOfOnce(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.MTU = 65515 })
	eventually(t, "it says what a large MTU means", func() bool { return a.world.logged("sent in fragments") == 1 })
	a.world.set(func(w *world) { w.reassembled, w.unassembled = 100000, 9 })
	a.world.set(func(w *world) { w.reassembled, w.unassembled = 100000, 50 }) // one in 2,000
	if n := a.world.logged("fragments are lost"); n != 0 {
		t.Error("warned although hardly anything is lost")
	}
	for range 3 {
		a.world.set(func(w *world) { w.unassembled += 1000 })
		eventually(t, "it warns", func() bool { return a.world.logged("fragments are lost") == 1 })
	}
	if n := a.world.logged("sent in fragments"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

// The outer packet routed back into the tunnel: counted each time, said once.
func TestALoopIsCountedAndLoggedOnce(t *testing.T) {
	a, _ := pair(t, func(c *Config) { c.DontFragment = true })
	local, remote := outerA.As4(), outerB.As4()
	for range 5 {
		// Larger than the path: it must not be answered either.
		p := datagram(1480, func(h *ipv4.Header) { h.Source, h.Destination, h.Protocol, h.DF = local, remote, 4, true })
		if err := a.device.Inject(p); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are counted", func() bool { return a.Status().Drops["loop"] == 5 })
	if n := a.world.logged("a loop"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	if s := a.Status(); len(s.Drops) != 1 {
		t.Errorf("dropped %v", s.Drops)
	}
}

// The route into the tunnel itself gives an inner address for the source. With it
// the peer's packets would be those of an unknown peer for as long as the loop lasts.
func TestALoopDoesNotChangeTheLocalAddress(t *testing.T) {
	a, b := pair(t, nil)
	a.world.set(func(w *world) { w.err = errors.New("no route") })
	eventually(t, "there is no way", func() bool { return a.world.logged("no way to the remote; it is looked for") == 1 })
	a.world.set(func(w *world) {
		w.err = nil
		w.route.Device, w.route.Source = 77, [4]byte{10, 0, 0, 1}
	})
	eventually(t, "there is one again", func() bool { return a.world.logged("a way to the remote again") == 1 })
	a.mu.Lock() // until the look at the route has ended
	local := address(a.route.Load().path.Local)
	a.mu.Unlock()
	if local != outerA {
		t.Errorf("the local address is %v", local)
	}
	if p := datagram(60, nil); !bytes.Equal(b.send(t, a, p), p) {
		t.Error("the peer's packets do not arrive")
	}
}

// Two tunnels routed into each other would take 20 bytes off each other's MTU for
// as long as there are any.
func TestAnMTUThatFollowsItselfIsHeld(t *testing.T) {
	a, _ := pair(t, nil)
	for mtu := 1480; mtu >= 1200; mtu -= 40 {
		a.world.set(func(w *world) { w.route.MTU = mtu })
		if want := max(mtu, 1400) - 20; mtu >= 1400 {
			eventually(t, "it follows", func() bool { return a.Status().ActualMTU == want })
		}
	}
	eventually(t, "it says that it stops", func() bool { return a.world.logged("not lowered any further") == 1 })
	if mtu := a.Status().ActualMTU; mtu != 1380 {
		t.Errorf("the MTU is %d", mtu)
	}
	a.world.set(func(w *world) { w.route.MTU = 1500 })
	eventually(t, "it goes up again", func() bool { return a.Status().ActualMTU == 1480 })
	a.world.set(func(w *world) { w.route.MTU = 1200 })
	eventually(t, "and down", func() bool { return a.Status().ActualMTU == 1180 })
}

func TestProbesKeepBothEndsUpAndLossIsSeen(t *testing.T) {
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

// A peer that cannot have sent it: nothing but the tunnel's two addresses counts.
func TestOnlyTheConfiguredRemoteIsHeard(t *testing.T) {
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
	eventually(t, "it is counted", func() bool { return a.Status().Drops["unknown-peer"] == 1 })
	if p := datagram(60, nil); !bytes.Equal(b.send(t, a, p), p) {
		t.Error("it reached the host")
	}
}

// A batch from one device to the other, through both data paths and two hand-overs
// between threads.
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
