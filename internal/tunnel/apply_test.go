package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/resolve"
	"ipipd/test/memory"
	"ipipd/tun"
)

// hostModel is a Network that keeps addresses, routes and rps_cpus as a host does.
type hostModel struct {
	*fakeNetwork
	mu        sync.Mutex
	resolved  map[string]netip.Addr // what LookupName knows
	addresses map[configuredAddress]bool
	routes    map[netstate.InterfaceRoute]int
	rps       map[string]string
	devices   map[string]*memory.Device // by name; those that are not closed
	opened    int
	calls     int // those that change anything
	gaps      int // routes that led nowhere for a while
	failOpen  string
	failRoute netstate.InterfaceRoute
	failNext  bool              // ReplaceRoutes fails, once
	onOpen    func(name string) // called before an interface is made
}

type configuredAddress struct {
	device  int
	address netstate.InterfaceAddress
}

func (m *hostModel) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	f()
}

func (m *hostModel) Configure(interfaces []netstate.Interface) error {
	for _, i := range interfaces {
		if _, err := m.AddAddresses(i.Index, i.Addresses); err != nil {
			return &netstate.InterfaceError{Index: i.Index, Err: err}
		}
		if _, err := m.AddRoutes(i.Index, i.Routes); err != nil {
			return &netstate.InterfaceError{Index: i.Index, Err: err}
		}
		for _, r := range i.Routes {
			if err := m.CheckRoute(i.Index, r); err != nil {
				return &netstate.InterfaceError{Index: i.Index, Err: err}
			}
		}
	}
	return nil
}

func (m *hostModel) AddAddresses(device int, addresses []netstate.InterfaceAddress) (added []netstate.InterfaceAddress, err error) {
	for _, a := range addresses {
		m.change(func() {
			if key := (configuredAddress{device, a}); !m.exists(device) {
				err = syscall.ENODEV
			} else if !m.addresses[key] {
				m.addresses[key] = true
				added = append(added, a)
			}
		})
	}
	return added, err
}

// exists reports whether there is an interface with that index. mu is held.
func (m *hostModel) exists(device int) bool {
	for _, d := range m.devices {
		if s, _ := d.State(); s.Index == device {
			return true
		}
	}
	return false
}

func (m *hostModel) AddRoutes(device int, routes []netstate.InterfaceRoute) (added []netstate.InterfaceRoute, err error) {
	for _, r := range routes {
		m.change(func() {
			if r == m.failRoute {
				err = syscall.ENOMEM
			} else if !m.exists(device) {
				err = syscall.ENODEV
			} else if m.routes[r] == 0 {
				m.routes[r] = device
				added = append(added, r)
			}
		})
	}
	return added, err
}

func (m *hostModel) CheckRoute(device int, route netstate.InterfaceRoute) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.routes[route] != device {
		return fmt.Errorf("add route %v: it leads elsewhere: %w", route, syscall.EEXIST)
	}
	return nil
}

func (m *hostModel) RemoveAddresses(device int, addresses []netstate.InterfaceAddress) error {
	for _, a := range addresses {
		m.change(func() { delete(m.addresses, configuredAddress{device, a}) })
	}
	return nil
}

func (m *hostModel) RemoveRoutes(device int, routes []netstate.InterfaceRoute) error {
	for _, r := range routes {
		m.change(func() {
			if m.routes[r] == device {
				delete(m.routes, r)
			}
		})
	}
	return nil
}

func (m *hostModel) ExistingRoutes(interfaces []netstate.Interface) (map[netstate.InterfaceRoute]bool, error) {
	existing := map[netstate.InterfaceRoute]bool{}
	for _, i := range interfaces {
		for _, r := range i.Routes {
			if m.CheckRoute(i.Index, r) == nil {
				existing[r] = true
			}
		}
	}
	return existing, nil
}

