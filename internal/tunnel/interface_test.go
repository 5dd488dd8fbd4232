package tunnel

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/warning"
	"ipipd/test/memory"
	"ipipd/tun"
)

// changeInterface changes the device's state and notifies the tunnel.
func (s *endpoint) changeInterface(f func(*tun.State)) {
	state, _ := s.device.State()
	f(&state)
	s.device.SetState(state)
	s.network.set(func(*fakeNetwork) {})
}

// remove removes addresses or routes from the interface and notifies the tunnel.
func (s *endpoint) remove(lost ...fmt.Stringer) {
	s.network.set(func(w *fakeNetwork) {
		w.lost = map[fmt.Stringer]bool{}
		for _, p := range lost {
			w.lost[p] = true
		}
	})
}

// waitRestored waits until exactly these addresses and routes were added to the interface.
func (s *endpoint) waitRestored(t *testing.T, restored ...fmt.Stringer) {
	t.Helper()
	eventually(t, "it is put back", func() bool {
		s.network.mu.Lock()
		defer s.network.mu.Unlock()
		return slices.Equal(s.network.added, restored)
	})
}

var (
	ourAddress = netstate.InterfaceAddress{Prefix: netip.MustParsePrefix("10.255.0.1/30")}
	ourRoute   = netstate.InterfaceRoute{Prefix: netip.MustParsePrefix("10.9.0.0/16")}
)

func configured(c *Config) {
	c.Addresses, c.Routes = []netstate.InterfaceAddress{ourAddress}, []netstate.InterfaceRoute{ourRoute}
}

func TestControlUpdateInterface(t *testing.T) {
	t.Run("renamed", func(t *testing.T) {
		a, _ := pair(t, nil)
		a.changeInterface(func(s *tun.State) { s.Name = "tunx" })
		eventually(t, "print shows the new name", func() bool { s := a.Status(); return s.Name() == "tunx" && s.RenamedFrom == "ipip1" })
		if a.Tunnel.Name() != "tunx" {
			t.Errorf("Name: %s", a.Tunnel.Name())
		}
		a.changeInterface(func(s *tun.State) { s.Name = "ipip1" })
		eventually(t, "it has its name again", func() bool { s := a.Status(); return s.Name() == "ipip1" && s.RenamedFrom == "" })
	})
	t.Run("moved", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.changeInterface(func(s *tun.State) { s.Moved = true })
		eventually(t, "it is said", func() bool { return a.warned(warning.InterfaceMoved) })
		if b := new(buffers).outbound(a.Tunnel); len(b[0].Space()) != packet.MaxSize {
			t.Errorf("packets of %d bytes are read, of an interface whose MTU may be any", len(b[0].Space()))
		}
		a.remove(ourAddress, ourRoute)
		a.awaitRound(t)
		a.waitRestored(t) // nothing
		a.network.set(func(w *fakeNetwork) { w.route.MTU = 1400 })
		a.changeInterface(func(s *tun.State) { s.Moved = false })
		a.waitRestored(t, ourAddress, ourRoute)
		eventually(t, "its MTU is followed again", func() bool { s, _ := a.device.State(); return s.MTU == 1380 })
		eventually(t, "it does not warn any more", func() bool { return !a.warned(warning.InterfaceMoved) })
		if n := a.network.logLines(warning.InterfaceMoved); n != 1 {
			t.Errorf("logged %d times", n)
		}
	})
}

