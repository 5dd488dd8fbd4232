package tunnel

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"ipipd/internal/resolve"
	"ipipd/test/memory"
)

// slowName is a name server that answers once say has set the answer.
type slowName struct {
	answer netip.Addr // the zero Addr is an error
	told   chan struct{}
}

func (n *slowName) say(a netip.Addr) {
	n.answer = a
	close(n.told)
}

func (n *slowName) lookUp(ctx context.Context, name string) (resolve.Answer, error) {
	select {
	case <-n.told:
		if !n.answer.IsValid() {
			return resolve.Answer{}, errors.New("no such host")
		}
		return resolve.Answer{Addresses: []netip.Addr{n.answer}}, nil
	case <-ctx.Done():
		return resolve.Answer{}, ctx.Err()
	}
}

const namedA = "name=a remote-address=peer.example address=10.255.0.1/30 route=10.20.0.0/16"

// The remote stays in use until the look-up of the name that takes its place has ended. Then all is as after a
// start with that name.
func TestControlReleaseRemote(t *testing.T) {
	for what, test := range map[string]struct {
		to     string // in addition to the name
		answer netip.Addr
	}{
		"another":     {"", outerD},
		"the-same":    {"", outerB},
		"none":        {"", netip.Addr{}},
		"routes":      {" dscp=46 route=10.50.0.0/16 route=198.51.0.0/16", outerD},
		"routes-none": {" dscp=46 mtu=1400 route=10.50.0.0/16 route=198.51.0.0/16", netip.Addr{}},
	} {
		t.Run(what, func(t *testing.T) {
			sa, sb := memory.NewSocketPair()
			b := start(t, sb, outerB, outerA, nil)
			name := &slowName{told: make(chan struct{})}
			e, m := newModel(t, sa)
			e.lookupName = name.lookUp
			apply(t, e, lineA, lineB)
			a := e.Tunnel("a")
			ea := &endpoint{Tunnel: a, engine: e, network: m.fakeNetwork, device: m.devices["a"], socket: sa}
			apply(t, e, namedA+test.to, lineB)
			for range 3 {
				ea.awaitRound(t)
				ea.send(t, b, datagram(100, nil))
				b.send(t, ea, datagram(100, nil))
			}
			if s := a.Status(); !s.Running || s.CurrentRemoteAddress != outerB.String() || e.Tunnel("a") != a {
				t.Errorf("running %v, the remote is %s", s.Running, s.CurrentRemoteAddress)
			}
			if !m.hasRoute("10.20.0.0/16") || m.hasRoute("10.50.0.0/16") || m.hasRoute("198.51.0.0/16") {
				t.Errorf("before it is resolved there are\n%s", m)
			}
			name.say(test.answer)
			other, _ := memory.NewSocketPair()
			fresh, m2 := newModel(t, other)
			fresh.lookupName = name.lookUp
			apply(t, fresh, namedA+test.to, lineB)
			eventually(t, "it is as a start makes it", func() bool { return state(e, m) == state(fresh, m2) })
			if drops := a.Status().Drops; len(drops) > 0 {
				t.Errorf("dropped %v", drops)
			}
			if len(*e.others.Load()) != 0 {
				t.Errorf("packets are accepted from %v", *e.others.Load())
			}
		})
	}
}

// If a change does not let the remote from before be held, the tunnel is as after a start, without a remote until the
// name is resolved.
func TestControlGiveUpRemote(t *testing.T) {
	for what, test := range map[string]struct{ first, then []string }{
		"another-gets-it":        {[]string{lineA}, []string{namedA, lineB, "name=c remote-address=198.51.100.1"}},
		"another-changes-to-it":  {[]string{lineA}, []string{namedA, lineB + " remote-address=198.51.100.1"}},
		"another-is-remade":      {[]string{lineA}, []string{namedA, lineB + " remote-address=198.51.100.1 tun-queues=1"}},
		"local-address":          {[]string{lineA}, []string{namedA + " local-address=192.0.2.9"}},
		"fwmark":                 {[]string{lineA}, []string{namedA + " fwmark=7"}},
		"made-again":             {[]string{lineA}, []string{namedA + " tun-queues=1"}},
		"back-to-the-address":    {[]string{lineA, namedA}, []string{lineA}},
		"held-and-made-again":    {[]string{lineA, namedA}, []string{namedA + " tun-queues=1"}},
		"held-and-local-address": {[]string{lineA, namedA}, []string{namedA + " local-address=192.0.2.9"}},
	} {
		t.Run(what, func(t *testing.T) {
			if len(test.then) == 1 {
				test.then = append(test.then, lineB)
			}
			name := &slowName{told: make(chan struct{})}
			socket, other := memory.NewSocketPair()
			e, m := newModel(t, socket)
			e.lookupName = name.lookUp
			for _, line := range test.first {
				apply(t, e, line, lineB)
			}
			apply(t, e, test.then...)
			fresh, m2 := newModel(t, other)
			fresh.lookupName = name.lookUp
			apply(t, fresh, test.then...)
			eventually(t, "it is as a start makes it", func() bool { return state(e, m) == state(fresh, m2) })
			if strings.Contains(test.then[0], "example") {
				name.say(outerD)
				eventually(t, "so it is when it is resolved", func() bool {
					return state(e, m) == state(fresh, m2) && e.Tunnel("a").Status().CurrentRemoteAddress == outerD.String()
				})
			}
		})
	}
}

