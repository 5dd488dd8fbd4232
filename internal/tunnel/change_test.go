package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/resolve"
	"ipipd/internal/warning"
	"ipipd/test/memory"
)

// The answer to a look-up that began before Apply changed the name is ignored, even if the name was set again since.
func TestControlNoteAnswer_outOfDate(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	var asked atomic.Int32
	begun, slow, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	e.lookupName = func(context.Context, string) (resolve.Answer, error) {
		n := asked.Add(1)
		if n == 2 {
			close(begun)
			<-slow
			defer close(ended)
		}
		return resolve.Answer{Addresses: []netip.Addr{netip.AddrFrom4([4]byte{198, 51, 100, byte(n)})}}, nil
	}
	named := strings.Replace(lineA, "198.51.100.1", "peer.example", 1)
	apply(t, e, named)
	a := &endpoint{Tunnel: e.Tunnel("a")}
	has := func(want string) func() bool {
		return func() bool { return a.Status().CurrentRemoteAddress == want }
	}
	eventually(t, "the name is resolved", has("198.51.100.1"))
	a.do(t, func(c *control) { c.resolvedAt = c.resolvedAt.Add(-2 * minTTL) })
	<-begun
	apply(t, e, lineA)
	apply(t, e, named)
	eventually(t, "the new look-up does not wait for the old one", has("198.51.100.3"))
	close(slow)
	<-ended
	for range 100 { // one of the next events is the answer
		a.do(t, func(c *control) {
			if c.remote.String() != "198.51.100.3" {
				t.Errorf("the remote is %v", c.remote)
			}
		})
	}
}

// A change to an MTU that control had set last sets it again if the operator has set another one since.
func TestEngineApply_operatorsMTU(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA)
	a, d := e.Tunnel("a"), m.devices["a"]
	s, _ := d.State()
	made := s.MTU
	if err := d.SetMTU(1300); err != nil {
		t.Fatal(err)
	}
	m.set(func(*fakeNetwork) {})
	eventually(t, "it is seen", func() bool { return a.MTU() == 1300 })
	apply(t, e, fmt.Sprintf("%s mtu=%d", lineA, made))
	if s, _ := d.State(); s.MTU != made || a.MTU() != made {
		t.Errorf("the MTU is %d, and %d is shown; want %d", s.MTU, a.MTU(), made)
	}
}

// When the interface was moved to another network namespace, another one may have its name here: the rps_cpus
// of that are left alone.
func TestEngineApply_movedRPS(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA)
	a, d := e.Tunnel("a"), m.devices["a"]
	s, _ := d.State()
	s.Moved = true
	d.SetState(s)
	m.set(func(*fakeNetwork) {})
	eventually(t, "it is seen", func() bool { return a.iface.Load().Moved })
	apply(t, e, lineA+" rps=3")
	if len(m.rps) > 0 {
		t.Errorf("rps is set: %v", m.rps)
	}
}

// A change in place takes effect while there is no path to the remote, too: received packets are handled by the
// new settings.
func TestEngineApply_noRoute(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA)
	a := e.Tunnel("a")
	m.set(func(w *fakeNetwork) { w.err = errNotKernel })
	eventually(t, "it is seen", func() bool { return a.warned(warning.NoPath) })
	apply(t, e, lineA+" dscp=46 ttl=9 dont-fragment=inherit clamp-tcp-mss=no keepalive-probe=echo keepalive-target=10.255.0.2")
	r := a.route.Load()
	if r.outer.DSCP != 46 || r.outer.TTL != 9 || !r.outer.DontFragmentInherit || r.clampMSS || r.echo == nil {
		t.Errorf("%+v", r)
	}
}

// A learnt path MTU is forgotten when a change gives outer packets another path: device, local address or mark.
func TestEngineApply_pathMTU(t *testing.T) {
	for _, change := range []string{"underlay-device=eth9", "local-address=192.0.2.9", "fwmark=7", "comment=x"} {
		t.Run(change, func(t *testing.T) {
			socket, _ := memory.NewSocketPair()
			e, m := newModel(t, socket)
			m.network(func(m *hostModel) { m.fakeNetwork.devices = map[string]int{"eth9": 9} })
			apply(t, e, lineA+" dont-fragment=inherit")
			a := &endpoint{Tunnel: e.Tunnel("a")}
			a.do(t, func(c *control) {
				c.tooBig(&encap.OuterError{Type: 3, Code: 4, NextHopMTU: 1300, DF: true, TotalLen: 1500, Protocol: 4}, time.Now())
			})
			eventually(t, "it is learnt", func() bool { return a.Status().PathMTU == 1300 })
			apply(t, e, lineA+" dont-fragment=inherit "+change)
			want := 1500
			if change == "comment=x" {
				want = 1300
			}
			if got := a.Status().PathMTU; got != want {
				t.Errorf("the path MTU is %d, want %d", got, want)
			}
		})
	}
}
