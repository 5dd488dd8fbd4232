package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// The tunnel's interface belongs to its host as well: it is renamed, moved to another
// network namespace, set down and up, and its addresses and routes are taken away. It is
// known by its index, and by the file descriptor of the TUN. What the operator asked for
// on the command line is put back; what he does otherwise stands.

const (
	// putBackTries is how often within putBackWithin an address or a route is put back
	// before it is left to whoever takes it away.
	putBackTries  = 5
	putBackWithin = time.Minute
)

// asked is an address or a route of the command line.
type asked struct {
	prefix netip.Prefix
	route  bool
}

// putBack is how often what was asked for has been put back since a time.
type putBack struct {
	n     int
	since time.Time
}

// followInterface looks at the interface again, and puts back what it lacks. The caller
// holds mu, or is alone.
func (t *Tunnel) followInterface(now time.Time) {
	s, err := t.device.State()
	if err != nil && !s.Moved || errors.Is(err, os.ErrClosed) {
		return // that it is gone, a queue tells
	}
	if before := t.Name(); s.Name != before {
		t.names.set(s.Name)
		t.log.Info("the interface was renamed", "was", before, "started-as", t.device.Name())
	}
	if s.Moved != t.iface.Moved {
		t.moved.Store(s.Moved)
		t.tellMoved(s.Moved)
	}
	t.iface = s
	if err != nil {
		return
	}
	t.mtu.Store(int32(s.MTU))
	// The kernel removes the routes of an interface that is set down: that is nobody's
	// taking them away.
	if t.wasDown || !s.Up {
		clear(t.putBacks)
	}
	t.wasDown = false
	if !s.Up { // routes need one that is up
		return
	}
	addresses := t.putBack(false, t.cfg.Addresses, now)
	routes := t.putBack(true, t.cfg.Routes, now)
	if len(addresses)+len(routes) > 0 {
		t.log.Info("what the interface had lost is put back", "addresses", addresses, "routes", routes)
	}
}

// noteDown notes whether the interface was down, be it for less time than the supervisor
// rests.
func (t *Tunnel) noteDown(wentDown map[int]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wasDown = t.wasDown || wentDown[t.iface.Index]
}

func (t *Tunnel) tellMoved(moved bool) {
	if moved {
		t.log.Info("the interface was moved to another network namespace: set its addresses, routes and MTU there")
	} else {
		t.log.Info("the interface is back in the network namespace of ipipd")
	}
}

// putBack puts back those of the addresses, or routes, that the interface lacks, and
// returns them. What is taken away again and again is left alone after some tries, until
// the interface was down.
func (t *Tunnel) putBack(route bool, what []netip.Prefix, now time.Time) []netip.Prefix {
	var try []netip.Prefix
	for _, p := range what {
		if t.putBacks[asked{p, route}].n < putBackTries {
			try = append(try, p)
		}
	}
	add := t.host.network.AddAddresses
	if route {
		add = t.host.network.AddRoutes
	}
	added, err := add(t.iface.Index, try)
	if errors.Is(err, syscall.ENETDOWN) { // since it was looked at; it is put back when it is up
		err = nil
	}
	if failed := err != nil; failed != t.notPutBack[route] {
		if t.notPutBack[route] = failed; failed {
			t.log.Warn("cannot put back what the interface has lost", "err", err)
		}
	}
	for _, p := range added {
		key := asked{p, route}
		b := t.putBacks[key]
		if now.Sub(b.since) > putBackWithin {
			b = putBack{since: now}
		}
		b.n++
		t.putBacks[key] = b
		if b.n == putBackTries {
			t.log.Warn("it is taken away again and again, and left alone from now on, until the interface was set down", "prefix", p, "tries", b.n)
		}
	}
	return added
}

// names is what the log calls the tunnel: by the name that the interface has now.
type names struct {
	base    slog.Handler
	current atomic.Pointer[named]
}

type named struct {
	name    string
	handler slog.Handler
}

func newNames(base *slog.Logger, name string) *names {
	n := &names{base: base.Handler()}
	n.set(name)
	return n
}

func (n *names) set(name string) {
	n.current.Store(&named{name, n.base.WithAttrs([]slog.Attr{slog.String("name", name)})})
}

func (n *names) get() string { return n.current.Load().name }

// Enabled, Handle, WithAttrs and WithGroup implement slog.Handler.
func (n *names) Enabled(ctx context.Context, level slog.Level) bool {
	return n.current.Load().handler.Enabled(ctx, level)
}

func (n *names) Handle(ctx context.Context, r slog.Record) error {
	return n.current.Load().handler.Handle(ctx, r)
}

func (n *names) WithAttrs(attrs []slog.Attr) slog.Handler {
	return n.current.Load().handler.WithAttrs(attrs)
}

func (n *names) WithGroup(name string) slog.Handler {
	return n.current.Load().handler.WithGroup(name)
}
