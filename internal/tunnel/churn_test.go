package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/tun"
)

// churnEnd is an engine whose tunnels have a number each: tunnel n of one end leads to tunnel n of
// the other.
type churnEnd struct {
	engine *Engine
	local  func(n int) netip.Addr
	remote func(n int) netip.Addr
}

func newChurnEnd(t *testing.T, socket *memory.Socket, local, remote func(int) netip.Addr) *churnEnd {
	t.Helper()
	e := &churnEnd{local: local, remote: remote}
	engine, err := NewEngine(EngineOptions{
		Log: slog.New(slog.DiscardHandler), Socket: socket,
		Network: &fakeNetwork{route: netstate.Route{MTU: 1500}},
		OpenDevice: func(o tun.Options) (tun.Device, error) {
			return memory.NewDevice(o.Name, o.MTU), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	e.engine = engine
	return e
}

func (e *churnEnd) config(n int) Config {
	c := Default()
	c.Name, c.LocalAddress, c.RemoteAddress = fmt.Sprintf("t%d", n), e.local(n), e.remote(n).String()
	c.Keepalive = keepalive.Config{Interval: time.Minute, Retries: 10} // no carrier, no packets
	return c
}

func (e *churnEnd) start(t *testing.T, n int) (*Tunnel, *memory.Device) {
	t.Helper()
	tunnel, err := e.engine.Start(t.Context(), e.config(n))
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	return tunnel, tunnel.device.(*memory.Device)
}

// numbered returns a packet with the number of its tunnel, and its own in that tunnel's stream.
func numbered(n, count int) []byte {
	p := datagram(100, nil)
	binary.BigEndian.PutUint32(p[ipv4.HeaderLen+8:], uint32(n))
	binary.BigEndian.PutUint32(p[ipv4.HeaderLen+12:], uint32(count))
	return p
}

func numbersOf(p []byte) (n, count int) {
	return int(binary.BigEndian.Uint32(p[ipv4.HeaderLen+8:])), int(binary.BigEndian.Uint32(p[ipv4.HeaderLen+12:]))
}

// stream sends packets into tunnel n, 100 and more until ended, each once the one before has come out.
func stream(t *testing.T, n int, in, out *memory.Device, ended *atomic.Bool) {
	for count := 0; count < 100 || !ended.Load(); count++ {
		if err := in.Inject(numbered(n, count)); err != nil {
			t.Error(err)
			return
		}
		p := out.ReceiveWithin(patience)
		if p == nil {
			t.Errorf("packet %d of tunnel %d is lost", count, n)
			return
		}
		if gotN, gotCount := numbersOf(p.Bytes()); gotN != n || gotCount != count {
			t.Errorf("packet %d of tunnel %d comes out of tunnel %d, which waits for packet %d", gotCount, gotN, n, count)
			return
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(files)
}

// While a thousand tunnels start and end, packets in them or not, no packet of a tunnel that stays
// is lost, none comes out of another tunnel, and nothing is left at the end. TestMain finds goroutines
// that are left.
func TestEngineStart_churn(t *testing.T) {
	const stay, starts, at = 8, 1000, 8 // tunnels that stay, that start and end, and of these at a time
	files := openFiles(t)
	hub := func(int) netip.Addr { return outerA }
	spoke := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}) }
	sa, sb := memory.NewSocketPair()
	a, b := newChurnEnd(t, sa, hub, spoke), newChurnEnd(t, sb, spoke, hub)

	var staying, churning sync.WaitGroup
	var ended atomic.Bool
	for n := range stay {
		_, in := a.start(t, n)
		_, out := b.start(t, n)
		if t.Failed() {
			t.FailNow()
		}
		staying.Go(func() { stream(t, n, in, out, &ended) })
	}
	for worker := range at {
		churning.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 0))
			for n := stay + worker; n < stay+starts && !t.Failed(); n += at {
				ta, in := a.start(t, n)
				tb, out := b.start(t, n)
				if ta == nil || tb == nil {
					return
				}
				for count := range random.IntN(8) {
					if err := in.Inject(numbered(n, count)); err != nil {
						t.Error(err)
					}
				}
				if random.IntN(2) == 0 { // it may end with the packet on its way
					if p := out.ReceiveWithin(time.Millisecond); p != nil {
						if got, _ := numbersOf(p.Bytes()); got != n {
							t.Errorf("a packet of tunnel %d comes out of tunnel %d", got, n)
						}
					}
				}
				first, second := ta, tb
				if random.IntN(2) == 0 {
					first, second = tb, ta
				}
				for _, x := range []*Tunnel{first, second} {
					if err := x.Close(); err != nil {
						t.Error(err)
					}
					if err := x.Err(); err != nil {
						t.Error(err)
					}
				}
				if !in.Closed() || !out.Closed() {
					t.Errorf("the interfaces of tunnel %d are left", n)
				}
			}
		})
	}
	churning.Wait()
	ended.Store(true)
	staying.Wait()
	endChurn(t, files, stay, a, b)
}

