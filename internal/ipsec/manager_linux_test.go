package ipsec

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

var (
	addressA      = netip.MustParseAddr("192.0.2.1")
	addressB      = netip.MustParseAddr("192.0.2.2")
	addressInside = netip.MustParseAddr("10.0.0.2")
)

func TestMain(m *testing.M) { netlab.Main(m, 2) }

// endpoint is one end of a tunnel: a Manager in a namespace with at most one Session.
type endpoint struct {
	t       *testing.T
	ns      *netlab.NS
	local   netip.Addr
	remote  netip.Addr
	manager *Manager
	session *Session
	raw     int          // IPPROTO_RAW
	opened  chan []byte  // decrypted packets, as far as there is space
	count   atomic.Int64 // number of decrypted packets
	sas     atomic.Uint64
	pinged  uint16 // the next ping's sequence number
	log     netlab.Buffer
	// drops are counted by Config.Dropped, strangers by Options.Dropped: ESP packets of no Session.
	drops, strangers drop.Counters
}

func newEndpoint(t *testing.T, ns *netlab.NS, local, remote netip.Addr) *endpoint {
	e := &endpoint{t: t, ns: ns, local: local, remote: remote, opened: make(chan []byte, 4096)}
	e.manager = NewManager(Options{Dropped: func(why drop.Reason, _ []byte) { e.strangers.Add(why, 1) }, Serve: func(r Receiver) (stop func(), err error) {
		var reading sync.WaitGroup
		var stopped atomic.Bool
		reading.Go(func() {
			for batch := packet.NewBatch(16, packet.MaxSize); !stopped.Load(); {
				n, err := r.Read(batch)
				if err != nil {
					return
				}
				if n == 0 {
					time.Sleep(100 * time.Microsecond)
				}
				for _, b := range batch[:n] {
					e.count.Add(1)
					select {
					case e.opened <- bytes.Clone(b.Bytes()):
					default:
					}
				}
			}
		})
		return func() {
			stopped.Store(true)
			reading.Wait()
		}, nil
	}})
	ns.Do(func() {
		var err error
		if e.raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		e.manager.Close()
		unix.Close(e.raw)
		if t.Failed() {
			t.Logf("log of %v:\n%s", local, e.log.String())
		}
	})
	return e
}

func (e *endpoint) protect(cfg Config) error {
	cfg.Local, cfg.Remote = e.local, e.remote
	cfg.SAs = &e.sas
	cfg.Dropped = func(why drop.Reason, n int) { e.drops.Add(why, uint64(n)) }
	cfg.Event = func(event Event) { fmt.Fprintf(&e.log, "warning=%v %v\n", event.Warning(), event) }
	var err error
	e.ns.Do(func() { e.session, err = e.manager.Protect(cfg) })
	return err
}

// outer returns an outer packet with a payload of n bytes of value v.
func (e *endpoint) outer(n int, v byte) []byte {
	p := make([]byte, 20+n)
	p[0], p[8], p[9] = 0x45, 64, 4
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	a, b := e.local.As4(), e.remote.As4()
	copy(p[12:], a[:])
	copy(p[16:], b[:])
	for i := range p[20:] {
		p[20+i] = v
	}
	return p
}

// send encrypts and sends a packet as the data path does.
func (e *endpoint) send(p []byte) drop.Reason {
	b := packet.New(packet.MaxSize)
	b.Set(p)
	if d := e.session.Seal(b); d != drop.None {
		e.drops.Add(d, 1)
		return d
	}
	if err := unix.Sendto(e.raw, b.Bytes(), 0, &unix.SockaddrInet4{Addr: e.remote.As4()}); err != nil {
		e.t.Errorf("send: %v", err)
	}
	return drop.None
}

// message returns an outer packet that contains cleartext.
func (e *endpoint) message() []byte {
	p := append(e.outer(0, 0), cleartext...)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	return p
}

