package tunnel

import (
	"strings"
	"testing"
	"time"

	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

func TestTunnelSuspended(t *testing.T) {
	t.Run("absent", func(t *testing.T) {
		// b does not probe, and receives only the first probe of a.
		sa, sb := memory.NewSocketPair()
		b := start(t, sb, outerB, outerA, nil)
		a := start(t, sa, outerA, outerB, func(c *Config) { c.Keepalive = keepalive.Config{Interval: time.Hour, Retries: 3} })
		lastReceived := func() time.Time { return b.lastReceived() }
		eventually(t, "the first probe arrives", func() bool { return !lastReceived().IsZero() })
		eventually(t, "a is up", func() bool { return a.Status().Running })
		a.network.set(func(w *fakeNetwork) { w.localAbsent = true })
		eventually(t, "print says so", func() bool {
			s := a.Status()
			return !s.Running && s.KeepaliveState == "waiting" && strings.Contains(s.WaitingFor, "local-address 192.0.2.1, which is not on this host") &&
				a.warns(warning.NoLocalAddress).Detail == "192.0.2.1"
		})
		eventually(t, "the carrier is gone", func() bool { return !a.device.Running() })

		before := lastReceived()
		a.do(t, (*control).probe) // a probe that was due at that moment
		a.device.SetCarrier(true)
		if err := a.device.Inject(datagram(100, nil)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "what is not sent is counted", func() bool { return a.Status().Drops["no-local-address"] == 2 })
		if m := a.device.ReceiveWithin(patience); m == nil || m.Bytes()[20] != 3 {
			t.Errorf("the inner sender gets no ICMP error: %v", m)
		}
		// Packets in transit to that address are neither accepted nor answered.
		passed := a.Status().ProcessDrops["unknown-peer"]
		if err := b.device.Inject(datagram(100, nil)); err != nil {
			t.Fatal(err)
		}
		b.do(t, (*control).probe)
		eventually(t, "they are counted", func() bool { return a.Status().ProcessDrops["unknown-peer"] >= passed+2 })
		if !lastReceived().Equal(before) {
			t.Error("the peer heard something")
		}
		a.device.SetCarrier(false)

		// Without a new keepalive the next probe would be due in an hour.
		a.network.set(func(w *fakeNetwork) { w.localAbsent = false })
		eventually(t, "the peer hears a probe", func() bool { return lastReceived().After(before) })
		eventually(t, "a is running", func() bool { s := a.Status(); return s.Running && s.WaitingFor == "" && a.device.Running() })
		a.awaitRound(t)
		if w := a.Status().Warnings; len(w) > 0 {
			t.Errorf("it warns of %+v", w)
		}
	})
	t.Run("absent-without-a-route", func(t *testing.T) {
		a, _ := pair(t, nil)
		a.network.set(func(w *fakeNetwork) { w.localAbsent, w.err = true, errNotKernel })
		eventually(t, "print says so", func() bool { return a.Status().WaitingFor != "" })
	})
}

// underlay-device is a name: an interface that loses it is no longer used.
func TestControlSetWaiting_underlayDevice(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	b := start(t, sb, outerB, outerA, nil)
	s := newEndpoint(t, EngineOptions{}, sa, outerA)
	s.network.devices = map[string]int{"eth0": 2}
	cfg := Default()
	cfg.RemoteAddress, cfg.UnderlayDevice, cfg.Keepalive = outerB.String(), "eth0", keepalive.Config{}
	var err error
	if s.Tunnel, err = s.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	s.send(t, b, datagram(100, nil))
	s.network.set(func(w *fakeNetwork) { w.devices = map[string]int{"eth9": 2} })
	eventually(t, "it is said", func() bool { return s.warns(warning.NoRoute).Detail == "underlay-device eth0" })
	if err := s.device.Inject(datagram(100, nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing leaves", func() bool { return s.Status().Drops["no-path"] == 1 })
	s.network.set(func(w *fakeNetwork) { w.devices = map[string]int{"eth9": 2, "eth0": 5} })
	eventually(t, "the other one is used", func() bool { return !s.warned(warning.NoRoute) && s.route.Load().path.Device == 5 })
	for s.device.ReceiveWithin(time.Millisecond) != nil { // discard ICMP errors
	}
	s.send(t, b, datagram(100, nil))
}
