package tunnel

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/test/memory"
)

// permutations returns all orders of words.
func permutations(words []string) (all [][]string) {
	if len(words) == 0 {
		return [][]string{nil}
	}
	for i, first := range words {
		for _, rest := range permutations(slices.Concat(words[:i], words[i+1:])) {
			all = append(all, append([]string{first}, rest...))
		}
	}
	return all
}

// present are the things that a tunnel needs of the host's network, and what print says while each is missing.
var present = map[string]struct {
	waiting string
	come    func(*hostModel)
	goes    func(*hostModel)
}{
	"name": {
		waiting: "DNS name peer.example: no such host",
		come:    func(m *hostModel) { m.resolved["peer.example"] = netip.MustParseAddr("198.51.100.1") },
		goes:    func(m *hostModel) { delete(m.resolved, "peer.example") },
	},
	"device": {
		waiting: "underlay-device eth1",
		come:    func(m *hostModel) { m.fakeNetwork.devices = map[string]int{"eth1": 2} },
		goes:    func(m *hostModel) { m.fakeNetwork.devices = nil },
	},
	"address": {
		waiting: "local-address 192.0.2.1, which is not on this host",
		come:    func(m *hostModel) { m.localAbsent = false },
		goes:    func(m *hostModel) { m.localAbsent = true },
	},
	"route": {
		waiting: "route to 198.51.100.1",
		come:    func(m *hostModel) { m.err = nil },
		goes: func(m *hostModel) {
			m.err = &netstate.NoRouteError{Destination: outerB, Remedy: "add one", Err: syscall.ENETUNREACH}
		},
	},
}

// network changes the network, and the names that resolve.
func (m *hostModel) network(f func(*hostModel)) {
	m.fakeNetwork.set(func(*fakeNetwork) {
		m.mu.Lock()
		defer m.mu.Unlock()
		f(m)
	})
}

func (m *hostModel) hasRoute(r string) bool {
	return strings.Contains(m.String()+"\n", "route a "+r+"\n")
}

// A tunnel starts while all that it needs of the network is missing, and runs when all of it has come, in any
// order. Another tunnel is not touched.
func TestEngineApply_anyOrder(t *testing.T) {
	for _, order := range permutations(slices.Sorted(maps.Keys(present))) {
		t.Run(strings.Join(order, "-"), func(t *testing.T) {
			t.Parallel()
			sa, sb := memory.NewSocketPair()
			b := start(t, sb, outerB, outerA, nil)
			e, m := newModel(t, sa)
			m.network(func(m *hostModel) {
				for _, p := range present {
					p.goes(m)
				}
			})
			apply(t, e, "name=a remote-address=peer.example underlay-device=eth1 local-address=192.0.2.1 address=10.255.0.1/30 "+
				"route=10.20.0.0/16 route=198.51.0.0/16 keepalive=1h,3")
			a := e.Tunnel("a")
			d := m.devices["a"]
			for i, what := range order {
				missing := func(what string) bool { return slices.Contains(order[i:], what) }
				says := "route"
				switch {
				case missing("address") && (missing("name") || !missing("device")):
					says = "address"
				case missing("name"):
					says = "name"
				case missing("device"):
					says = "device"
				}
				eventually(t, "print says "+present[says].waiting, func() bool { return a.Status().WaitingFor == present[says].waiting })
				if s := a.Status(); s.Running || d.Running() || s.KeepaliveState != "waiting" {
					t.Errorf("without %v: running %v, carrier %v, keepalive %s", order[i:], s.Running, d.Running(), s.KeepaliveState)
				}
				if (missing("name") || missing("device") || missing("route")) && m.hasRoute("198.51.0.0/16") {
					t.Errorf("without %v there is a route of the remote into the tunnel", order[i:])
				}
				m.network(present[what].come)
			}
			eventually(t, "it runs", func() bool { s := a.Status(); return s.Running && s.WaitingFor == "" && d.Running() })
			eventually(t, "its routes are there", func() bool { return m.hasRoute("10.20.0.0/16") && m.hasRoute("198.51.0.0/16") })
			ea := &endpoint{Tunnel: a, engine: e, network: m.fakeNetwork, device: d, socket: sa}
			ea.send(t, b, datagram(100, nil))
			b.send(t, ea, datagram(100, nil))
			if s := a.Status(); s.KeepaliveState == "never-heard" || s.CurrentLocalAddress != "192.0.2.1" || s.CurrentRemoteAddress != "198.51.100.1" {
				t.Errorf("%+v", s.State)
			}
		})
	}
}