// flow counts the packets that an endpoint sends periodically.
type flow struct {
	early   atomic.Int64 // dropped before the first was sealed
	sealed  atomic.Int64
	dropped atomic.Int64 // after the first was sealed
	stalled atomic.Int64 // the longest interval in nanoseconds
	stop    chan struct{}
	stopped chan struct{}
}

// sendPeriodically sends p every two milliseconds until flow.end.
func (e *endpoint) sendPeriodically(p []byte) *flow {
	f := &flow{stop: make(chan struct{}), stopped: make(chan struct{})}
	go func() {
		defer close(f.stopped)
		for last := time.Now(); ; last = time.Now() {
			select {
			case <-f.stop:
				return
			case <-time.After(2 * time.Millisecond):
				f.stalled.Store(max(f.stalled.Load(), int64(time.Since(last))))
				if e.send(p) == drop.None {
					f.sealed.Add(1)
				} else if f.sealed.Load() != 0 {
					f.dropped.Add(1)
				} else {
					f.early.Add(1)
				}
			}
		}
	}()
	return f
}

func (f *flow) end() {
	close(f.stop)
	<-f.stopped
}

// capture records the IPv4 packets of a namespace until the returned function is called.
func capture(t *testing.T, ns *netlab.NS) func() [][]byte {
	var fd int
	ns.Do(func() {
		var err error
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))); err != nil {
			t.Fatal(err)
		}
	})
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	var mu sync.Mutex
	var packets [][]byte
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				if link := from.(*unix.SockaddrLinklayer); link.Protocol != binary.NativeEndian.Uint16([]byte{8, 0}) {
					continue
				}
				mu.Lock()
				packets = append(packets, bytes.Clone(buf[:n]))
				mu.Unlock()
				continue
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	return func() [][]byte {
		close(stop)
		<-done
		unix.Close(fd)
		return packets
	}
}

func ikeConfig(mode ike.Mode) Config {
	return Config{Config: ike.Config{
		Secret: ike.Secret("correct horse battery"), Mode: mode, PFS: ike.MODP1024,
		DPDInterval: 2 * time.Second, DPDRetries: 3,
	}}
}

var cleartext = []byte("PLAINTEXT-PLAINTEXT-PLAINTEXT")

