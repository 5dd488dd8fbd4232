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

// The host may rename the tunnel's interface, move it to another network namespace, set it down
// and up, and remove its addresses and routes. It is identified by ifindex and by the TUN's
// file descriptor. Addresses and routes of the command line are restored; other changes stay.

const (
	// maxRestores is how often an address or route is restored within restoreWindow before it
	// is given up.
	maxRestores   = 5
	restoreWindow = time.Minute
)

// configuredPrefix is an address or a route of the Config.
type configuredPrefix struct {
	prefix netip.Prefix
	route  bool
}

// restoreCount counts how often a prefix was restored since a time.
type restoreCount struct {
	n     int
	since time.Time
}

// updateInterface reads the interface's state, and restores wanted addresses and routes. The
// caller holds mu.
func (t *Tunnel) updateInterface(now time.Time) {
	s, err := t.device.State()
	if err != nil && !s.Moved || errors.Is(err, os.ErrClosed) {
		return // a queue's Read reports that the interface is gone
	}
	if before := t.Name(); s.Name != before {
		t.ifname.set(s.Name)
		t.log.Info("the interface was renamed", "was", before, "started-as", t.device.Name())
	}
	if s.Moved != t.iface.Moved {
		t.moved.Store(s.Moved)
		t.logMoved(s.Moved)
	}
	t.iface = s
	if err != nil {
		return
	}
	t.mtu.Store(int32(s.MTU))
	// The kernel itself removes the routes of an interface that is set down: do not count
	// that as a removal.
	if t.wasDown || !s.Up {
		clear(t.restoreCounts)
	}
	t.wasDown = false
	if !s.Up { // the kernel accepts routes only if it is up
		return
	}
	addresses := t.restore(false, t.cfg.Addresses, now)
	routes := t.restore(true, t.cfg.Routes, now)
	if len(addresses)+len(routes) > 0 {
		t.log.Info("what the interface had lost is put back", "addresses", addresses, "routes", routes)
	}
}

// noteDown records whether the interface was down, even between two rounds of the supervisor.
func (t *Tunnel) noteDown(wentDown map[int]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wasDown = t.wasDown || wentDown[t.iface.Index]
}

func (t *Tunnel) logMoved(moved bool) {
	if moved {
		t.log.Info("the interface was moved to another network namespace: set its addresses, routes and MTU there")
	} else {
		t.log.Info("the interface is back in the network namespace of ipipd")
	}
}

// restore adds the configured addresses, or routes, that the interface lacks, and returns them. A
// prefix is given up after maxRestores, until the interface was down.
func (t *Tunnel) restore(route bool, prefixes []netip.Prefix, now time.Time) []netip.Prefix {
	var wanted []netip.Prefix
	for _, p := range prefixes {
		if t.restoreCounts[configuredPrefix{p, route}].n < maxRestores {
			wanted = append(wanted, p)
		}
	}
	add := t.engine.network.AddAddresses
	if route {
		add = t.engine.network.AddRoutes
	}
	added, err := add(t.iface.Index, wanted)
	if errors.Is(err, syscall.ENETDOWN) { // set down meanwhile; restored when it is up
		err = nil
	}
	if failed := err != nil; failed != t.restoreFailed[route] {
		if t.restoreFailed[route] = failed; failed {
			t.log.Warn("cannot put back what the interface has lost", "err", err)
		}
	}
	for _, p := range added {
		key := configuredPrefix{p, route}
		count := t.restoreCounts[key]
		if now.Sub(count.since) > restoreWindow {
			count = restoreCount{since: now}
		}
		count.n++
		t.restoreCounts[key] = count
		if count.n == maxRestores {
			t.log.Warn("it is taken away again and again, and left alone from now on, until the interface was set down", "prefix", p, "tries", count.n)
		}
	}
	return added
}

// ifnameHandler is a slog.Handler that adds the interface's current name as attribute "name".
type ifnameHandler struct {
	base    slog.Handler
	current atomic.Pointer[ifnameState]
}

type ifnameState struct {
	name    string
	handler slog.Handler
}

func newIfnameHandler(base *slog.Logger, name string) *ifnameHandler {
	h := &ifnameHandler{base: base.Handler()}
	h.set(name)
	return h
}

func (h *ifnameHandler) set(name string) {
	h.current.Store(&ifnameState{name, h.base.WithAttrs([]slog.Attr{slog.String("name", name)})})
}

func (h *ifnameHandler) get() string { return h.current.Load().name }

func (h *ifnameHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.current.Load().handler.Enabled(ctx, level)
}

func (h *ifnameHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.current.Load().handler.Handle(ctx, r)
}

func (h *ifnameHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.current.Load().handler.WithAttrs(attrs)
}

func (h *ifnameHandler) WithGroup(name string) slog.Handler {
	return h.current.Load().handler.WithGroup(name)
}
