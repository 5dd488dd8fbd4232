package tunnel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ipipd/test/memory"
	"ipipd/test/netlab"
)

// opening has f called before an interface of that name is made, once.
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

// Close ends what an Apply under way starts, and nothing is started afterwards.
func TestEngineApply_engineClosed(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA)
	closed := make(chan error, 1)
	m.opening("c", func() {
		go func() { closed <- e.Close() }()
		time.Sleep(10 * time.Millisecond) // as far as it comes
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

// A tunnel whose last one of that name has failed, and is being closed, waits for that.
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

// A tunnel that is to be made again runs as before after an error, even if its name cannot be resolved any
// more, and its secret file has changed.
func TestEngineApply_restart(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	resolved := netip.MustParseAddr("198.51.100.1")
	e.lookupName = func(context.Context, string) (netip.Addr, error) {
		if !resolved.IsValid() {
			return resolved, errors.New("no server")
		}
		return resolved, nil
	}
	file := filepath.Join(t.TempDir(), "secret")
	write := func(secret string) {
		if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("mellon-mellon-mellon")
	named := strings.Replace(lineA, "198.51.100.1", "peer.example", 1) + " ipsec-secret-file=" + file
	netlab.New(t).Do(func() { // the sockets of IKE are opened there
		apply(t, e, named, lineB)
		before := state(e, m)
		m.failRoute = netip.MustParsePrefix("10.40.0.0/16")
		m.opening("a", func() {
			resolved = netip.Addr{}
			write("another-secret-now")
		})
		err := e.Apply(t.Context(), configs(t, named+" tun-queues=1 route=10.40.0.0/16", lineB))
		if err == nil {
			t.Fatal("no error")
		}
		if got := state(e, m); got != before {
			t.Errorf("after %v:\n%s\nbefore:\n%s", err, got, before)
		}
		if a := e.Tunnel("a"); a == nil || string(a.ipsecPolicy.config.Secret) != "mellon-mellon-mellon" {
			t.Error("it does not run with the secret that it had")
		}
	})
}

// After an error a tunnel that is to be made again has its outer addresses back from the one that was to
// get them.
func TestEngineApply_restartAddresses(t *testing.T) {
	const secret = " ipsec-secret=mellon-mellon-mellon"
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	ns := netlab.New(t)
	ns.Run("ip", "link", "set", "lo", "up")
	ns.Run("ip", "address", "add", "192.0.2.7/32", "dev", "lo")
	ns.Do(func() {
		other, err := net.ListenPacket("udp4", "192.0.2.7:500") // another IKE daemon
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		apply(t, e, lineA+secret)
		before := state(e, m)
		err = e.Apply(t.Context(), configs(t, strings.Replace(lineA, "198.51.100.1", "198.51.100.9", 1)+secret+" tun-queues=1",
			"name=c remote-address=198.51.100.1"+secret, "name=d remote-address=198.51.100.3 local-address=192.0.2.7"+secret))
		if err == nil || !strings.Contains(err.Error(), "d: ") {
			t.Fatal(err)
		}
		if got := state(e, m); got != before {
			t.Errorf("after %v:\n%s\nbefore:\n%s", err, got, before)
		}
	})
}

// A route of the operator's in place of one that a tunnel has lost stays when another tunnel is to get it.
func TestEngineApply_operatorsRoute(t *testing.T) {
	const operators = 7
	route := netip.MustParsePrefix("10.20.0.0/16")
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
