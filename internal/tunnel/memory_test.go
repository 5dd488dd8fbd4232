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

// Two hosts in memory, a wire with faults between their sockets, and no kernel:
//
//	device a ═ host a ── socket ───── socket ── host b ═ device b
var (
	outerA = netip.MustParseAddr("192.0.2.1")
	outerB = netip.MustParseAddr("198.51.100.1")
)

// patience is how long a test waits for what has to come.
var patience = netlab.Timeout()

// world is a Network that says what a test wants it to.
type world struct {
	mu      sync.Mutex
	route   netstate.Route
	err     error // of Lookup
	refuse  error // of Configure
	changed func(wentDown map[int]bool)
	down    map[int]bool // of the next change
	lookups int          // each round of a supervisor is one

	absent  bool                  // the local address is
	devices map[string]int        // that there are, by name
	lost    map[netip.Prefix]bool // what somebody has taken away from the interface
	added   []netip.Prefix        // to the interface, since it was configured

	looks int // at the address, each of them one of the tunnel's at everything

	reassembled, unassembled uint64
	log                      bytes.Buffer
}

func (w *world) set(f func(*world)) {
	w.mu.Lock()
	f(w)
	changed, down := w.changed, w.down
	w.down = nil
	w.mu.Unlock()
	if changed != nil {
		changed(down)
	}
}

// Write makes a world the place where its host logs to.
func (w *world) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

// logged counts the lines with that text.
func (w *world) logged(text string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), text)
}

func (w *world) Lookup(_, src [4]byte, _ uint32, _ int) (netstate.Route, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lookups++
	r := w.route
	if src != [4]byte{} {
		r.Source = src
	}
	return r, w.err
}

func (w *world) looked() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lookups
}

func (w *world) Watch(ctx context.Context, changed func(map[int]bool)) error {
	w.mu.Lock()
	w.changed = changed
	w.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (w *world) Configure(int, []netip.Prefix, []netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refuse
}

func (w *world) AddAddresses(_ int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addresses {
		if w.lost[a] {
			delete(w.lost, a)
			added = append(added, a)
		}
	}
	w.added = append(w.added, added...)
	return added, w.refuse
}

func (w *world) AddRoutes(device int, routes []netip.Prefix) ([]netip.Prefix, error) {
	return w.AddAddresses(device, routes)
}

func (w *world) AddressIsLocal(netip.Addr) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looks++
	return !w.absent, nil
}

func (w *world) DeviceIndex(name string) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if index := w.devices[name]; index != 0 {
		return index, nil
	}
	return 0, fmt.Errorf("no interface %q", name)
}

func (w *world) Reassembly() (done, failed uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reassembled, w.unassembled, nil
}

func (w *world) Resolve(netstate.Route, [4]byte) error     { return nil }
func (w *world) SafeToBypass(int, [4]byte, [4]byte) string { return "in memory" }
func (w *world) IngressFilters(int) string                 { return "in memory" }
func (w *world) EgressHooks(int) string                    { return "in memory" }
func (w *world) EgressTaps(int) string                     { return "in memory" }
func (*world) SetRPS(string, string) error                 { return nil }

// side is one host with one tunnel.
type side struct {
	*Tunnel
	host   *Engine
	world  *world
	device *memory.Device
	socket *memory.Socket
}

// pair makes two hosts with a tunnel between them. set changes both ends' Config.
func pair(t testing.TB, set func(*Config)) (a, b *side) {
	t.Helper()
	sa, sb := memory.NewSocketPair()
	return start(t, sa, outerA, outerB, set), start(t, sb, outerB, outerA, set)
}

func start(t testing.TB, socket *memory.Socket, local, remote netip.Addr, set func(*Config)) *side {
	t.Helper()
	return startOn(t, EngineOptions{}, socket, local, remote, set)
}

// startOn is start on a host with these options too.
func startOn(t testing.TB, o EngineOptions, socket *memory.Socket, local, remote netip.Addr, set func(*Config)) *side {
	t.Helper()
	s := newSide(t, o, socket, local)
	cfg := Default()
	cfg.RemoteAddress = remote.String()
	cfg.Keepalive = keepalive.Config{}
	if set != nil {
		set(&cfg)
	}
	var err error
	if s.Tunnel, err = s.host.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// newSide is a host with these options, without a tunnel.
func newSide(t testing.TB, o EngineOptions, socket *memory.Socket, local netip.Addr) *side {
	t.Helper()
	s := &side{socket: socket, world: &world{route: netstate.Route{Source: local.As4(), MTU: 1500}}}
	o.Log, o.Socket, o.Network = slog.New(slog.NewTextHandler(s.world, nil)), socket, s.world
	o.OpenDevice = func(o tun.Options) (tun.Device, error) {
		s.device = memory.NewDevice("ipip1", o.MTU)
		return s.device, nil
	}
	var err error
	if s.host, err = NewEngine(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.host.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// send puts packets into one end and returns what comes out of the other.
func (s *side) send(t testing.TB, to *side, p []byte) []byte {
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

// datagram is a UDP packet of n bytes between two inner hosts; set changes the
// header before it is written.
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

// eventually waits for a condition that has to come true.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come true that %s", what)
		}
	}
}
