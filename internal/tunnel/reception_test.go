package tunnel

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/tun"
)

// Occasional packets do not activate the detector, many do, and it expires.
func TestPartialDetector(t *testing.T) {
	start := time.Now()
	u := partialDetector{epoch: start}
	now := start.Add(time.Hour)
	for i := range 10 * partialThreshold { // one per window
		if u.observe(now.Add(time.Duration(i) * partialWindow)) {
			t.Fatalf("%d packets, one a second, are taken for many", i+1)
		}
	}
	now = now.Add(time.Hour)
	for i := range partialThreshold {
		if started := u.observe(now); started != (i == partialThreshold-1) {
			t.Errorf("packet %d: news %v", i+1, started)
		}
	}
	if u.observe(now) {
		t.Error("they are news again")
	}
	if last := now.Add(partialTimeout); !u.active(last.Add(-1)) || u.active(last) {
		t.Error("they are not remembered for a minute")
	}
	for i := range partialThreshold {
		if started := u.observe(now.Add(time.Hour)); started != (i == partialThreshold-1) {
			t.Errorf("an hour later, packet %d: news %v", i+1, started)
		}
	}
}

func TestEngineUpdateReception(t *testing.T) {
	var (
		outerC = netip.MustParseAddr("203.0.113.1")
		local  = outerA.As4()
		only   = func(r underlay.Reception, remote netip.Addr) underlay.Reception {
			r.Local, r.Remote = local, remote.As4()
			return r
		}
		device = netstate.Route{Source: local, MTU: 1500, Device: 3}
	)
	// begin returns an engine and a function that starts a tunnel.
	begin := func(t *testing.T, threads int) (*Engine, *fakeNetwork, *memory.Socket, func(netip.Addr, func(*Config)) *Tunnel) {
		socket, _ := memory.NewSocketPair()
		// Nothing objects to bypassing the IP stack, and each remote can have a route.
		w := &fakeNetwork{open: true, route: device, routes: map[[4]byte]netstate.Route{}, marked: 7, devices: map[string]int{"eth7": 7}}
		h, err := NewEngine(EngineOptions{Socket: socket, Network: w, Threads: threads, OpenDevice: func(o tun.Options) (tun.Device, error) {
			return memory.NewDevice(o.Name, o.MTU), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		return h, w, socket, func(remote netip.Addr, set func(*Config)) *Tunnel {
			cfg := Default()
			cfg.Name, cfg.RemoteAddress, cfg.Keepalive, cfg.AllowFastPath = "t"+remote.String(), remote.String(), keepalive.Config{}, Off
			if set != nil {
				set(&cfg)
			}
			tunnel, err := h.Start(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			return tunnel
		}
	}
	is := func(t *testing.T, socket *memory.Socket, what string, want underlay.Reception) {
		t.Helper()
		eventually(t, what, func() bool { return socket.Reception() == want })
	}
	link := underlay.Reception{LinkLayer: true, LinkDevice: 3}

	t.Run("one-tunnel", func(t *testing.T) {
		_, w, socket, start := begin(t, 2)
		start(outerB, nil)
		is(t, socket, "the interface of the route is received from", only(link, outerB))
		w.set(func(w *fakeNetwork) { w.route.Device = 4 })
		is(t, socket, "the route is followed", only(underlay.Reception{LinkLayer: true, LinkDevice: 4}, outerB))
		w.set(func(w *fakeNetwork) { w.err = netstate.ErrUnsupported })
		is(t, socket, "without a route the raw socket receives", only(underlay.Reception{}, outerB))
		w.set(func(w *fakeNetwork) { w.err = nil; w.route.VRF = true })
		is(t, socket, "in a VRF the raw socket receives", only(underlay.Reception{}, outerB))
	})
	t.Run("several-tunnels", func(t *testing.T) {
		_, w, socket, start := begin(t, 2)
		w.routes[outerC.As4()] = netstate.Route{Source: local, MTU: 1500, Device: 5}
		start(outerB, nil)
		d := netip.MustParseAddr("203.0.113.2")
		second := start(d, nil)
		is(t, socket, "two by one interface are received there, from anybody", link)
		third := start(outerC, nil)
		is(t, socket, "with two interfaces the raw socket receives", underlay.Reception{})
		third.Close()
		is(t, socket, "the third has gone", link)
		second.Close()
		is(t, socket, "the second has gone", only(link, outerB))
	})
	// What rp_filter expects is known only if the route that it looks up, without mark and device, is the tunnel's.
	t.Run("rp_filter-in-doubt", func(t *testing.T) {
		for _, set := range []func(*Config){
			func(c *Config) { c.FwMark = 1 },
			func(c *Config) { c.UnderlayDevice = "eth7" },
		} {
			_, w, socket, start := begin(t, 2)
			tunnel := start(outerB, set)
			path := tunnel.route.Load().path
			want := only(underlay.Reception{Device: path.Device, Mark: path.Mark}, outerB)
			is(t, socket, "the raw socket receives", want)
			w.set(func(w *fakeNetwork) { w.route.Device = 7 })
			want.LinkLayer, want.LinkDevice = true, 7
			is(t, socket, "the other route is the same now", want)
		}
	})
	t.Run("unfinished-checksums", func(t *testing.T) {
		h, w, socket, start := begin(t, 1)
		start(outerB, nil)
		is(t, socket, "one thread has the raw socket", only(underlay.Reception{}, outerB))
		outer := partialTCP(t)
		send := func(n int) {
			for range n {
				if err := socket.Inject(outer, packet.Offload{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		send(1)
		eventually(t, "it is seen", func() bool { return h.partialChecksums.count.Load() == 1 })
		w.set(func(*fakeNetwork) {})
		time.Sleep(20 * time.Millisecond)
		if r := socket.Reception(); r.LinkLayer {
			t.Error("one packet has moved reception")
		}
		send(2 * partialThreshold)
		is(t, socket, "many move it", only(link, outerB))
		h.partialChecksums.last.Store(h.partialChecksums.last.Load() - int64(partialTimeout))
		w.set(func(*fakeNetwork) {})
		is(t, socket, "they are forgotten", only(underlay.Reception{}, outerB))
	})
	// A tunnel without packets of its own need not have a round for the others.
	t.Run("unfinished-checksums-beside-idle", func(t *testing.T) {
		h, _, socket, start := begin(t, 1)
		start(outerB, nil)
		start(outerC, nil)
		outer := partialTCP(t)
		for range 2 * partialThreshold {
			if err := socket.Inject(outer, packet.Offload{}); err != nil {
				t.Fatal(err)
			}
		}
		is(t, socket, "many move it", link)
		h.partialChecksums.last.Store(h.partialChecksums.last.Load() - int64(partialTimeout))
		eventually(t, "traffic without them moves it back", func() bool {
			if err := socket.Inject(outer, packet.Offload{Checksum: packet.ChecksumValid}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
			return !socket.Reception().LinkLayer
		})
	})
	t.Run("failed-receiver", func(t *testing.T) {
		h, _, socket, start := begin(t, 2)
		tunnel := start(outerB, nil)
		is(t, socket, "the link layer receives", only(link, outerB))
		h.disableLinkLayer(netstate.ErrUnsupported)
		is(t, socket, "the raw socket receives", only(underlay.Reception{}, outerB))
		select {
		case <-tunnel.Done():
			t.Error("the tunnel has ended")
		default:
		}
	})
}

// partialTCP returns an outer packet of b whose TCP checksum covers only the pseudo-header.
func partialTCP(t *testing.T) []byte {
	t.Helper()
	p := datagram(60, func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolTCP })
	inner, err := ipv4.Parse(p)
	if err != nil {
		t.Fatal(err)
	}
	sum := ipv4.PseudoHeaderSum(inner.Source(), inner.Destination(), ipv4.ProtocolTCP, 40)
	binary.BigEndian.PutUint16(p[20+16:], ipv4.Fold(sum))
	b := packet.New(packet.MaxSize)
	b.Set(p)
	if inner, err = ipv4.Parse(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	outer := encap.Outer{Local: outerB.As4(), Remote: outerA.As4(), DSCP: encap.InheritDSCP, TTL: 64}
	if d := outer.Encapsulate(b, inner, 1); d != drop.None {
		t.Fatal(d)
	}
	return b.Bytes()
}

// GOMAXPROCS is raised by the number of workers.
func TestThreadCount(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	a, b := pair(t, nil)
	if n := runtime.GOMAXPROCS(0); n < before+4 { // each has two workers
		t.Errorf("GOMAXPROCS is %d with two tunnels, and was %d", n, before)
	}
	for _, s := range []*endpoint{a, b} {
		if err := s.engine.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("GOMAXPROCS is %d when they have ended, and was %d", n, before)
	}
}
