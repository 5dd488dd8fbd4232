package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"ipipd/internal/packet"
	"ipipd/tun"
)

// changes is what an operator does to the interface; the network tells of it.
func (s *side) changes(f func(*tun.State)) {
	state, _ := s.device.State()
	f(&state)
	s.device.SetState(state)
	s.world.set(func(*world) {})
}

// loses is that somebody takes addresses or routes away.
func (s *side) loses(what ...netip.Prefix) {
	s.world.set(func(w *world) {
		w.lost = map[netip.Prefix]bool{}
		for _, p := range what {
			w.lost[p] = true
		}
	})
}

// isAdded waits until the interface has been given so many things.
func (s *side) isAdded(t *testing.T, what ...netip.Prefix) {
	t.Helper()
	eventually(t, "it is put back", func() bool {
		s.world.mu.Lock()
		defer s.world.mu.Unlock()
		return slices.Equal(s.world.added, what)
	})
}

// looks waits until the tunnel has looked at everything since what the test did.
func (s *side) looks(t *testing.T) {
	t.Helper()
	s.world.mu.Lock()
	before := s.world.looks
	s.world.mu.Unlock()
	eventually(t, "the tunnel looks around", func() bool {
		s.world.set(func(*world) {})
		s.world.mu.Lock()
		defer s.world.mu.Unlock()
		return s.world.looks > before+1 // one may have been under way
	})
}

var (
	ourAddress = netip.MustParsePrefix("10.255.0.1/30")
	ourRoute   = netip.MustParsePrefix("10.9.0.0/16")
)

func configured(c *Config) {
	c.Addresses, c.Routes = []netip.Prefix{ourAddress}, []netip.Prefix{ourRoute}
}

func TestInterface(t *testing.T) {
	t.Run("renamed", func(t *testing.T) {
		a, _ := pair(t, nil)
		a.changes(func(s *tun.State) { s.Name = "tunx" })
		eventually(t, "print shows the new name", func() bool { s := a.Status(); return s.Name() == "tunx" && s.RenamedFrom == "ipip1" })
		eventually(t, "the log has it", func() bool { return a.world.logged(`msg="the interface was renamed" name=tunx was=ipip1`) == 1 })
		a.looks(t)
		if n := a.world.logged("renamed"); n != 1 {
			t.Errorf("%d lines", n)
		}
		if a.Tunnel.Name() != "tunx" {
			t.Errorf("Name: %s", a.Tunnel.Name())
		}
		a.changes(func(s *tun.State) { s.Name = "ipip1" })
		eventually(t, "it has its name again", func() bool { s := a.Status(); return s.Name() == "ipip1" && s.RenamedFrom == "" })
	})
	t.Run("moved", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.changes(func(s *tun.State) { s.Moved = true })
		eventually(t, "it is said", func() bool { return a.world.logged("moved to another network namespace") == 1 })
		if b := a.outboundBatch(nil); len(b[0].Space()) != packet.MaxSize {
			t.Errorf("packets of %d bytes are read, of an interface whose MTU may be any", len(b[0].Space()))
		}
		a.loses(ourAddress, ourRoute)
		a.looks(t)
		a.isAdded(t) // nothing
		a.world.set(func(w *world) { w.route.MTU = 1400 })
		a.changes(func(s *tun.State) { s.Moved = false })
		a.isAdded(t, ourAddress, ourRoute)
		eventually(t, "its MTU is followed again", func() bool { s, _ := a.device.State(); return s.MTU == 1380 })
		if n := a.world.logged("was moved to another network namespace"); n != 1 {
			t.Errorf("said %d times", n)
		}
	})
}

func TestPutBack(t *testing.T) {
	t.Run("flushed", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.loses(ourAddress)
		a.isAdded(t, ourAddress)
		a.looks(t)
		eventually(t, "it is said", func() bool {
			return a.world.logged(`msg="what the interface had lost is put back" name=ipip1 addresses=[10.255.0.1/30] routes=[]`) == 1
		})
	})
	t.Run("down", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.changes(func(s *tun.State) { s.Up = false })
		a.loses(ourRoute)
		a.looks(t)
		a.isAdded(t) // nothing
		a.changes(func(s *tun.State) { s.Up = true })
		a.isAdded(t, ourRoute)
	})
	t.Run("taken-away-again-and-again", func(t *testing.T) {
		a, _ := pair(t, configured)
		var back []netip.Prefix
		for range putBackTries {
			a.loses(ourRoute)
			back = append(back, ourRoute)
			a.isAdded(t, back...)
		}
		a.loses(ourRoute)
		a.looks(t)
		a.isAdded(t, back...)
		if n := a.world.logged("left alone from now on"); n != 1 {
			t.Errorf("%d warnings", n)
		}
		// The address is another matter, and whoever sets the interface down begins anew.
		a.loses(ourRoute, ourAddress)
		back = append(back, ourAddress)
		a.isAdded(t, back...)
		a.changes(func(s *tun.State) { s.Up = false })
		a.looks(t)
		a.changes(func(s *tun.State) { s.Up = true })
		a.isAdded(t, append(back, ourRoute)...)
	})
	t.Run("down-and-up-at-once", func(t *testing.T) {
		a, _ := pair(t, configured)
		var back []netip.Prefix
		state, _ := a.device.State()
		for range putBackTries + 2 {
			a.world.set(func(w *world) { w.down = map[int]bool{state.Index: true} })
			a.loses(ourRoute)
			back = append(back, ourRoute)
			a.isAdded(t, back...)
		}
		if n := a.world.logged("left alone from now on"); n != 0 {
			t.Errorf("%d warnings", n)
		}
	})
	t.Run("down-meanwhile", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.world.set(func(w *world) { w.refuse = fmt.Errorf("add route: %w", syscall.ENETDOWN) })
		a.looks(t)
		if n := a.world.logged("cannot put back"); n != 0 {
			t.Errorf("%d warnings", n)
		}
	})
	t.Run("refused", func(t *testing.T) {
		a, _ := pair(t, configured)
		a.world.set(func(w *world) { w.refuse = errors.New("not permitted") })
		eventually(t, "it is said", func() bool { return a.world.logged("cannot put back") == 2 }) // addresses, routes
		a.looks(t)
		if n := a.world.logged("cannot put back"); n != 2 {
			t.Errorf("said %d times", n)
		}
	})
}