func (m *hostModel) ReplaceRoutes(device int, routes []netstate.InterfaceRoute) error {
	if m.failNext {
		m.failNext = false
		return syscall.ENOBUFS
	}
	for _, r := range routes {
		m.change(func() {
			if m.routes[r] == 0 {
				m.gaps++
			}
			m.routes[r] = device
		})
	}
	return nil
}

func (m *hostModel) SetRPS(name, mask string) error {
	m.change(func() { m.rps[name] = mask })
	return nil
}

func (m *hostModel) ClearRPS(name, mask string) error {
	m.change(func() {
		if m.rps[name] == mask {
			delete(m.rps, name)
		}
	})
	return nil
}

// modelDevice is a memory.Device of a hostModel.
type modelDevice struct {
	*memory.Device
	model *hostModel
	index int
}

func (d *modelDevice) Close() error {
	d.delete()
	return d.Device.Close()
}

// delete removes the interface with its addresses and routes from the host.
func (d *modelDevice) delete() {
	d.model.change(func() {
		if d.model.devices[d.Name()] != d.Device { // it was deleted before
			return
		}
		maps.DeleteFunc(d.model.addresses, func(a configuredAddress, _ bool) bool { return a.device == d.index })
		maps.DeleteFunc(d.model.routes, func(_ netstate.InterfaceRoute, device int) bool { return device == d.index })
		delete(d.model.rps, d.Name())
		delete(d.model.devices, d.Name())
	})
}

// deleteInterface is ip link delete.
func (m *hostModel) deleteInterface(t *Tunnel) {
	d := make(chan *modelDevice)
	t.events <- func(c *control) { d <- c.device.(*modelDevice) }
	device := <-d
	device.delete()
	device.Delete()
}

