package tunnel

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/test/netlab"
	"ipipd/tun"
)

// Two engines in memory, with a faulty network between their sockets, and no kernel:
//
//	device a ═ engine a ── socket ───── socket ── engine b ═ device b
var (
	outerA = netip.MustParseAddr("192.0.2.1")
	outerB = netip.MustParseAddr("198.51.100.1")
)

// patience is the time-out of a condition that must come true.
var patience = netlab.Timeout()

// fakeNetwork is a Network whose answers a test sets. It is also the log's Writer.
type fakeNetwork struct {
	followRoutes func([]netstate.RouteChange) // set by FollowRoutes
	// followAddresses is set by FollowAddresses.
	followAddresses func([][4]byte)
	mu              sync.Mutex
	followers       map[*fakeFollower]bool
	route           netstate.Route
	routes          map[[4]byte]netstate.Route // by remote, in place of route
	marked          int                        // if not 0, the device of routes with a mark or an underlay device
	open            bool                       // nothing objects to bypassing the IP stack
	err             error                      // Answer.Err
	errs            map[[4]byte]error          // by remote, in place of err
	configureErr    error                      // of Configure, AddAddresses and AddRoutes
	changes         uint64                     // calls of set
	down            bool                       // the interface was down before the next change
	downs           uint64
	answers         int // calls of Answer: one per round of a control goroutine

	localAbsent bool
	devices     map[string]int        // name to ifindex
	metric      uint32                // of the default route, by which the remote is reached
	lost        map[fmt.Stringer]bool // addresses and routes removed from the interface
	added       []fmt.Stringer        // addresses and routes restored
	removed     [][]int               // the ifindexes of each call of Remove

	refreshed            int            // calls of Refresh
	egress               map[int]string // Answer.Egress by ifindex
	reasmOKs, reasmFails uint64
	reasmReads           int
	log                  bytes.Buffer
}

// set changes the network, and notifies the followers of it and of a change of their interface.
func (w *fakeNetwork) set(f func(*fakeNetwork)) {
	w.mu.Lock()
	f(w)
	w.changes++
	if w.down {
		w.down = false
		w.downs++
	}
	var changed []func()
	for f := range w.followers {
		changed = append(changed, f.changed)
	}
	w.mu.Unlock()
	for _, f := range changed {
		f()
	}
}

// fakeFollower is a Follower of a fakeNetwork.
type fakeFollower struct {
	network *fakeNetwork
	query   netstate.Query
	changed func()
}

func (w *fakeNetwork) Follow(q netstate.Query, changed func()) Follower {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := &fakeFollower{w, q, changed}
	if w.followers == nil {
		w.followers = map[*fakeFollower]bool{}
	}
	w.followers[f] = true
	return f
}

func (f *fakeFollower) Set(q netstate.Query) *netstate.Answer {
	f.network.mu.Lock()
	defer f.network.mu.Unlock()
	f.query = q
	return f.network.answer(q)
}

func (f *fakeFollower) Answer() *netstate.Answer {
	f.network.mu.Lock()
	defer f.network.mu.Unlock()
	f.network.answers++
	return f.network.answer(f.query)
}

func (f *fakeFollower) Refresh() error {
	f.network.mu.Lock()
	defer f.network.mu.Unlock()
	f.network.refreshed++
	return nil
}

func (f *fakeFollower) Attach(netstate.Program) error { return netstate.ErrUnsupported }

// refreshes counts the calls of Refresh.
func (w *fakeNetwork) refreshes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refreshed
}

func (f *fakeFollower) Close() {
	f.network.mu.Lock()
	defer f.network.mu.Unlock()
	delete(f.network.followers, f)
}