// A tunnel never sends cleartext: before there is an SA, with one, across rekeys, without
// the peer, and after Close.
func TestManager_noCleartext(t *testing.T) {
	if testing.Short() {
		t.Skip("its SAs live for seconds: under the race detector a busy machine outlives them; see the run without -short")
	}
	t.Parallel()
	for _, mode := range testModes {
		for _, udp := range []bool{false, true} {
			t.Run(mode.String()+map[bool]string{true: "-nat"}[udp], func(t *testing.T) {
				t.Parallel()
				nsA, nsB := netlab.New(t), netlab.New(t)
				netlab.Veth(t, nsA, nsB, netlab.End{Name: "u0", Address: "192.0.2.1/24"}, netlab.End{Name: "u0", Address: "192.0.2.2/24"})
				a, b := newEndpoint(t, nsA, addressA, addressB), newEndpoint(t, nsB, addressB, addressA)
				wire := capture(t, nsA)
				cfg := ikeConfig(mode)
				cfg.ForceUDP = udp
				cfg.Lifetime2 = netlab.Scale(8 * time.Second)
				cfg.Lifetime1 = netlab.Scale(12 * time.Second)
				if err := a.protect(cfg); err != nil {
					t.Fatal(err)
				}
				message := a.message()
				fromA := a.sendPeriodically(message)
				netlab.Eventually(t, "a hundred packets have been tried", func() bool { return fromA.early.Load() >= 100 })
				if a.session.Established() || fromA.sealed.Load() != 0 {
					t.Fatal("the session is established without a peer")
				}
				if err := b.protect(cfg); err != nil {
					t.Fatal(err)
				}
				netlab.Eventually(t, "both SAs are established", func() bool { return a.session.Status().Established && b.session.Status().Established })
				if d := a.session.Status().Describe(time.Now()); !strings.HasPrefix(d, "established aes-256-gcm ") || strings.Contains(d, "UDP") != udp {
					t.Errorf("status %q", d)
				}
				fromB := b.sendPeriodically(b.message())
				got := <-b.opened
				if !bytes.Equal(got[20:], cleartext) || got[9] != 4 || !bytes.Equal(got[12:20], message[12:20]) {
					t.Errorf("opened %x", got)
				}
				first := a.session.Status().OutboundSPI
				var spis []uint32
				opened := time.Now()
				netlab.Eventually(t, "three rekeys, and two of phase 1", func() bool {
					if spi := a.session.Status().OutboundSPI; len(spis) == 0 || spis[len(spis)-1] != spi {
						spis = append(spis, spi)
					}
					return len(spis) >= 4 && first != 0 && time.Since(opened) > 2*cfg.Lifetime1
				})
				if n := a.sas.Load(); n < uint64(len(spis)) {
					t.Errorf("%d pairs of SAs are counted, and at least %d were used", n, len(spis))
				}
				fromA.end()
				fromB.end()
				// No packet is lost: each one sealed is opened, and none is dropped once
				// there is an SA. The checks below name what is missing.
				netlab.WaitFor(func() bool {
					return b.count.Load() == fromA.sealed.Load() && a.count.Load() == fromB.sealed.Load()
				})
				for _, direction := range []struct {
					name     string
					from     *flow
					receiver *endpoint
				}{{"a to b", fromA, b}, {"b to a", fromB, a}} {
					sealed, opened, dropped := direction.from.sealed.Load(), direction.receiver.count.Load(), direction.from.dropped.Load()
					if sealed == 0 || opened != sealed {
						t.Errorf("%s: %d sealed, %d opened", direction.name, sealed, opened)
					}
					// A rekey has 1.6 s here. If the machine stalls for longer, an SA expires,
					// which is no error.
					if stalled := time.Duration(direction.from.stalled.Load()); dropped != 0 && stalled < 300*time.Millisecond {
						t.Errorf("%s: %d dropped after the SA was established", direction.name, dropped)
					} else if dropped != 0 {
						t.Logf("%s: %d dropped after the SA was established, on a machine that stood still for %v", direction.name, dropped, stalled)
					}
				}
				checkNoDrops(t, a)
				checkNoDrops(t, b)
				b.manager.Close()
				netlab.Eventually(t, "the SA is deleted when the peer has gone", func() bool { return !a.session.Established() })
				if d := a.send(message); d != drop.ESPNoSA {
					t.Errorf("after the peer has gone: %v", d)
				}
				gone := Event{Kind: EventDown}.String()
				netlab.Eventually(t, "EventDown is emitted", func() bool { return strings.Contains(a.log.String(), gone) })
				if strings.Contains(b.log.String(), gone) {
					t.Error("EventDown is emitted for Close")
				}
				a.session.Close()
				if d := a.send(message); d != drop.ESPNoSA {
					t.Errorf("after Close: %v", d)
				}
				var nESP, nUDP int
				for _, p := range wire() {
					if len(p) < 20 || bytes.Contains(p, cleartext[:12]) || p[9] == 4 {
						t.Fatalf("on the wire: %x", p)
					}
					switch p[9] {
					case 50:
						nESP++
					case 17:
						nUDP++
					}
				}
				sealed := int(fromA.sealed.Load() + fromB.sealed.Load())
				if !udp && nESP < sealed || udp && (nESP != 0 || nUDP < sealed) {
					t.Errorf("%d ESP and %d UDP packets on the wire for %d that were sealed", nESP, nUDP, sealed)
				}
				for _, e := range []*endpoint{a, b} {
					if strings.Contains(e.log.String(), "correct horse") {
						t.Error("the secret is in the log")
					}
				}
			})
		}
	}
}

var testModes = []ike.Mode{ike.Main, ike.IKE2}