func (m *hostModel) open(o tun.Options) (tun.Device, error) {
	m.mu.Lock()
	onOpen := m.onOpen
	m.mu.Unlock()
	if onOpen != nil {
		onOpen(o.Name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	if o.Name == m.failOpen || m.devices[o.Name] != nil {
		return nil, fmt.Errorf("make %s: %w", o.Name, syscall.EBUSY)
	}
	m.opened++
	d := memory.NewDevice(o.Name, o.MTU)
	d.SetState(tun.State{Name: o.Name, Index: 100 + m.opened, Up: true, Carrier: true})
	m.devices[o.Name] = d
	return &modelDevice{d, m, 100 + m.opened}, nil
}

// String lists what the host has, by names of interfaces and not by indices.
func (m *hostModel) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var lines []string
	names := map[int]string{}
	for name, d := range m.devices {
		s, _ := d.State()
		names[s.Index] = name
		lines = append(lines, fmt.Sprintf("link %s mtu %d rps %q", name, s.MTU, m.rps[name]))
	}
	for a := range m.addresses {
		lines = append(lines, fmt.Sprintf("address %s %v", names[a.device], a.address))
	}
	for r, device := range m.routes {
		lines = append(lines, fmt.Sprintf("route %s %v", names[device], r))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (m *hostModel) lookUp(_ context.Context, name string) (resolve.Answer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a, ok := m.resolved[name]; ok {
		return resolve.Answer{Addresses: []netip.Addr{a}}, nil
	}
	return resolve.Answer{}, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

// newModel returns an engine on a hostModel.
func newModel(t *testing.T, socket *memory.Socket) (*Engine, *hostModel) {
	t.Helper()
	m := &hostModel{
		fakeNetwork: &fakeNetwork{route: netstate.Route{Source: outerA.As4(), MTU: 1500}},
		resolved:    map[string]netip.Addr{}, addresses: map[configuredAddress]bool{}, routes: map[netstate.InterfaceRoute]int{}, rps: map[string]string{}, devices: map[string]*memory.Device{},
	}
	e, err := NewEngine(EngineOptions{Log: slog.New(slog.NewTextHandler(m.fakeNetwork, nil)), Socket: socket, Network: m, OpenDevice: m.open,
		LookupName: m.lookUp})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if left := m.String(); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
	})
	return e, m
}

// config parses a tunnel's Config from words name=value, as flags would set it; ~ is a blank.
func config(t *testing.T, words string) Config {
	t.Helper()
	c, err := parseConfig(words)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func parseConfig(words string) (c Config, err error) {
	c = Default()
	for word := range strings.FieldsSeq("keepalive=off " + words) {
		name, value, _ := strings.Cut(strings.ReplaceAll(word, "~", " "), "=")
		i := slices.IndexFunc(Properties(), func(p Property) bool { return p.Name == name })
		if i < 0 {
			return c, fmt.Errorf("no property %s", name)
		}
		if err := Properties()[i].Set(&c, value); err != nil {
			return c, err
		}
	}
	return c, nil
}

func configs(t *testing.T, lines ...string) (all []Config) {
	for _, l := range lines {
		all = append(all, config(t, l))
	}
	return all
}

// shown returns what print shows of the tunnels, without counters and times.
func shown(e *Engine) string {
	var lines []string
	for _, t := range e.Tunnels() {
		s := t.Status()
		s.LastHeard, s.Drops, s.ProcessDrops, s.Restored = time.Time{}, nil, nil, nil
		s.Warnings = slices.Clone(s.Warnings)
		for i := range s.Warnings {
			s.Warnings[i].Since = time.Time{}
		}
		slices.SortFunc(s.Warnings, func(a, b Warning) int { return cmp.Compare(a.Code, b.Code) })
		s.RxPacket, s.RxByte, s.TxPacket, s.TxByte = 0, 0, 0, 0
		text, err := s.MarshalJSON()
		lines = append(lines, cmp.Or(string(text), fmt.Sprint(err)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// state returns all that must be the same after a change and after a start with the new configuration.
func state(e *Engine, m *hostModel) string { return shown(e) + "\n" + m.String() }

func apply(t *testing.T, e *Engine, lines ...string) {
	t.Helper()
	if err := e.Apply(t.Context(), configs(t, lines...)); err != nil {
		t.Fatal(err)
	}
}

const (
	lineA = "name=a remote-address=198.51.100.1 address=10.255.0.1/30 route=10.20.0.0/16"
	lineB = "name=b remote-address=198.51.100.2 address=10.255.0.5/30 route=10.30.0.0/16"
)

// Applying the same configurations a second time makes no call that changes anything.
func TestEngineApply_unchanged(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a, calls := e.Tunnel("a"), m.calls
	apply(t, e, lineB, lineA)
	if e.Tunnel("a") != a || m.calls != calls {
		t.Errorf("%d calls", m.calls-calls)
	}
	if e.Tunnel("c") != nil {
		t.Error("there is a tunnel that nobody wants")
	}
}

// A change of any property has the result of a start with the new value, in place unless Remade.
func TestEngineApply_property(t *testing.T) {
	const base = "name=a remote-address=198.51.100.1 address=10.255.0.1/30 route=10.20.0.0/16"
	values := map[string]string{
		"comment": "x", "local-address": "192.0.2.9", "remote-address": "198.51.100.9", "mtu": "1400", "dscp": "46", "dont-fragment": "inherit",
		"clamp-tcp-mss": "no", "allow-fast-path": "no", "keepalive": "5s,3", "keepalive-probe": "empty",
		"keepalive-target": "10.255.0.2 keepalive-probe=echo", "ttl": "inherit", "address": "10.255.0.9/30", "route": "10.40.0.0/16",
		"peers": "10.21.0.0/16=198.51.100.7", "accept-from": "any-peer", "accept-to": "203.0.113.5", "underlay-device": "eth9", "fwmark": "7", "tun-queues": "1", "rps": "3",
		"ipsec-secret": "mellon-mellon-mellon allow-fast-path=no", "ipsec-secret-file": "",
	}
	for _, p := range Properties() {
		value, ok := values[p.Name]
		if !ok && !strings.HasPrefix(p.Name, "ipsec-") && p.Name != "name" {
			t.Errorf("%s is not tested", p.Name)
		}
		if value == "" || strings.HasPrefix(p.Name, "ipsec-") {
			continue // IPsec takes the kernel's sockets
		}
		t.Run(p.Name, func(t *testing.T) {
			base := base
			if strings.HasPrefix(p.Name, "accept-") || p.Name == "peers" {
				base = strings.ReplaceAll(base, "198.51.100.1", "any") + " local-address=192.0.2.9"
			}
			changed := base + " " + p.Name + "=" + value
			sockets, other := memory.NewSocketPair()
			e, m := newModel(t, sockets)
			m.fakeNetwork.devices = map[string]int{"eth9": 9}
			apply(t, e, base)
			before, running := state(e, m), e.Tunnel("a")
			apply(t, e, changed)
			if remade := e.Tunnel("a") != running; remade != (p.Remade != "" && p.Remade != remadeMany) {
				t.Errorf("made again: %v; Remade is %q", remade, p.Remade)
			}
			fresh, m2 := newModel(t, other)
			m2.fakeNetwork.devices = m.fakeNetwork.devices
			apply(t, fresh, changed)
			if got, want := state(e, m), state(fresh, m2); got != want {
				t.Errorf("changed:\n%s\nstarted:\n%s", got, want)
			}
			apply(t, e, base)
			if got := state(e, m); got != before {
				t.Errorf("changed back:\n%s\nbefore:\n%s", got, before)
			}
		})
	}
}

// After an error all is as it was.
func TestEngineApply_error(t *testing.T) {
	setMetric := func(m *hostModel) { m.fakeNetwork.set(func(w *fakeNetwork) { w.metric = 100 }) }
	dup := "name=c remote-address=198.51.100.1 local-address=192.0.2.1"
	for what, c := range map[string]struct {
		lines []string
		fail  func(*hostModel)
		want  string
	}{
		"invalid":          {lines: []string{lineA + " dscp=46", "name=b remote-address=198.51.100.2 keepalive-probe=echo"}, want: "b: keepalive-target"},
		"no-name":          {lines: []string{lineA, "remote-address=198.51.100.9"}, want: "name"},
		"name-twice":       {lines: []string{lineA, lineA}, want: "a: name"},
		"pair-twice":       {lines: []string{lineA + " dscp=46", lineB, dup}, want: "the same local-address and remote-address"},
		"change-to-pair":   {lines: []string{lineA, lineB + " remote-address=198.51.100.1"}, want: "the same local-address and remote-address"},
		"device":           {lines: []string{lineA + " mtu=1400", "name=c remote-address=198.51.100.9"}, fail: func(m *hostModel) { m.failOpen = "c" }, want: "c: make c"},
		"device-remade":    {lines: []string{lineA + " tun-queues=1", lineB}, fail: func(m *hostModel) { m.failOpen = "new" }, want: ""},
		"route-of-change":  {lines: []string{lineA + " route=10.40.0.0/16 address=10.1.0.1/24", lineB}, fail: func(m *hostModel) { m.failRoute.Prefix = netip.MustParsePrefix("10.40.0.0/16") }, want: "a: "},
		"route-of-new":     {lines: []string{lineA + " dscp=46", "name=c remote-address=198.51.100.9 route=10.40.0.0/16"}, fail: func(m *hostModel) { m.failRoute.Prefix = netip.MustParsePrefix("10.40.0.0/16") }, want: "c: "},
		"route-elsewhere":  {lines: []string{lineA, lineB + " route=10.20.0.0/16"}, want: "b: add route 10.20.0.0/16"},
		"route-taken-once": {lines: []string{"name=a remote-address=198.51.100.1", lineB + " route=10.20.0.0/16", "name=c remote-address=198.51.100.9 route=10.20.0.0/16"}, want: "10.20.0.0/16"},
		"loop-of-change":   {lines: []string{lineA + " route=0.0.0.0/0~metric~99 address=10.1.0.1/24", lineB}, fail: setMetric, want: "a: route 0.0.0.0/0 metric 99 would be the one to remote-address 198.51.100.1 as well"},
		"loop-of-new":      {lines: []string{lineA, lineB, "name=c remote-address=198.51.100.9 route=0.0.0.0/0"}, fail: setMetric, want: "c: route 0.0.0.0/0 would be the one to remote-address 198.51.100.9 as well"},
		"secret-file":      {lines: []string{lineA + " ipsec-secret-file=/nonexistent", lineB}, want: "a: ipsec-secret-file"},
	} {
		t.Run(what, func(t *testing.T) {
			socket, _ := memory.NewSocketPair()
			e, m := newModel(t, socket)
			apply(t, e, lineA, lineB)
			before, a, b := state(e, m), e.Tunnel("a"), e.Tunnel("b")
			if c.fail != nil {
				c.fail(m)
			}
			err := e.Apply(t.Context(), configs(t, c.lines...))
			if c.want == "" {
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q in it", err, c.want)
			}
			if !errors.As(err, new(*TunnelError)) {
				t.Errorf("%T", err)
			}
			if got := state(e, m); got != before {
				t.Errorf("after %v:\n%s\nbefore:\n%s", err, got, before)
			}
			if e.Tunnel("a") != a || e.Tunnel("b") != b {
				t.Error("a tunnel was made again")
			}
			if len(*e.table.Load()) != 2 {
				t.Errorf("the table has %d", len(*e.table.Load()))
			}
		})
	}
}

// If a tunnel cannot be made again, the old one is started again as it was.
func TestEngineApply_remadeFails(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	before := state(e, m)
	m.failRoute.Prefix = netip.MustParsePrefix("10.40.0.0/16")
	if err := e.Apply(t.Context(), configs(t, lineA+" tun-queues=1 route=10.40.0.0/16", lineB+" dscp=3")); err == nil {
		t.Fatal("no error")
	}
	if got := state(e, m); got != before {
		t.Errorf("after:\n%s\nbefore:\n%s", got, before)
	}
}

// Tunnels exchange their remotes and routes, and a new one takes over what another gives up: at no time is
// a route missing.
func TestEngineApply_exchange(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, lineA, lineB)
	a, b := e.Tunnel("a"), e.Tunnel("b")
	apply(t, e, strings.ReplaceAll(lineA, "name=a", "name=b"), strings.ReplaceAll(lineB, "name=b", "name=a"))
	if e.Tunnel("a") != a || e.Tunnel("b") != b {
		t.Error("a tunnel was made again")
	}
	for pair, want := range map[outerPair]*Tunnel{
		pairOf(outerA.As4(), [4]byte{198, 51, 100, 1}): b, pairOf(outerA.As4(), [4]byte{198, 51, 100, 2}): a,
	} {
		if (*e.table.Load())[pair] != want || pairOf(want.route.Load().path.Local, want.route.Load().path.Remote) != pair {
			t.Errorf("the remotes are not exchanged: %v", shown(e))
		}
	}
	exchanged := m.String()
	if !strings.Contains(exchanged, "route b 10.20.0.0/16") || !strings.Contains(exchanged, "route a 10.30.0.0/16") {
		t.Errorf("the routes are not exchanged:\n%s", exchanged)
	}
	// Another name for the same tunnel, with its remote and its route.
	apply(t, e, strings.ReplaceAll(lineA, "name=a", "name=c"))
	if got := m.String(); !strings.Contains(got, "route c 10.20.0.0/16") || strings.Contains(got, "link b") {
		t.Errorf("the renamed one has not taken over:\n%s", got)
	}
	if m.gaps != 0 {
		t.Errorf("%d routes led nowhere for a while", m.gaps)
	}
}

// A change of the configurations from A to B has the result of a start with B, whatever tunnels of A or B wait
// for, and even if an interface is deleted.
func TestEngineApply_random(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	line := func(name string, n int) string {
		pick := func(words ...string) string { return " " + words[random.IntN(len(words))] }
		return fmt.Sprintf("name=%s address=10.255.%d.1/30", name, random.IntN(9)) +
			pick(fmt.Sprintf("remote-address=198.51.100.%d", n), fmt.Sprintf("remote-address=n%d.example", n), fmt.Sprintf("remote-address=no%d.example", n)) +
			pick("", "dscp=46", "dscp=7") + pick("", "mtu=1400", "mtu=1300") + pick("", "ttl=inherit") + pick("", "keepalive=5s,3", "keepalive=10s,10") +
			pick("", "rps=1", "rps=3") + pick("", "comment=x") + pick("", "tun-queues=1") + pick("", fmt.Sprintf("address=10.9.%d.1/24", random.IntN(20))) +
			pick("", fmt.Sprintf("route=10.%d.0.0/16", 20+n), fmt.Sprintf("route=10.%d.0.0/16 route=10.%d.0.0/16", 20+n, 60+n)) +
			pick("", "local-address=192.0.2.9") + pick("", "", "underlay-device=eth7", "underlay-device=eth8") + pick("", "address=10.8.0.1~peer~10.8.0.2", "address=10.8.0.1~peer~10.8.0.3") +
			pick("", fmt.Sprintf("route=0.0.0.0/0~table~%d", n), fmt.Sprintf("route=0.0.0.0/0~metric~200~table~%d", n), fmt.Sprintf("route=10.70.0.0/16~metric~%d", n))
	}
	file := func() (lines []string) {
		remotes := random.Perm(8)
		for i, name := range []string{"a", "b", "c", "d", "e"} {
			if random.IntN(3) > 0 {
				lines = append(lines, line(name, 1+remotes[i]))
			}
		}
		return lines
	}
	resolved := map[string]netip.Addr{}
	for n := range byte(9) {
		resolved[fmt.Sprintf("n%d.example", n)] = netip.AddrFrom4([4]byte{198, 51, 100, n})
	}
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	m.resolved, m.fakeNetwork.devices = resolved, map[string]int{"eth7": 7}
	for range 60 {
		lines := file()
		for _, tunnel := range e.Tunnels() {
			if random.IntN(8) == 0 {
				m.deleteInterface(tunnel)
			}
		}
		apply(t, e, lines...)
		other, _ := memory.NewSocketPair()
		fresh, m2 := newModel(t, other)
		m2.resolved, m2.fakeNetwork.devices = resolved, map[string]int{"eth7": 7}
		apply(t, fresh, lines...)
		settled := func() bool { // once the names are looked up
			return state(e, m) == state(fresh, m2)
		}
		for end := time.Now().Add(patience); !settled(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s\nchanged:\n%s\nstarted:\n%s", strings.Join(lines, "\n"), state(e, m), state(fresh, m2))
			}
		}
	}
}

// Close waits for an Apply under way, and leaves none of its tunnels.
func TestEngineApply_closed(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	asked, answer := make(chan struct{}), make(chan struct{})
	m.opening("n", func() {
		close(asked)
		<-answer
	})
	applied, closed := make(chan error), make(chan error)
	wanted := configs(t, lineA, "name=n remote-address=198.51.100.9")
	go func() { applied <- e.Apply(t.Context(), wanted) }()
	<-asked
	go func() { closed <- e.Close() }()
	select {
	case <-closed:
		t.Error("Close does not wait")
	case <-time.After(20 * time.Millisecond):
	}
	close(answer)
	if err := <-applied; err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := e.Apply(t.Context(), wanted); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if left := m.String(); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}