// answer returns the Answer to q, with mu held.
func (w *fakeNetwork) answer(q netstate.Query) *netstate.Answer {
	a := &netstate.Answer{Route: w.route, HasLocal: !w.localAbsent, InterfaceChanges: w.changes, InterfaceDowns: w.downs}
	if q.Remote == [4]byte{} {
		a.NetworkChanges = w.changes
	}
	if other, ok := w.routes[q.Remote]; ok {
		a.Route = other
	}
	if !w.open {
		a.Bypass, a.Ingress, a.Egress = "in memory", "in memory", "in memory"
	}
	if reason := w.egress[q.Interface]; reason != "" {
		a.Egress = reason
	}
	a.ReturnDevice = a.Route.Device
	if q.UnderlayDevice != "" {
		if a.Device = w.devices[q.UnderlayDevice]; a.Device == 0 {
			a.Err = &netstate.NoDeviceError{Name: q.UnderlayDevice}
		}
	}
	if w.marked != 0 && (q.Mark != 0 || q.UnderlayDevice != "") {
		a.Route.Device = w.marked
	}
	if q.Local != [4]byte{} {
		a.Route.Source = q.Local
	}
	if a.Err == nil {
		a.Err = w.err
		if err := w.errs[q.Remote]; err != nil {
			a.Err = err
		}
	}
	for _, r := range q.Routes {
		if r.Prefix.Bits() == 0 && r.Metric < w.metric {
			a.Loop = r
		}
	}
	return a
}

// Write appends to the log.
func (w *fakeNetwork) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

// logLines counts the log lines with which a warning began: in these a remedy follows the code.
func (w *fakeNetwork) logLines(code warning.Code) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), "warning="+code.String()+" ")
}

// warns returns a warning of a tunnel, the zero Warning if it is not active.
func (t *Tunnel) warns(code warning.Code) (w Warning) {
	if at := t.warning(code); at >= 0 {
		w = t.activeWarnings()[at]
	}
	return w
}

// rounds counts the rounds of the control goroutines.
func (w *fakeNetwork) rounds() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answers
}

func (w *fakeNetwork) Configure([]netstate.Interface) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.configureErr
}

func (w *fakeNetwork) Remove(devices []int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.removed = append(w.removed, devices)
	return nil
}

func (w *fakeNetwork) AddAddresses(_ int, addresses []netstate.InterfaceAddress) ([]netstate.InterfaceAddress, error) {
	return addLost(w, addresses)
}

func (w *fakeNetwork) AddRoutes(_ int, routes []netstate.InterfaceRoute) ([]netstate.InterfaceRoute, error) {
	return addLost(w, routes)
}

func addLost[T fmt.Stringer](w *fakeNetwork, wanted []T) (added []T, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, one := range wanted {
		if w.lost[one] {
			delete(w.lost, one)
			added, w.added = append(added, one), append(w.added, one)
		}
	}
	return added, w.configureErr
}

func (w *fakeNetwork) Reassembly() (done, failed uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reasmReads++
	return w.reasmOKs, w.reasmFails, nil
}

// reassemblies counts the calls of Reassembly.
func (w *fakeNetwork) reassemblies() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reasmReads
}

// FollowRoutes sets followRoutes, by which the test tells of changes.
func (w *fakeNetwork) FollowRoutes(_ int, changed func([]netstate.RouteChange)) RouteFollower {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.followRoutes = changed
	return fakeRoutes{}
}

// FollowAddresses sets followAddresses, by which the test tells of changes.
func (w *fakeNetwork) FollowAddresses(changed func([][4]byte)) AddressFollower {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.followAddresses = changed
	return fakeRoutes{}
}

type fakeRoutes struct{}

func (fakeRoutes) Close() {}

func (*fakeNetwork) Recheck()                           {}
func (*fakeNetwork) RawSockets(uint8) ([]uint64, error) { return nil, nil }

func (*fakeNetwork) EgressTaps() (netstate.Taps, error) { return netstate.Taps{}, nil }
func (*fakeNetwork) SetRPS(string, string) error        { return nil }
func (*fakeNetwork) ClearRPS(string, string) error      { return nil }

func (*fakeNetwork) RemoveAddresses(int, []netstate.InterfaceAddress) error { return nil }
func (*fakeNetwork) RemoveRoutes(int, []netstate.InterfaceRoute) error      { return nil }
func (*fakeNetwork) ExistingRoutes([]netstate.Interface) (map[netstate.InterfaceRoute]bool, error) {
	return nil, nil
}
func (*fakeNetwork) ReplaceRoutes(int, []netstate.InterfaceRoute) error { return nil }
func (*fakeNetwork) Close() error                                       { return nil }

// endpoint is an engine with one tunnel.
type endpoint struct {
	*Tunnel
	engine  *Engine
	network *fakeNetwork
	device  *memory.Device
	socket  *memory.Socket
}