// A held remote stays held after other changes, and after a change to yet another name.
func TestControlReleaseRemote_twice(t *testing.T) {
	name := &slowName{told: make(chan struct{})}
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	e.lookupName = name.lookUp
	apply(t, e, lineA)
	a := e.Tunnel("a")
	ea := &endpoint{Tunnel: a, network: m.fakeNetwork}
	for _, line := range []string{namedA, namedA + " dscp=46 route=10.50.0.0/16", strings.Replace(namedA, "peer", "other", 1) + " route=10.60.0.0/16"} {
		apply(t, e, line)
		ea.awaitRound(t)
		if s := a.Status(); !s.Running || s.CurrentRemoteAddress != outerB.String() || !m.hasRoute("10.20.0.0/16") || m.hasRoute("10.50.0.0/16") || m.hasRoute("10.60.0.0/16") {
			t.Errorf("after %s: running %v, the remote is %s\n%s", line, s.Running, s.CurrentRemoteAddress, m)
		}
	}
	name.say(outerD)
	eventually(t, "the last name counts", func() bool {
		return a.Status().CurrentRemoteAddress == outerD.String() && m.hasRoute("10.60.0.0/16")
	})
}

// Two tunnels exchange names: the tunnel whose name is resolved first waits until the other gives up the address.
func TestEngineRegister_freed(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	m.resolved["one.example"], m.resolved["two.example"] = outerB, outerD
	list := func(a, b string) []string {
		return []string{strings.Replace(namedA, "peer", a, 1), strings.Replace(lineB, "198.51.100.2", b+".example", 1)}
	}
	remote := func(name string) string { return e.Tunnel(name).Status().CurrentRemoteAddress }
	apply(t, e, list("one", "two")...)
	eventually(t, "both are resolved", func() bool { return remote("a") == outerB.String() && remote("b") == outerD.String() })
	slow := make(chan struct{})
	e.lookupName = func(ctx context.Context, name string) (resolve.Answer, error) {
		if name == "one.example" {
			<-slow
		}
		return m.lookUp(ctx, name)
	}
	apply(t, e, list("two", "one")...)
	eventually(t, "a waits for b", func() bool { return strings.Contains(e.Tunnel("a").Status().WaitingFor, "b has the same") })
	close(slow)
	eventually(t, "both are exchanged", func() bool {
		return remote("a") == outerD.String() && remote("b") == outerB.String() && e.Tunnel("a").Status().Running && e.Tunnel("b").Status().Running
	})
}

// A tunnel whose outer addresses another one has is woken when they may be free.
func TestEngineRegister_wakes(t *testing.T) {
	e := &Engine{live: map[*Tunnel]bool{}}
	e.table.Store(&table{})
	newTunnel := func() *Tunnel { return &Tunnel{engine: e, wake: make(chan struct{}, 1)} }
	has, waits, other := newTunnel(), newTunnel(), newTunnel()
	waits.pairTaken.Store(true)
	register := func(t *Tunnel, pair outerPair) { _ = e.register(map[*Tunnel]outerPair{t: pair}, nil) }
	for _, tunnel := range []*Tunnel{waits, other} {
		register(tunnel, 0)
	}
	<-waits.wake
	for _, change := range []func(){
		func() { register(has, 7) }, func() { register(has, 8) }, func() { register(has, 0) },
		func() { register(has, 7) }, func() { _ = e.register(nil, map[*Tunnel]bool{has: true}) },
	} {
		change()
		if len(waits.wake) != 1 || len(other.wake) != 0 {
			t.Fatalf("%d and %d are woken", len(waits.wake), len(other.wake))
		}
		<-waits.wake
	}
}
