package tunnel

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

// align never makes a round early, and lets the rounds of several tunnels coincide.
func TestAlign(t *testing.T) {
	for _, test := range []struct{ at, want time.Duration }{
		{0, 0}, {1, timerGrain}, {timerGrain, timerGrain}, {timerGrain + 1, 2 * timerGrain}, {time.Hour - 1, time.Hour},
	} {
		if got := align(processStart.Add(test.at)).Sub(processStart); got != test.want {
			t.Errorf("%v: got %v, want %v", test.at, got, test.want)
		}
	}
}

// feed injects these inner packets from the peer repeatedly until the test ends.
func feed(t *testing.T, a *endpoint, inner ...[]byte) {
	t.Helper()
	done := make(chan struct{})
	var feeding sync.WaitGroup
	t.Cleanup(func() { close(done); feeding.Wait() })
	feeding.Go(func() {
		for i := 0; ; i++ {
			p := inner[i%len(inner)]
			outer := make([]byte, ipv4.HeaderLen, ipv4.HeaderLen+len(p))
			h := ipv4.Header{TotalLen: cap(outer), ID: uint16(i), TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: outerB.As4(), Destination: outerA.As4()}
			h.Put(outer)
			if err := a.socket.Inject(append(outer, p...), packet.Offload{Checksum: packet.ChecksumValid}); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
}

// A peer that sends data and answers no probe is warned of once, unless no answer is expected, or its own probes
// keep the tunnel running. From these control sees that the peer is behind a NAT.
func TestControlUnanswered(t *testing.T) {
	data, probe := datagram(100, nil), keepalive.ReflectProbe(outerB.As4(), outerA.As4())
	inside := keepalive.ReflectProbe([4]byte{10, 1, 1, 2}, outerA.As4())
	const none = warning.NumCodes
	for _, test := range []struct {
		name  string
		form  keepalive.Form
		inner [][]byte
		want  warning.Code
	}{
		{"reflect", keepalive.FormReflect, [][]byte{data}, warning.KeepaliveUnanswered},
		{"echo", keepalive.FormEcho, [][]byte{data}, warning.KeepaliveUnanswered},
		{"echo-peer-probes", keepalive.FormEcho, [][]byte{data, nil}, none},
		{"empty", keepalive.FormEmpty, [][]byte{data}, none},
		{"answered", keepalive.FormReflect, [][]byte{inside, nil}, none},
		{"peer-probes", keepalive.FormReflect, [][]byte{data, probe}, none},
		{"peer-probes-behind-nat", keepalive.FormReflect, [][]byte{data, inside}, warning.PeerBehindNAT},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			socket, peer := memory.NewSocketPair()
			a := start(t, socket, outerA, outerB, func(c *Config) {
				c.Keepalive, c.KeepaliveProbe = keepalive.Config{Interval: time.Second, Retries: 2}, test.form
				if test.form == keepalive.FormEcho {
					c.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.0.0.1/24")}}
					c.KeepaliveTarget = netip.MustParseAddr("10.0.0.2")
				}
			})
			feed(t, a, test.inner...)
			for probes := 0; probes < 6; {
				b := peer.ReceiveWithin(patience)
				if b == nil {
					t.Fatalf("no more probes come after %d", probes)
				}
				if b.Len() > ipv4.HeaderLen || test.form == keepalive.FormEmpty { // else it answers a probe of the peer
					probes++
				}
			}
			a.awaitRound(t)
			for _, code := range []warning.Code{warning.KeepaliveUnanswered, warning.PeerBehindNAT} {
				if n := a.warned(code); n != (code == test.want) || a.network.logLines(code) > 1 {
					t.Errorf("it warns of %v: %v, want %v, and logs it %d times", code, n, code == test.want, a.network.logLines(code))
				}
			}
			if n := a.sample().ProbesAnswered; n != 0 && test.name != "answered" {
				t.Errorf("%d answers, of a peer that gives none", n)
			}
			if test.want == none {
				return
			}
			if got, want := a.warns(test.want).Detail, "its probe says that it is 10.1.1.2, and comes from "+outerB.String(); test.want == warning.PeerBehindNAT && got != want {
				t.Errorf("%q, want %q", got, want)
			}
			a.noteProbeAnswer(time.Now())
			a.wakeControl()
			eventually(t, "an answer ends it", func() bool { return !a.warned(test.want) })
		})
	}
}

// Received packets above this end's MTU are delivered, and warned of until the MTU is as large as they are.
func TestControlWarnPeerMTU(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.MTU = 1400 })
	b := start(t, sb, outerB, outerA, nil)
	b.send(t, a, datagram(1400, nil))
	a.awaitRound(t)
	if a.warned(warning.PeerMTU) {
		t.Error("it warns of what fits")
	}
	for range 3 {
		if got := b.send(t, a, datagram(1401, nil)); len(got) != 1401 {
			t.Errorf("%d bytes came", len(got))
		}
		eventually(t, "it warns", func() bool { return a.warns(warning.PeerMTU).Detail == "1401 bytes" })
	}
	for range 2 {
		a.awaitRound(t)
	}
	if n := a.network.logLines(warning.PeerMTU); n != 1 {
		t.Errorf("logged %d times", n)
	}
	a.do(t, func(c *control) {
		cfg := *c.cfg
		cfg.MTU = 1401
		c.setConfig(&cfg)
	})
	eventually(t, "it does not any more", func() bool { return !a.warned(warning.PeerMTU) })
}