// pair starts both ends of a tunnel. set changes both Configs.
func pair(t testing.TB, set func(*Config)) (a, b *endpoint) {
	t.Helper()
	sa, sb := memory.NewSocketPair()
	return start(t, sa, outerA, outerB, set), start(t, sb, outerB, outerA, set)
}

func start(t testing.TB, socket *memory.Socket, local, remote netip.Addr, set func(*Config)) *endpoint {
	t.Helper()
	return startOn(t, EngineOptions{}, socket, local, remote, set)
}

// startOn is start with further options of the engine.
func startOn(t testing.TB, o EngineOptions, socket *memory.Socket, local, remote netip.Addr, set func(*Config)) *endpoint {
	t.Helper()
	s := newEndpoint(t, o, socket, local)
	cfg := Default()
	cfg.RemoteAddress = remote.String()
	cfg.Keepalive = keepalive.Config{}
	if set != nil {
		set(&cfg)
	}
	var err error
	if s.Tunnel, err = s.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// newEndpoint returns an engine with these options, without a tunnel.
func newEndpoint(t testing.TB, o EngineOptions, socket *memory.Socket, local netip.Addr) *endpoint {
	t.Helper()
	s := &endpoint{socket: socket, network: &fakeNetwork{route: netstate.Route{Source: local.As4(), MTU: 1500}}}
	o.Log, o.Socket, o.Network = slog.New(slog.NewTextHandler(s.network, nil)), socket, s.network
	o.OpenDevice = func(o tun.Options) (tun.Device, error) {
		s.device = memory.NewDevice("ipip1", o.MTU)
		return s.device, nil
	}
	var err error
	if s.engine, err = NewEngine(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// do runs f in the control goroutine, and returns when it has.
func (s *endpoint) do(t testing.TB, f func(*control)) {
	t.Helper()
	done := make(chan struct{})
	eventually(t, "there is room for an event", func() bool {
		return s.post(func(c *control) { f(c); close(done) })
	})
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the control goroutine does not run it")
	}
}

// awaitRound waits for a whole round of control.
func (s *endpoint) awaitRound(t testing.TB) {
	t.Helper()
	before := s.network.rounds()
	eventually(t, "a round has ended", func() bool {
		s.wakeControl()
		return s.network.rounds() > before+1 // one may have been under way
	})
}

// awaitHostUnreachable waits for ICMP host unreachable (3/1) to an inner sender.
func (s *endpoint) awaitHostUnreachable(t testing.TB) {
	t.Helper()
	m := s.device.ReceiveWithin(patience)
	if m == nil {
		t.Fatal("the inner sender gets no ICMP error")
	}
	if icmp := m.Bytes()[ipv4.HeaderLen:]; icmp[0] != 3 || icmp[1] != 1 {
		t.Errorf("the inner sender gets ICMP %d/%d", icmp[0], icmp[1])
	}
}

// send sends an inner packet and returns the one that is delivered at the other end.
func (s *endpoint) send(t testing.TB, to *endpoint, p []byte) []byte {
	t.Helper()
	if err := s.device.Inject(p); err != nil {
		t.Fatal(err)
	}
	b := to.device.ReceiveWithin(patience)
	if b == nil {
		t.Fatalf("nothing came out; %v went in, dropped %v, and there %v", p, s.Status().Drops, to.Status().Drops)
	}
	return b.Bytes()
}

// datagram returns an inner UDP packet of n bytes; set changes the IPv4 header before it is written.
func datagram(n int, set func(*ipv4.Header)) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	h := ipv4.Header{TotalLen: n, ID: 7, TTL: 64, Protocol: ipv4.ProtocolUDP, Source: [4]byte{10, 0, 0, 1}, Destination: [4]byte{10, 0, 0, 2}}
	if set != nil {
		set(&h)
	}
	h.Put(b)
	if n >= ipv4.HeaderLen+8 {
		copy(b[ipv4.HeaderLen:], []byte{0, 53, 0, 53, byte((n - 20) >> 8), byte(n - 20), 0, 0}) // no UDP checksum
	}
	return b
}

// eventually waits until the condition is true.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come true that %s", what)
		}
	}
}
