package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
)

// The host may rename the tunnel's interface, move it to another network namespace, set it down
// and up, and remove its addresses and routes. It is identified by ifindex and by the TUN's
// file descriptor. Addresses and routes of the configuration are restored; other changes stay.

const (
	// maxRestores is how often an address or route is restored within restoreWindow before it
	// is given up.
	maxRestores   = 5
	restoreWindow = time.Minute
)

// restoreCount counts how often an address or a route was restored since a time.
type restoreCount struct {
	n     int
	since time.Time
}

// readInterface reads and publishes the interface's present state.
func (c *control) readInterface() error {
	s, err := c.device.State()
	if err != nil && !s.Moved || errors.Is(err, os.ErrClosed) {
		return cmp.Or(err, os.ErrClosed) // a queue's Read reports that the interface is gone
	}
	c.iface.Store(&s)
	if !s.Moved && s.Index != c.ifindex {
		c.ifindex = s.Index
		if c.entry != nil {
			c.entry.ifindex.Store(uint32(s.Index))
		}
		c.answer = c.follower.Set(c.query())
	}
	if was := c.ifname.get(); s.Name != was {
		c.ifname.set(s.Name)
		c.log.Info("the interface was renamed", "was", was, "started-as", c.madeName)
	}
	if err == nil {
		c.mtu.Store(int32(s.MTU))
	}
	return err
}

// updateInterface reads the interface's state, and restores wanted addresses and routes, after
// something about it has changed.
func (c *control) updateInterface(now time.Time) {
	if c.lost.gone {
		if c.remakeInterface(now); c.lost.gone {
			return
		}
	}
	changes, downs := c.answer.InterfaceChanges, c.answer.InterfaceDowns
	lost := c.many.takeLost()
	if changes == c.interfaceChanges && downs == c.interfaceDowns && !c.iface.Load().Moved && !c.restoreDue && !c.warned(warning.NotRestored) && !lost {
		return
	}
	due := c.restoreDue
	c.restoreDue = false
	c.wasDown = c.wasDown || downs != c.interfaceDowns
	c.interfaceChanges, c.interfaceDowns = changes, downs
	if c.readInterface() != nil {
		return
	}
	up := c.iface.Load().Up
	// The kernel itself removes the routes of an interface that is set down: do not count
	// that as a removal.
	if c.wasDown = c.wasDown || !up; c.wasDown {
		clear(c.restoreCounts)
		c.attachedTo = 0
	}
	if !up { // the kernel accepts routes only if it is up
		return
	}
	wasDown := c.wasDown
	c.wasDown = false
	addresses, err := restore(c, c.engine.network.AddAddresses, c.cfg.Addresses, now)
	wanted := c.cfg.Routes
	if !due && !wasDown && c.many != nil {
		wanted = c.many.withoutPresent(wanted)
	}
	routes, routesErr := restore(c, c.engine.network.AddRoutes, c.wantedRoutes(wanted), now)
	err = errors.Join(err, routesErr)
	c.warnErr(warning.NotRestored, err)
	c.retry = c.retry || err != nil
	c.restoreDue = err != nil && (due || wasDown) // all of them, not only what the mirror knows to be lost
	if len(addresses)+len(routes) > 0 {
		if !due { // else nobody has removed them: control had yet to add them
			c.countRestored("address", len(addresses))
			c.countRestored("route", len(routes))
		}
		c.log.Info("what the interface had lost is put back", "addresses", addresses, "routes", few(routes))
	}
}

// few shortens a list, which may have thousands of elements, to the first ones, for a line of the log.
func few[T any](all []T) any {
	const shown = 10
	if len(all) <= shown {
		return all
	}
	return fmt.Sprintf("%v and %d more", all[:shown], len(all)-shown)
}

// countRestored adds to Status.Restored, and returns the new count.
func (c *control) countRestored(what string, n int) uint64 {
	next := map[string]uint64{}
	maps.Copy(next, c.restoredCounts())
	if n > 0 {
		next[what] += uint64(n)
		c.restored.Store(&next)
	}
	return next[what]
}

// restoredCounts is Status.Restored.
func (t *Tunnel) restoredCounts() map[string]uint64 {
	if counts := t.restored.Load(); counts != nil {
		return *counts
	}
	return nil
}

// restore adds the configured addresses, or routes, that the interface lacks, and returns those. It does
// not add one that it has restored maxRestores times, until the interface was down.
func restore[T fmt.Stringer](
	c *control, add func(device int, wanted []T) ([]T, error), configured []T, now time.Time,
) ([]T, error) {
	var wanted []T
	for _, one := range configured {
		if c.restoreCounts[one].n < maxRestores {
			wanted = append(wanted, one)
		}
	}
	added, err := add(c.ifindex, wanted)
	if errors.Is(err, syscall.ENETDOWN) { // set down meanwhile; restored when it is up
		err = nil
	}
	for _, one := range added {
		count := c.restoreCounts[one]
		if now.Sub(count.since) > restoreWindow {
			count = restoreCount{since: now}
		}
		count.n++
		c.restoreCounts[one] = count
	}
	return added, err
}

// warnLeftAlone warns of addresses and routes that restore adds no more, as long as they are configured.
func (c *control) warnLeftAlone() {
	var alone []string
	for one, count := range c.restoreCounts {
		if count.n >= maxRestores && (slices.ContainsFunc(c.cfg.Addresses, func(a netstate.InterfaceAddress) bool { return a == one }) ||
			slices.ContainsFunc(c.cfg.Routes, func(r netstate.InterfaceRoute) bool { return r == one })) {
			alone = append(alone, one.String())
		}
	}
	slices.Sort(alone)
	c.warnIf(alone != nil, warning.LeftAlone, "%s", strings.Join(alone, ", "))
}

// ifnameHandler is a slog.Handler that adds the tunnel's current name (Tunnel.Name) as attribute "name".
type ifnameHandler struct {
	base    slog.Handler
	tunnel  string // Config.Name
	current atomic.Pointer[ifnameState]
}

type ifnameState struct {
	name    string
	handler slog.Handler
}

func newIfnameHandler(base *slog.Logger, name string) *ifnameHandler {
	h := &ifnameHandler{base: base.Handler(), tunnel: name}
	h.set(InterfaceName(name))
	return h
}

func (h *ifnameHandler) set(ifname string) {
	h.current.Store(&ifnameState{ifname, h.base.WithAttrs([]slog.Attr{slog.String("name", shownName(h.tunnel, ifname))})})
}

// get returns the interface's name.
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