// Probes are sent as frames, past the kernel's neighbour table: while they are not answered, the kernel has
// to confirm the next hop, whose MAC address may be another by now.
func TestControl_probeConfirmsNextHop(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	a := newEndpoint(t, EngineOptions{}, sa, outerA)
	a.network.open = true
	a.network.route = netstate.Route{Source: outerA.As4(), MTU: 1500, Device: 3, Ethernet: true, Resolved: true}
	cfg := Default()
	cfg.RemoteAddress, cfg.Keepalive, cfg.AllowFastPath = outerB.String(), keepalive.Config{Interval: time.Second, Retries: 3}, Off
	var err error
	if a.Tunnel, err = a.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if a.route.Load().path.Link == nil {
		t.Fatal("probes are no frames")
	}
	eventually(t, "the next hop is confirmed again and again", func() bool { return a.network.refreshes() > 2 })
	start(t, sb, outerB, outerA, nil)
	eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
	before, last := a.network.refreshes(), a.Status().LastHeard
	for range 2 {
		eventually(t, "it answers again", func() bool { return a.Status().LastHeard.After(last) })
		last = a.Status().LastHeard
	}
	if n := a.network.refreshes() - before; n > 0 {
		t.Errorf("a next hop that answers was confirmed %d times", n)
	}
}

// The next hops to many remotes are confirmed even while ICMP errors, which anybody can forge, fill the event queue.
func TestControl_confirmRemotes(t *testing.T) {
	sa, _ := memory.NewSocketPair()
	a := start(t, sa, outerA, outerB, func(c *Config) { c.RemoteAddress, c.LocalAddress = AnyRemote, outerA })
	a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: outerB.As4()}}}}}})
	eventually(t, "the remote is known", func() bool { return len(a.many.routes.Load().all) == 1 })
	busy := make(chan struct{})
	if !a.post(func(*control) { <-busy }) {
		t.Fatal("there is no room for an event")
	}
	eventually(t, "control is busy", func() bool { return !a.post(func(*control) {}) })
	before := a.network.refreshes()
	if err := a.device.Inject(datagram(100, nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "poll has woken it", func() bool { return len(a.wake) > 0 })
	close(busy)
	eventually(t, "the next hop is confirmed", func() bool { return a.network.refreshes() > before })
}
