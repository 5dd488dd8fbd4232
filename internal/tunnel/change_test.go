package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"ipipd/internal/resolve"
	"ipipd/test/memory"
)

// What a look-up finds that began before Apply resolved the name, or took it away, is out of date.
func TestEngineApply_resolvedMeanwhile(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	var answer atomic.Pointer[netip.Addr]
	answers := func(a string) { addr := netip.MustParseAddr(a); answer.Store(&addr) }
	begun, slow, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	e.lookupName = func(ctx context.Context, _ string) (resolve.Answer, error) {
		now := *answer.Load()
		if ctx != t.Context() { // of a round
			close(begun)
			<-slow
			defer close(ended)
		}
		return resolve.Answer{Addresses: []netip.Addr{now}}, nil
	}
	named := strings.Replace(lineA, "198.51.100.1", "peer.example", 1)
	answers("198.51.100.1")
	apply(t, e, named)
	a := e.Tunnel("a")
	a.events <- func(c *control) { c.resolvedAt = c.resolvedAt.Add(-2 * minTTL) }
	<-begun
	apply(t, e, lineA)
	answers("198.51.100.5")
	apply(t, e, named)
	close(slow)
	<-ended
	for range 100 { // the answer is one of the next events
		checked := make(chan struct{})
		a.events <- func(c *control) {
			if c.remote.String() != "198.51.100.5" {
				t.Errorf("the remote is %v", c.remote)
			}
			close(checked)
		}
		<-checked
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
	eventually(t, "it is seen", func() bool { return m.logged("no way to the remote") > 0 })
	apply(t, e, lineA+" dscp=46 ttl=9 dont-fragment=inherit clamp-tcp-mss=no keepalive-probe=echo keepalive-target=10.255.0.2")
	r := a.route.Load()
	if r.outer.DSCP != 46 || r.outer.TTL != 9 || !r.outer.DontFragmentInherit || r.clampMSS || r.echo == nil {
		t.Errorf("%+v", r)
	}
}