// Two tunnels turn out to have the same outer addresses: the second warns of it, and gets them when the first has ended.
func TestControlRegister_taken(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, "name=n remote-address=peer.example")
	n := e.Tunnel("n")
	m.network(present["name"].come)
	eventually(t, "it says so", func() bool {
		return n.Status().WaitingFor == "a has the same local-address and remote-address: only one tunnel can have both"
	})
	if s := n.Status(); s.Running || len(*e.table.Load()) != 1 {
		t.Errorf("running %v, %d in the table", s.Running, len(*e.table.Load()))
	}
	m.set(func(w *fakeNetwork) { w.err = errNotKernel })
	eventually(t, "it says what is in the way now", func() bool { return n.warned(warning.NoPath) && !n.warned(warning.SamePair) })
	m.set(func(w *fakeNetwork) { w.err = nil })
	eventually(t, "it waits for the first one again", func() bool { return !n.warned(warning.NoPath) && n.warned(warning.SamePair) })
	apply(t, e, "name=n remote-address=peer.example")
	n.wakeControl()
	eventually(t, "it has them", func() bool { return n.Status().Running && len(*e.table.Load()) == 1 })
	if c := m.logLines(warning.SamePair); c != 2 || n.warned(warning.SamePair) {
		t.Errorf("logged %d times, and it warns of %+v", c, n.Status().Warnings)
	}
}

// After a change to something that the network lacks a tunnel waits, as after a start with it, and a change
// back has it run again.
func TestEngineApply_waits(t *testing.T) {
	for _, change := range []string{"underlay-device=eth7", "remote-address=nowhere.example", "remote-address=nowhere.example local-address=192.0.2.1",
		"underlay-device=eth7 route=0.0.0.0/0", "remote-address=nowhere.example route=0.0.0.0/0 keepalive=10s,10"} {
		t.Run(change, func(t *testing.T) {
			socket, other := memory.NewSocketPair()
			e, m := newModel(t, socket)
			apply(t, e, lineA, lineB)
			before, a := state(e, m), e.Tunnel("a")
			for range 2 {
				changed := []string{lineA + " " + change, lineB}
				apply(t, e, changed...)
				fresh, m2 := newModel(t, other)
				apply(t, fresh, changed...)
				said := func(e *Engine) func() bool {
					return func() bool {
						w := e.Tunnel("a").Status().WaitingFor
						return w == "underlay-device eth7" || w == "DNS name nowhere.example: no such host"
					}
				}
				eventually(t, "both say what they wait for", func() bool { return said(e)() && said(fresh)() })
				(&endpoint{Tunnel: a}).do(t, func(*control) {}) // runs after the event that ends the look-up
				if got, want := state(e, m), state(fresh, m2); got != want {
					t.Errorf("changed:\n%s\nstarted:\n%s", got, want)
				}
				if e.Tunnel("a") != a {
					t.Error("it was made again")
				}
				apply(t, e, lineA, lineB)
				eventually(t, "its routes are back", func() bool { return state(e, m) == before })
			}
		})
	}
}

// A default route into the tunnel is not added as long as it would be the route to the remote, too: the tunnel
// waits, and names the loop.
func TestControlPathError_loop(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	m.network(present["route"].goes)
	apply(t, e, lineA+" route=0.0.0.0/0")
	a := e.Tunnel("a")
	eventually(t, "it waits", func() bool { return a.Status().WaitingFor == "route to 198.51.100.1" })
	m.network(func(m *hostModel) { m.err, m.fakeNetwork.metric = nil, 100 })
	eventually(t, "it names the loop", func() bool {
		return strings.Contains(a.Status().WaitingFor, "route 0.0.0.0/0 would be the one to remote-address 198.51.100.1 as well")
	})
	if a.Status().Running || m.hasRoute("0.0.0.0/0") {
		t.Errorf("it runs:\n%s", m)
	}
	m.network(func(m *hostModel) { m.fakeNetwork.metric = 0 })
	eventually(t, "it runs with its route", func() bool { return a.Status().Running && m.hasRoute("0.0.0.0/0") })
}