// Control acts on the answer to its new query when the interface has another index: no wake tells it to.
func TestControl_answerOfNewIndex(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	a := newEndpoint(t, EngineOptions{}, socket, outerA)
	a.network.open, a.network.route.Ethernet = true, true
	a.network.egress = map[int]string{77: "no such interface"}
	var err error
	if a.Tunnel, err = a.engine.Start(t.Context(), namedTunnel("t0")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the answer is used", func() bool { return a.Status().FastPath == "no such interface" })
	time.Sleep(3 * minRoundGap) // until there are no more rounds
	a.changeInterface(func(s *tun.State) { s.Index = 78 })
	eventually(t, "the new one is", func() bool { return a.Status().FastPath == errNotKernel.Error() })
}

func TestRestore(t *testing.T) {
	t.Run("flushed", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.remove(ourAddress)
		a.waitRestored(t, ourAddress)
		a.awaitRound(t)
		eventually(t, "it is counted", func() bool { return maps.Equal(a.Status().Restored, map[string]uint64{"address": 1}) })
	})
	t.Run("down", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.changeInterface(func(s *tun.State) { s.Up = false })
		a.remove(ourRoute)
		a.awaitRound(t)
		a.waitRestored(t) // nothing
		a.changeInterface(func(s *tun.State) { s.Up = true })
		a.waitRestored(t, ourRoute)
	})
	t.Run("taken-away-again-and-again", func(t *testing.T) {
		a, _ := pair(t, configured)
		var back []fmt.Stringer
		for range maxRestores {
			a.remove(ourRoute)
			back = append(back, ourRoute)
			a.waitRestored(t, back...)
		}
		a.remove(ourRoute)
		a.awaitRound(t)
		a.waitRestored(t, back...)
		if w := a.warns(warning.LeftAlone); w.Detail != ourRoute.String() || a.Status().Restored["route"] != maxRestores {
			t.Errorf("%+v, restored %v", w, a.Status().Restored)
		}
		// The address has its own count, and setting the interface down resets the counts.
		a.remove(ourRoute, ourAddress)
		back = append(back, ourAddress)
		a.waitRestored(t, back...)
		a.changeInterface(func(s *tun.State) { s.Up = false })
		a.awaitRound(t)
		a.changeInterface(func(s *tun.State) { s.Up = true })
		a.waitRestored(t, append(back, ourRoute)...)
		eventually(t, "it does not warn any more", func() bool { return !a.warned(warning.LeftAlone) })
	})
	t.Run("not-wanted-any-more", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.do(t, func(c *control) { c.restoreCounts[ourRoute] = restoreCount{n: maxRestores, since: time.Now()} })
		eventually(t, "it warns", func() bool { return a.warned(warning.LeftAlone) })
		a.do(t, func(c *control) {
			cfg := *c.cfg
			cfg.Routes = nil
			c.setConfig(&cfg)
		})
		eventually(t, "it does not", func() bool { return !a.warned(warning.LeftAlone) })
	})
	t.Run("down-and-up-at-once", func(t *testing.T) {
		a, _ := pair(t, configured)
		var back []fmt.Stringer
		for range maxRestores + 2 {
			a.network.set(func(w *fakeNetwork) { w.down = true })
			a.remove(ourRoute)
			back = append(back, ourRoute)
			a.waitRestored(t, back...)
		}
		a.awaitRound(t)
		if w := a.warns(warning.LeftAlone); w.Detail != "" {
			t.Errorf("%+v", w)
		}
	})
	t.Run("refused-after-down", func(t *testing.T) { // the mirror knows nothing of peers whose routes were never there
		peer := netstate.InterfaceRoute{Prefix: netip.MustParsePrefix("10.8.0.0/16"), Gateway: outerB}
		sa, _ := memory.NewSocketPair()
		a := start(t, sa, outerA, outerB, func(c *Config) {
			c.RemoteAddress, c.LocalAddress, c.Routes = AnyRemote, outerA, []netstate.InterfaceRoute{peer}
		})
		a.network.set(func(w *fakeNetwork) { w.downs, w.configureErr = w.downs+1, errors.New("no memory") })
		eventually(t, "it is said", func() bool { return a.warned(warning.NotRestored) })
		a.network.set(func(w *fakeNetwork) { w.configureErr = nil })
		a.remove(peer)
		a.waitRestored(t, peer)
		eventually(t, "it does not warn any more", func() bool { return !a.warned(warning.NotRestored) })
		if n := a.Status().Restored["route"]; n != 0 {
			t.Errorf("%d routes were removed by somebody", n)
		}
	})
	t.Run("down-meanwhile", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.network.set(func(w *fakeNetwork) { w.configureErr = fmt.Errorf("add route: %w", syscall.ENETDOWN) })
		a.awaitRound(t)
		if w := a.warns(warning.NotRestored); w.Detail != "" {
			t.Errorf("%+v", w)
		}
	})
	t.Run("refused", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.network.set(func(w *fakeNetwork) { w.configureErr = errors.New("not permitted") })
		both := "not permitted\nnot permitted" // addresses, routes
		eventually(t, "it is said", func() bool { return a.warns(warning.NotRestored).Detail == both })
		a.awaitRound(t)
		if n := a.network.logLines(warning.NotRestored); n != 1 {
			t.Errorf("logged %d times", n)
		}
		a.network.set(func(w *fakeNetwork) { w.configureErr = nil })
		eventually(t, "it does not warn any more", func() bool { return !a.warned(warning.NotRestored) })
	})
}
