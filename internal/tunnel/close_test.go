package tunnel

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/tun"
)

// startSeveral starts n tunnels on one engine, whose interfaces have the indices 101 and so on.
func startSeveral(t *testing.T, n int) (s *endpoint, tunnels []*Tunnel, devices []*memory.Device) {
	t.Helper()
	socket, _ := memory.NewSocketPair()
	s = newEndpoint(t, EngineOptions{}, socket, outerA)
	s.engine.openDevice = func(o tun.Options) (tun.Device, error) {
		d := memory.NewDevice(o.Name, o.MTU)
		d.SetState(tun.State{Name: o.Name, Index: 101 + len(devices), Up: true})
		devices = append(devices, d)
		return d, nil
	}
	for i := range n {
		cfg := Default()
		cfg.Name, cfg.RemoteAddress, cfg.Keepalive = fmt.Sprintf("t%d", i), fmt.Sprintf("192.0.2.%d", 100+i), keepalive.Config{}
		tunnel, err := s.engine.Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		tunnels = append(tunnels, tunnel)
	}
	return s, tunnels, devices
}

// Interfaces are removed together, except one in another network namespace, and one that has
// another index than it was created with. One alone is removed by closing its device.
func TestEngineCloseTunnels(t *testing.T) {
	s, tunnels, devices := startSeveral(t, 6)
	devices[1].SetState(tun.State{Name: "t1", Index: 102, Up: true, Moved: true})
	devices[2].SetState(tun.State{Name: "t2", Index: 999, Up: true})
	var closing sync.WaitGroup
	for i := range 2 { // the second call waits for the first one
		closing.Go(func() {
			for i == 1 && !tunnels[4].closing.Load() {
				runtime.Gosched() // else each call may take some of the tunnels
			}
			if err := s.engine.CloseTunnels(tunnels[:5]...); err != nil {
				t.Error(err)
			}
			for i, device := range devices {
				if device.Closed() != (i < 5) {
					t.Errorf("device %d: closed is %v", i, device.Closed())
				}
			}
		})
	}
	closing.Wait()
	if left := *s.engine.table.Load(); len(left) != 1 || left.find(outerA.As4(), [4]byte{192, 0, 2, 105}) != tunnels[5] {
		t.Errorf("%d tunnels are left", len(left))
	}
	if err := tunnels[5].Close(); err != nil {
		t.Error(err)
	}
	if want := [][]int{{101, 104, 105}}; !slices.EqualFunc(s.network.removed, want, slices.Equal) {
		t.Errorf("removed %v, want %v", s.network.removed, want)
	}
}

// A tunnel that is closing does not fail, and does not enter the table again.
func TestTunnel_closing(t *testing.T) {
	s, tunnels, _ := startSeveral(t, 1)
	if err := tunnels[0].Close(); err != nil {
		t.Error(err)
	}
	tunnels[0].fail(errors.New("the interface is gone"))
	path := tunnels[0].route.Load().path
	if err := s.engine.register(map[*Tunnel]outerPair{tunnels[0]: pairOf(path.Local, path.Remote)}, nil); err != nil || tunnels[0].Err() != nil || len(*s.engine.table.Load()) != 0 {
		t.Errorf("%v; failed: %v; in the table: %v", err, tunnels[0].Err(), *s.engine.table.Load())
	}
}

// hookedDevice is a memory.Device that calls a test's functions first.
type hookedDevice struct {
	*memory.Device
	fd, closed func()
}

type hookedQueue struct {
	tun.Queue
	device *hookedDevice
}

func (d *hookedDevice) Queues() []tun.Queue { return []tun.Queue{hookedQueue{d.Device.Queues()[0], d}} }

func (d *hookedDevice) Close() error {
	d.closed()
	return d.Device.Close()
}

func (q hookedQueue) FD() int {
	q.device.fd()
	return q.Queue.FD()
}

// hooked has the endpoint open hookedDevices.
func (s *endpoint) hooked(fd, closed func()) {
	open := s.engine.openDevice
	s.engine.openDevice = func(o tun.Options) (tun.Device, error) {
		_, err := open(o)
		return &hookedDevice{s.device, fd, closed}, err
	}
}

func namedTunnel(name string) Config {
	cfg := Default()
	cfg.Name, cfg.RemoteAddress, cfg.Keepalive = name, outerB.String(), keepalive.Config{}
	return cfg
}

// Close waits for a tunnel that has failed: it is in no table any more, but still uses what Close closes.
func TestEngineClose_failing(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	s := newEndpoint(t, EngineOptions{}, socket, outerA)
	closing, finish := make(chan struct{}), make(chan struct{})
	s.hooked(func() {}, func() { close(closing); <-finish })
	tunnel, err := s.engine.Start(t.Context(), namedTunnel("t0"))
	if err != nil {
		t.Fatal(err)
	}
	tunnel.fail(errors.New("the interface is gone"))
	<-closing
	ended := make(chan error, 1)
	go func() { ended <- s.engine.Close() }()
	select {
	case <-ended:
		t.Error("the engine has ended before its tunnel")
		close(finish)
	case <-time.After(50 * time.Millisecond):
		close(finish)
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// If a tunnel fails while it starts, no worker is given a file descriptor that is closed already.
func TestEngineStart_failsMeanwhile(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	s := newEndpoint(t, EngineOptions{}, socket, outerA)
	var asked atomic.Bool
	s.hooked(func() {
		if asked.Swap(true) {
			return
		}
		w := s.engine.workers[0].out
		w.sourcesMu.Lock()
		for _, started := range w.sources {
			started.(*outbound).tunnel.fail(errors.New("the interface is gone"))
		}
		w.sourcesMu.Unlock()
		time.Sleep(50 * time.Millisecond)
		if s.device.Closed() {
			t.Error("the descriptor's number may be another's by now")
		}
	}, func() {})
	if tunnel, err := s.engine.Start(t.Context(), namedTunnel("t0")); err == nil {
		<-tunnel.Done()
	}
}
