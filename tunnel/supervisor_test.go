package tunnel

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/netlab/memory"
	"ipipd/keepalive"
)

// named is one end of a tunnel whose remote is a name, with a resolver of the test's.
func named(t *testing.T, socket *memory.Socket, c keepalive.Config, resolve func(context.Context, string) (netip.Addr, error)) *side {
	t.Helper()
	return startOn(t, HostOptions{LookupName: resolve}, socket, outerA, outerB, func(cfg *Config) {
		cfg.RemoteAddress, cfg.Keepalive = "far.example", c
	})
}

// age makes the answer that is in use that old.
func (s *side) age(by time.Duration) {
	s.mu.Lock()
	s.resolved = time.Now().Add(-by)
	s.mu.Unlock()
	s.poke()
}

func (s *side) hasRemote(want netip.Addr) func() bool {
	return func() bool { return s.Status().CurrentRemoteAddress == want.String() }
}

func TestFollowName(t *testing.T) {
	moved := netip.MustParseAddr("198.51.100.9")
	t.Run("again-each-minute", func(t *testing.T) {
		var asked atomic.Int32
		socket, _ := memory.NewSocketPair()
		a := named(t, socket, keepalive.Config{}, func(context.Context, string) (netip.Addr, error) {
			if asked.Add(1) == 1 {
				return outerB, nil
			}
			return moved, nil
		})
		a.age(resolveEvery / 2)
		before := a.world.looked()
		eventually(t, "it has looked around", func() bool { return a.world.looked() > before })
		if n := asked.Load(); n != 1 {
			t.Errorf("the name server was asked %d times", n)
		}
		a.age(resolveEvery)
		eventually(t, "the new address is used", a.hasRemote(moved))
	})
	t.Run("last-answer-stays", func(t *testing.T) {
		var asked atomic.Int32
		socket, _ := memory.NewSocketPair()
		a := named(t, socket, keepalive.Config{}, func(context.Context, string) (netip.Addr, error) {
			if asked.Add(1) == 1 {
				return outerB, nil
			}
			return netip.Addr{}, errors.New("no such host")
		})
		a.age(resolveEvery)
		eventually(t, "it says so", func() bool { return a.world.logged("its last address stays in use") == 1 })
		if !a.hasRemote(outerB)() {
			t.Errorf("the remote is %s", a.Status().CurrentRemoteAddress)
		}
		before := a.world.looked()
		a.poke()
		eventually(t, "it has looked around", func() bool { return a.world.looked() > before })
		if n := asked.Load(); n != 2 {
			t.Errorf("the name server was asked %d times", n)
		}
	})
	// A name server that is away costs no probe.
	t.Run("resolver-hangs", func(t *testing.T) {
		var asked atomic.Int32
		hangs := make(chan struct{})
		sa, sb := memory.NewSocketPair()
		a := named(t, sa, keepalive.Config{Interval: time.Second, Retries: 10}, func(ctx context.Context, _ string) (netip.Addr, error) {
			if asked.Add(1) == 1 {
				return outerB, nil
			}
			close(hangs) // and is not called again meanwhile
			<-ctx.Done()
			return netip.Addr{}, ctx.Err()
		})
		start(t, sb, outerB, outerA, nil)
		eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
		a.age(resolveEvery)
		<-hangs
		last := a.Status().LastHeard
		for range 3 {
			eventually(t, "probes go on", func() bool { return a.Status().LastHeard.After(last) })
			last = a.Status().LastHeard
		}
	})
}
