package tunnel

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/test/memory"
	"ipipd/tun"
)

// opening has f called once, before an interface with that name is made.
func (m *hostModel) opening(name string, f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onOpen = func(opened string) {
		if opened == name && f != nil {
			call := f
			f = nil
			call()
		}
	}
}

// ends reports whether f returns within patience.
func ends(f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
		return true
	case <-time.After(patience):
		return false
	}
}

// Tunnels are closed while Apply changes one of them and makes another again. Neither waits for the other.
func TestEngineApply_closedMeanwhile(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a, b := e.Tunnel("a"), e.Tunnel("b")
	closed := make(chan error, 1)
	m.opening("c", func() {
		go func() { closed <- e.CloseTunnels(a, b) }()
		eventually(t, "both are closing", func() bool { return a.closing.Load() && b.closing.Load() && b.ctx.Err() != nil })
	})
	if !ends(func() {
		_ = e.Apply(t.Context(), configs(t, lineA+" tun-queues=1", lineB+" dscp=46", "name=c remote-address=198.51.100.9"))
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}) {
		t.Fatal("Apply and CloseTunnels wait for each other")
	}
}

// Close ends the tunnels that an Apply under way starts, and a later Apply starts none.
func TestEngineApply_engineClosed(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA)
	closed := make(chan error, 1)
	m.opening("c", func() {
		go func() { closed <- e.Close() }()
		time.Sleep(10 * time.Millisecond) // so that Close comes as far as it can
	})
	_ = e.Apply(t.Context(), configs(t, lineA, "name=c remote-address=198.51.100.9"))
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if left := m.String(); left != "" {
		t.Errorf("left after Close:\n%s", left)
	}
	if err := e.Apply(t.Context(), configs(t, lineA)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// deafSocket is a socket whose receiver cannot be watched.
type deafSocket struct{ *memory.Socket }

func (s deafSocket) Receivers() []underlay.Receiver {
	return []underlay.Receiver{deafReceiver{s.Socket.Receivers()[0]}}
}

var errDeaf = errors.New("no space left in epoll")

type deafReceiver struct{ underlay.Receiver }

func (deafReceiver) Watch(func(int) error) error { return errDeaf }

// An Engine that could not begin to receive cannot be used any more: a later Apply fails, too.
func TestEngineApply_receivingFails(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, err := NewEngine(EngineOptions{
		Socket: deafSocket{socket}, Network: &fakeNetwork{route: netstate.Route{Source: outerA.As4(), MTU: 1500}},
		OpenDevice: func(o tun.Options) (tun.Device, error) { return memory.NewDevice(o.Name, o.MTU), nil },
		Confine:    func(bool) bool { return true }, // so that Apply begins to receive
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []error{errDeaf, os.ErrClosed} {
		if err := e.Apply(t.Context(), configs(t, lineA)); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// A tunnel is not made before the one of its name that has failed is closed.
func TestEngineApply_closingName(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	apply(t, e, lineA)
	a := e.Tunnel("a")
	block := make(chan struct{})
	a.loops.Add(1)
	go func() { <-block; a.loops.Done() }()
	a.fail(errors.New("no"))
	eventually(t, "it is closing", a.closing.Load)
	time.AfterFunc(20*time.Millisecond, func() { close(block) })
	apply(t, e, lineA)
	if again := e.Tunnel("a"); again == nil || again == a {
		t.Error("the tunnel does not run again")
	}
}

// An operator's route in place of one that a tunnel has lost stays, even if another tunnel is to get the lost route.
func TestEngineApply_operatorsRoute(t *testing.T) {
	const operators = 7
	route := netstate.InterfaceRoute{Prefix: netip.MustParsePrefix("10.20.0.0/16")}
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	m.change(func() { m.routes[route] = operators })
	for _, lines := range [][]string{
		{strings.Replace(lineA, "route=10.20.0.0/16", "", 1), lineB + " route=10.20.0.0/16"},
		{lineB, strings.Replace(lineA, "name=a", "name=c", 1)},
	} {
		if err := e.Apply(t.Context(), configs(t, lines...)); err == nil || !strings.Contains(err.Error(), "leads elsewhere") {
			t.Errorf("%v: %v", lines, err)
		}
		if m.routes[route] != operators {
			t.Errorf("it leads to interface %d", m.routes[route])
		}
	}
	m.change(func() { delete(m.routes, route) })
}

// A route that cannot be taken over is added as soon as the other tunnel has given it up.
func TestEngineApply_takeOverFails(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	m.failNext = true
	apply(t, e, strings.Replace(lineA, "route=10.20.0.0/16", "", 1), lineB+" route=10.20.0.0/16")
	eventually(t, "the route is there", func() bool { return strings.Contains(m.String(), "route b 10.20.0.0/16") })
}
