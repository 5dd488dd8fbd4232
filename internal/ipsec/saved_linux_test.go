package ipsec

import (
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
	"ipipd/internal/handover"
	"ipipd/internal/ipsec/ike"
	"ipipd/test/netlab"
)

// store stands in for a keeper: it has duplicates of the descriptors that a process gives it.
type store struct {
	t       *testing.T
	state   int
	mu      sync.Mutex
	sockets map[int]int // duplicates by the process's descriptor
}

func duplicate(t *testing.T, fd int) int {
	t.Helper()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return dup
}

func newStore(t *testing.T, state *handover.State) *store {
	s := &store{t: t, state: duplicate(t, state.FD()), sockets: map[int]int{}}
	t.Cleanup(func() { unix.Close(s.state) })
	return s
}

func (s *store) opened(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sockets[fd] = duplicate(s.t, fd)
}

func (s *store) closed(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if dup, ok := s.sockets[fd]; ok {
		unix.Close(dup)
	}
	delete(s.sockets, fd)
}

// take gives all sockets to the next process.
func (s *store) take() (fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fd := range s.sockets {
		fds = append(fds, fd)
	}
	s.sockets = map[int]int{}
	for _, fd := range fds {
		s.sockets[fd] = duplicate(s.t, fd)
	}
	return fds
}

// A Manager continues with the SAs and sockets of the Manager before, unless a setting has changed, which it reports.
func TestManagerProtect_restored(t *testing.T) {
	for _, mode := range []ike.Mode{ike.Main, ike.IKE2} {
		nsA, nsB := netlab.New(t), netlab.New(t)
		netlab.Veth(t, nsA, nsB, netlab.End{Name: "u0", Address: "192.0.2.1/24"}, netlab.End{Name: "u0", Address: "192.0.2.2/24"})
		a, b := newEndpoint(t, nsA, addressA, addressB), newEndpoint(t, nsB, addressB, addressA)
		state, err := handover.NewState()
		if err != nil {
			t.Fatal(err)
		}
		kept := newStore(t, state)
		a.manager.state, a.manager.opened, a.manager.closedSocket = state, kept.opened, kept.closed
		cfg := ikeConfig(mode)
		passive := cfg // so that not both ends negotiate at once
		passive.Passive = true
		for e, cfg := range map[*endpoint]Config{a: cfg, b: passive} {
			if err := e.protect(cfg); err != nil {
				t.Fatal(err)
			}
		}
		netlab.Eventually(t, "both SAs are established", func() bool { return a.session.Established() && b.session.Established() })
		exchange := func() {
			t.Helper()
			for _, e := range []*endpoint{a, b} {
				for range 10 {
					if why := e.send(e.message()); why != drop.None {
						t.Fatalf("%v: %v", e.local, why)
					}
				}
			}
			for _, e := range []*endpoint{a, b} {
				netlab.Eventually(t, "packets are received", func() bool { return len(e.opened) >= 10 })
				for range 10 {
					<-e.opened
				}
			}
		}
		exchange()
		// next ends a's process, and starts the next one.
		next := func(cfg Config) {
			t.Helper()
			before := a.session.outbound.Load().Packets()
			a.manager.Leave()
			a.manager.Close()
			a.sas.Store(0)
			if mem, err := handover.AdoptState(duplicate(t, kept.state)); err != nil {
				t.Fatal(err)
			} else {
				old := a.manager
				a.manager = NewManager(Options{State: mem, Opened: kept.opened, Closed: kept.closed, Adopt: kept.take(), Held: true, Serve: old.serve, Dropped: old.dropped})
				t.Cleanup(func() { a.manager.Close() })
			}
			if saved := a.manager.Saved(addressA); len(saved) != 1 || saved[0] != addressB {
				t.Fatalf("saved: %v", saved)
			}
			if why := b.send(b.message()); why != drop.None { // the packet waits in the socket
				t.Fatal(why)
			}
			if err := a.protect(cfg); err != nil {
				t.Fatal(err)
			}
			if o := a.session.outbound.Load(); o != nil && o.Packets() != before {
				t.Errorf("%v: it goes on after %d packets, were %d", mode, o.Packets(), before)
			}
		}
		for range 3 {
			next(cfg)
			if !a.session.Established() {
				t.Fatalf("%v: not restored:\n%s", mode, a.log.String())
			}
			if len(a.opened) != 0 {
				t.Errorf("%v: a packet is received before Begin", mode)
			}
			if unused, err := a.manager.Begin(); err != nil || len(unused) != 0 {
				t.Fatalf("%v: %v, unused %q", mode, err, unused)
			}
			netlab.Eventually(t, "what waited is received", func() bool { return len(a.opened) == 1 })
			<-a.opened
			exchange()
		}
		if got := b.drops.Load(drop.ESPReplay) + a.drops.Load(drop.ESPReplay); got != 0 || b.sas.Load() != 1 || a.sas.Load() != 0 {
			t.Errorf("%v: %d replays, %d and %d SAs negotiated", mode, got, a.sas.Load(), b.sas.Load())
		}
		other := cfg
		other.Lifetime2 = time.Hour
		next(other)
		if _, err := a.manager.Begin(); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(a.log.String(), "warning=true the SAs of the process before are not used, and new ones are negotiated: ipsec-lifetime was another one") {
			t.Errorf("%v: log:\n%s", mode, a.log.String())
		}
		netlab.Eventually(t, "new SAs are negotiated", func() bool { return a.sas.Load() == 1 && a.session.Established() })
		// Begin discards the record and the sockets of a tunnel that no longer exists.
		a.manager.Leave()
		a.manager.Close()
		mem, err := handover.AdoptState(duplicate(t, kept.state))
		if err != nil {
			t.Fatal(err)
		}
		a.manager = NewManager(Options{State: mem, Opened: kept.opened, Closed: kept.closed, Adopt: kept.take(), Held: true})
		if unused, err := a.manager.Begin(); err != nil || len(unused) != 1 || unused[0] != "192.0.2.1 and 192.0.2.2" {
			t.Errorf("%v: unused: %q, %v", mode, unused, err)
		}
		if n := len(mem.Records()); n != 0 || len(kept.sockets) != 0 {
			t.Errorf("%v: %d records and %d sockets are left", mode, n, len(kept.sockets))
		}
	}
}