// endChurn checks that each engine has that many tunnels left and, once all are closed, that no file is open.
func endChurn(t *testing.T, files, left int, ends ...*churnEnd) {
	t.Helper()
	for _, e := range ends {
		if n := len(*e.engine.table.Load()); n != left {
			t.Errorf("%d tunnels are in the table", n)
		}
		if err := e.engine.Close(); err != nil {
			t.Error(err)
		}
	}
	if now := openFiles(t); now != files {
		t.Errorf("%d files are open, and were %d before", now, files)
	}
}

// While lists of configurations are applied one after the other, with tunnels that are added, changed,
// made again and removed, and with errors, no packet of a tunnel that is in all of them is lost, though
// its own properties change, none comes out of another tunnel, and nothing is left at the end.
func TestEngineApply_churn(t *testing.T) {
	const stay, others, lists = 8, 24, 300 // tunnels in all lists, tunnels in some
	files := openFiles(t)
	hub := func(int) netip.Addr { return outerA }
	spoke := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}) }
	sa, sb := memory.NewSocketPair()
	a, b := newChurnEnd(t, sa, hub, spoke), newChurnEnd(t, sb, spoke, hub)
	var fail atomic.Bool
	open := a.engine.openDevice
	a.engine.openDevice = func(o tun.Options) (tun.Device, error) {
		if fail.Load() {
			return nil, errors.New("no device")
		}
		return open(o)
	}
	random := rand.New(rand.NewPCG(3, 4))
	list := func() (all []Config) {
		for n := range stay + others {
			c := a.config(n)
			if c.DSCP, c.TTL = random.IntN(64), 1+random.IntN(255); n >= stay {
				c.Keepalive.Retries, c.TunQueues = 1+random.IntN(20), random.IntN(2)
				c.MTU = 1400 + random.IntN(2)
			}
			if n < stay || random.IntN(2) == 0 {
				all = append(all, c)
			}
		}
		random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		return all
	}
	if err := a.engine.Apply(t.Context(), list()); err != nil {
		t.Fatal(err)
	}
	var out []*memory.Device
	for n := range stay + others {
		_, device := b.start(t, n)
		out = append(out, device)
	}
	if t.Failed() {
		t.FailNow()
	}
	var running sync.WaitGroup
	var ended atomic.Bool
	for n := range stay {
		in := a.engine.Tunnel(fmt.Sprintf("t%d", n)).device.(*memory.Device)
		running.Go(func() { stream(t, n, in, out[n], &ended) })
	}
	for range lists {
		wanted := list()
		fail.Store(random.IntN(4) == 0)
		before := a.engine.Tunnels()
		err := a.engine.Apply(t.Context(), wanted)
		now := a.engine.Tunnels()
		if err != nil { // a tunnel that was to be made again may be gone: its restart can fail, too
			for name := range now {
				if before[name] == nil {
					t.Errorf("%s runs after an error", name)
				}
			}
		} else if len(now) != len(wanted) {
			t.Errorf("%d tunnels run, %d are wanted", len(now), len(wanted))
		}
		for _, c := range wanted {
			if tunnel := now[c.Name]; err == nil && (tunnel == nil || len(Changes(tunnel.config.Load(), &c)) > 0) {
				t.Errorf("%s is not as it is wanted", c.Name)
			}
		}
		for name, tunnel := range now { // one packet in each, which may be lost
			var n int
			if _, err := fmt.Sscanf(name, "t%d", &n); err != nil || n < stay {
				continue
			}
			if err := tunnel.device.(*memory.Device).Inject(numbered(n, 0)); err != nil && !errors.Is(err, os.ErrClosed) {
				t.Error(err)
			}
			if p := out[n].ReceiveWithin(time.Microsecond); p != nil {
				if got, _ := numbersOf(p.Bytes()); got != n {
					t.Errorf("a packet of tunnel %d comes out of tunnel %d", got, n)
				}
			}
		}
	}
	ended.Store(true)
	running.Wait()
	fail.Store(false)
	var all []Config
	for n := range stay + others {
		all = append(all, a.config(n))
	}
	if err := a.engine.Apply(t.Context(), all); err != nil {
		t.Error(err)
	}
	endChurn(t, files, stay+others, a, b)
}
