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

// What a look-up finds that began before Apply has taken the name away is out of date, also if the name is
// back.
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
	for range 100 { // the answer is one of the next events
		a.do(t, func(c *control) {
			if c.remote.String() != "198.51.100.3" {
				t.Errorf("the remote is %v", c.remote)
			}
		})
	}
}

// An MTU is set though the tunnel had it before, if the operator has set another since.
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

// An interface that has been moved to another network namespace leaves its name to another one, whose
// rps_cpus are not the tunnel's.
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

// What a change in place says of packets holds while there is no way to the remote, too: those that are
// received are handled by it.
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

// What was learnt of a path is not true of another one: by another device, or from another address.
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
