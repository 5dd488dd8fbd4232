package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
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

// fakeNetwork is a Network whose results a test sets. It is also the log's Writer.
type fakeNetwork struct {
	mu           sync.Mutex
	route        netstate.Route
	err          error // of Lookup
	configureErr error // of Configure
	changed      func(wentDown map[int]bool)
	down         map[int]bool // of the next change
	lookups      int          // one per round of a supervisor

	localAbsent bool                  // result of AddressIsLocal, negated
	devices     map[string]int        // name to ifindex
	lost        map[netip.Prefix]bool // addresses and routes removed from the interface
	added       []netip.Prefix        // addresses and routes restored

	rounds int // calls of AddressIsLocal, one per round of a supervisor

	reasmOKs, reasmFails uint64
	log                  bytes.Buffer
}

func (w *fakeNetwork) set(f func(*fakeNetwork)) {
	w.mu.Lock()
	f(w)
	changed, down := w.changed, w.down
	w.down = nil
	w.mu.Unlock()
	if changed != nil {
		changed(down)
	}
}

// Write appends to the log.
func (w *fakeNetwork) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

// logged counts occurrences of text in the log.
func (w *fakeNetwork) logged(text string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), text)
}

func (w *fakeNetwork) Lookup(_, src [4]byte, _ uint32, _ int) (netstate.Route, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lookups++
	r := w.route
	if src != [4]byte{} {
		r.Source = src
	}
	return r, w.err
}

func (w *fakeNetwork) lookupCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lookups
}

func (w *fakeNetwork) Watch(ctx context.Context, changed func(map[int]bool)) error {
	w.mu.Lock()
	w.changed = changed
	w.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (w *fakeNetwork) Configure(int, []netip.Prefix, []netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.configureErr
}

func (w *fakeNetwork) AddAddresses(_ int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addresses {
		if w.lost[a] {
			delete(w.lost, a)
			added = append(added, a)
		}
	}
	w.added = append(w.added, added...)
	return added, w.configureErr
}

func (w *fakeNetwork) AddRoutes(device int, routes []netip.Prefix) ([]netip.Prefix, error) {
	return w.AddAddresses(device, routes)
}

func (w *fakeNetwork) AddressIsLocal(netip.Addr) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rounds++
	return !w.localAbsent, nil
}

func (w *fakeNetwork) DeviceIndex(name string) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if index := w.devices[name]; index != 0 {
		return index, nil
	}
	return 0, fmt.Errorf("no interface %q", name)
}

func (w *fakeNetwork) Reassembly() (done, failed uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reasmOKs, w.reasmFails, nil
}

func (w *fakeNetwork) Resolve(netstate.Route, [4]byte) error     { return nil }
func (w *fakeNetwork) SafeToBypass(int, [4]byte, [4]byte) string { return "in memory" }
func (w *fakeNetwork) IngressFilters(int) string                 { return "in memory" }
func (w *fakeNetwork) EgressHooks(int) string                    { return "in memory" }
func (w *fakeNetwork) EgressTaps(int) string                     { return "in memory" }
func (*fakeNetwork) SetRPS(string, string) error                 { return nil }

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

// datagram is an inner UDP packet of n bytes; set changes the IPv4 header before it is written.
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
