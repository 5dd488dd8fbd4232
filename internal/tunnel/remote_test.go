package tunnel

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/resolve"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

var (
	outerC = netip.MustParseAddr("198.51.100.8")
	outerD = netip.MustParseAddr("198.51.100.9")
)

// names is a name server with one name: SetAnswer changes what it says.
type names struct {
	mu        sync.Mutex
	addresses []netip.Addr // none is an error
	ttl       time.Duration
	asked     int
}

// say sets the answer.
func (n *names) say(addresses ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = addresses
}

func (n *names) lookUp(context.Context, string) (resolve.Answer, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	if len(n.addresses) == 0 {
		return resolve.Answer{}, errors.New("no such host")
	}
	return resolve.Answer{Addresses: n.addresses, TTL: n.ttl}, nil
}

// count is how often it was asked.
func (n *names) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked
}

// startNamed starts a tunnel with a DNS name as remote, and the test's resolver.
func startNamed(t *testing.T, socket *memory.Socket, c keepalive.Config, lookUp func(context.Context, string) (resolve.Answer, error)) *endpoint {
	t.Helper()
	return startOn(t, EngineOptions{LookupName: lookUp}, socket, outerA, outerB, func(cfg *Config) {
		cfg.RemoteAddress, cfg.Keepalive = "far.example", c
	})
}

// age sets the age of the last look-up, and starts a round.
func (s *endpoint) age(t *testing.T, by time.Duration) {
	t.Helper()
	s.do(t, func(c *control) { c.resolvedAt = time.Now().Add(-by) })
}

// lookUpAgain waits for another look-up, and a round with its answer.
func (s *endpoint) lookUpAgain(t *testing.T, n *names) {
	t.Helper()
	before := n.count()
	s.age(t, 2*maxTTL)
	eventually(t, "the name server is asked", func() bool { return n.count() > before })
	eventually(t, "the answer comes", func() (done bool) {
		s.do(t, func(c *control) { done = !c.resolving })
		return done
	})
	s.awaitRound(t)
}

func (s *endpoint) hasRemote(want netip.Addr) func() bool {
	return func() bool { return s.Status().CurrentRemoteAddress == want.String() }
}

func TestControl_noteAnswer(t *testing.T) {
	t.Run("again-after-the-ttl", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{ttl: 5 * time.Minute, addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say(outerD)
		a.age(t, n.ttl-time.Second)
		a.awaitRound(t)
		if asked := n.count(); asked != 1 {
			t.Errorf("the name server was asked %d times", asked)
		}
		a.age(t, 2*n.ttl)
		eventually(t, "the new address is used", a.hasRemote(outerD))
	})
	t.Run("last-answer-stays", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say()
		a.lookUpAgain(t, n)
		eventually(t, "it says so", func() bool { return a.network.logged("its last address stays in use") == 1 })
		if !a.hasRemote(outerB)() {
			t.Errorf("the remote is %s", a.Status().CurrentRemoteAddress)
		}
		a.lookUpAgain(t, n)
		if n := a.network.logged("its last address stays in use"); n != 1 {
			t.Errorf("it is said %d times", n)
		}
		n.say(outerB)
		a.lookUpAgain(t, n)
		eventually(t, "that it resolves is said, too", func() bool { return a.network.logged("the name is resolved again") == 1 })
	})
	t.Run("present-one-stays", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say(netip.MustParseAddr("192.0.2.1"), outerB, outerD)
		a.lookUpAgain(t, n)
		if !a.hasRemote(outerB)() {
			t.Errorf("the remote is %s", a.Status().CurrentRemoteAddress)
		}
	})
	// A resolver that hangs delays no probe.
	t.Run("resolver-hangs", func(t *testing.T) {
		var asked atomic.Int32
		hangs := make(chan struct{})
		sa, sb := memory.NewSocketPair()
		a := startNamed(t, sa, keepalive.Config{Interval: time.Second, Retries: 10}, func(ctx context.Context, _ string) (resolve.Answer, error) {
			if asked.Add(1) == 1 {
				return resolve.Answer{Addresses: []netip.Addr{outerB}}, nil
			}
			close(hangs) // and is not called again meanwhile
			<-ctx.Done()
			return resolve.Answer{}, ctx.Err()
		})
		start(t, sb, outerB, outerA, nil)
		eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
		a.age(t, 2*minTTL)
		<-hangs
		last := a.Status().LastHeard
		for range 3 {
			eventually(t, "probes go on", func() bool { return a.Status().LastHeard.After(last) })
			last = a.Status().LastHeard
		}
	})
}

func TestControl_lookupDue(t *testing.T) {
	at := time.Unix(1000, 0)
	for _, test := range []struct {
		name     string
		remote   string
		ttl      time.Duration
		failures int
		state    keepalive.State
		want     time.Duration // after the last look-up; negative is never
	}{
		{"ttl", "far.example", 5 * time.Minute, 0, keepalive.Up, 5 * time.Minute},
		{"ttl-without-keepalive", "far.example", 5 * time.Minute, 0, keepalive.Off, 5 * time.Minute},
		{"ttl-before-it-is-heard", "far.example", 5 * time.Minute, 0, keepalive.Waiting, 5 * time.Minute},
		{"least", "far.example", 0, 0, keepalive.Up, 30 * time.Second},
		{"most", "far.example", 24 * time.Hour, 0, keepalive.Up, time.Hour},
		{"lost", "far.example", time.Hour, 0, keepalive.Lost, 30 * time.Second},
		{"never-heard", "far.example", time.Hour, 0, keepalive.NeverHeard, 30 * time.Second},
		{"failed", "far.example", time.Hour, 1, keepalive.Up, time.Second},
		{"failed-again", "far.example", time.Hour, 4, keepalive.Up, 8 * time.Second},
		{"failed-long", "far.example", time.Hour, 1 << 40, keepalive.Lost, 30 * time.Second},
		{"address", "198.51.100.8", 0, 0, keepalive.Lost, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &control{Tunnel: &Tunnel{}, cfg: &Config{RemoteAddress: test.remote}}
			c.resolvedAt, c.ttl, c.failures = at, test.ttl, test.failures
			c.state.Store(uint32(test.state))
			due := c.lookupDue()
			if test.want < 0 {
				if !due.IsZero() {
					t.Errorf("due at %v", due)
				}
				return
			}
			if got := due.Sub(at); got != test.want {
				t.Errorf("due after %v, want %v", got, test.want)
			}
			c.jitter = maxJitter
			if got := c.lookupDue().Sub(at); got != test.want+test.want/10 {
				t.Errorf("with jitter, due after %v, want %v", got, test.want+test.want/10)
			}
			c.resolving = true
			if due := c.lookupDue(); !due.IsZero() {
				t.Errorf("under way, due at %v", due)
			}
		})
	}
}
