package tunnel

import (
	"errors"
	"strings"
	"testing"
	"time"

	"ipipd/internal/warning"
	"ipipd/test/memory"
	"ipipd/tun"
)

// An interface that is deleted is made again as it was, and the tunnel's counters go on.
func TestControlRemakeInterface(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	b := start(t, sb, outerB, outerA, nil)
	e, m := newModel(t, sa)
	apply(t, e, lineA+" mtu=1400 rps=3", lineB)
	before, a := state(e, m), e.Tunnel("a")
	ea := func() *endpoint {
		m.mu.Lock()
		defer m.mu.Unlock()
		return &endpoint{Tunnel: a, engine: e, network: m.fakeNetwork, device: m.devices["a"], socket: sa}
	}
	ea().send(t, b, datagram(100, nil))
	opened := m.opened
	m.deleteInterface(a)
	eventually(t, "it is made again", func() bool { return state(e, m) == before })
	ea().send(t, b, datagram(100, nil))
	b.send(t, ea(), datagram(100, nil))
	if s := a.Status(); s.TxPacket != 2 || s.RxPacket != 1 || e.Tunnel("a") != a || m.opened != opened+1 {
		t.Errorf("tx-packet %d, rx-packet %d, %d interfaces are made", s.TxPacket, s.RxPacket, m.opened-opened)
	}
	if s := a.Status(); s.Restored["interface"] != 1 || len(s.Warnings) > 0 || m.logLines(warning.InterfaceGone) != 1 {
		t.Errorf("restored %v, and it warns of %+v", s.Restored, s.Warnings)
	}
}

// While another interface has its name the tunnel waits, and print says so; Apply can change the tunnel meanwhile.
func TestControlRemakeInterface_nameTaken(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a := e.Tunnel("a")
	var taken bool
	open := e.openDevice
	e.openDevice = func(o tun.Options) (tun.Device, error) {
		m.mu.Lock()
		refused := taken
		m.mu.Unlock()
		if refused && o.Name == "a" {
			return nil, tun.ErrNameTaken
		}
		return open(o)
	}
	take := func(t bool) { m.change(func() { taken = t }) }
	take(true)
	m.deleteInterface(a)
	eventually(t, "it says so", func() bool {
		s := a.Status()
		return s.WaitingFor == "the name a, which another interface has" && !s.Running && !s.Disabled &&
			a.warned(warning.InterfaceGone) && a.warned(warning.InterfaceNotMade)
	})
	apply(t, e, lineA+" dscp=46 address=10.8.0.1/24 route=10.40.0.0/16 rps=1 mtu=1400", lineB)
	apply(t, e, lineA+" dscp=46 route=10.50.0.0/16", lineB+" route=10.40.0.0/16")
	take(false)
	eventually(t, "it is there", func() bool { return a.Status().Running })
	other, _ := memory.NewSocketPair()
	fresh, m2 := newModel(t, other)
	apply(t, fresh, lineA+" dscp=46 route=10.50.0.0/16", lineB+" route=10.40.0.0/16")
	eventually(t, "all is as it would be started", func() bool { return state(e, m) == state(fresh, m2) })
	if n := m.logLines(warning.InterfaceNotMade); n != 1 || a.warned(warning.InterfaceGone) || a.warned(warning.InterfaceNotMade) {
		t.Errorf("logged %d times, and it warns of %+v", n, a.Status().Warnings)
	}
}

// A tunnel whose interface is gone can be removed, and another one gets its name and addresses.
func TestControlRemakeInterface_removedMeanwhile(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a := e.Tunnel("a")
	m.failOpen = "a"
	m.deleteInterface(a)
	eventually(t, "it cannot be made", func() bool { return a.warned(warning.InterfaceNotMade) })
	m.change(func() { m.failOpen = "" })
	apply(t, e, strings.Replace(lineA, "name=a", "name=c", 1), lineB)
	if got := m.String(); strings.Contains(got, "link a") || !strings.Contains(got, "route c 10.20.0.0/16") {
		t.Errorf("there is\n%s", got)
	}
}

// An interface that is deleted again and again is made again only after lastRemake each time.
func TestControlInterfaceGone_often(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	apply(t, e, lineA)
	a := &endpoint{Tunnel: e.Tunnel("a")}
	now := time.Now()
	lose := func(at time.Time) (wait time.Duration) {
		a.do(t, func(c *control) {
			c.interfaceGone(c.device, errors.New("no"), at)
			wait = c.lost.at.Sub(at)
			c.lost.at = at // now
			c.remakeInterface(at)
		})
		return wait
	}
	for i := range maxRemakes {
		if wait := lose(now.Add(time.Duration(i) * time.Second)); wait != 0 {
			t.Errorf("time %d: after %v", i+1, wait)
		}
	}
	for i := range 3 {
		now = now.Add(lastRemake)
		if wait := lose(now); wait != lastRemake {
			t.Errorf("after time %d of many: after %v", i+1, wait)
		}
	}
	if wait := lose(now.Add(2 * remakeWindow)); wait != 0 {
		t.Errorf("after a time without: after %v", wait)
	}
}

// If the interface was deleted just before a change, and control does not know it yet, the change does not fail.
func TestEngineApply_justDeleted(t *testing.T) {
	socket, other := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a := &endpoint{Tunnel: e.Tunnel("a")}
	var device *modelDevice
	a.do(t, func(c *control) { device = c.device.(*modelDevice) })
	device.delete()
	changed := []string{lineA + " address=10.9.0.1/24 route=10.40.0.0/16", lineB + " dscp=46"}
	apply(t, e, changed...)
	device.Delete()
	fresh, m2 := newModel(t, other)
	apply(t, fresh, changed...)
	eventually(t, "it is made again with what is new", func() bool { return state(e, m) == state(fresh, m2) })
}
