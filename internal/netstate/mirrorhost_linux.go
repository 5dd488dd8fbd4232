package netstate

import (
	"errors"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// mirrors are the RouteFollowers of a Host, and what they share. The Host's mu guards it.
type mirrors struct {
	followers map[*RouteFollower]bool
	nexthops  map[uint32]nexthop // objects, by ID; nil before the first read
	// stale: the mirrors may differ from the kernel's routes, and are to be read again at the time due.
	stale bool
	due   time.Time
	// replaying: the messages read now may be older than the last dump.
	replaying bool
}

func newMirrors() mirrors { return mirrors{followers: map[*RouteFollower]bool{}} }

// mirrorMessageLocked handles a message about a route.
func (h *Host) mirrorMessageLocked(msg message) {
	for m := range h.mirrors.followers {
		r, known, ok := h.parseFollowed(msg.body, m.device, msg.flags)
		switch {
		case !ok:
		case msg.kind == unix.RTM_DELROUTE:
			if r.ours {
				m.deleteRoute(&r)
			}
		default:
			h.mirrors.stale = h.mirrors.stale || !known
			m.newRoute(&r)
		}
	}
}

// markMirrorsLocked marks the mirrors as stale if the kernel may have removed routes or next-hop objects of theirs
// without a message, after a change of a device (0 is any) or of its address source.
func (h *Host) markMirrorsLocked(device int, source [4]byte) {
	for m := range h.mirrors.followers {
		if device == 0 || m.device == device || m.sources[source] > 0 || m.partly > 0 {
			h.mirrors.stale = true
		}
	}
	for _, n := range h.mirrors.nexthops {
		if n.device == device && n.group == nil {
			h.mirrors.stale = true
		}
	}
}

// hasDirty reports whether a RouteFollower has dirty prefixes.
func (r *mirrors) hasDirty() bool {
	for m := range r.followers {
		if len(m.dirty) > 0 {
			return true
		}
	}
	return false
}

// updateMirrors reads the mirrors if that is due, and tells of what has changed. The caller does not hold
// mu.
func (h *Host) updateMirrors() {
	type told struct {
		*RouteFollower
		changes []RouteChange
	}
	var all []told
	h.mu.Lock()
	if now := time.Now(); h.mirrors.stale && !h.behind && !now.Before(h.mirrors.due) {
		h.mirrors.stale = false
		// After an error, such as a lack of memory, it is tried again; so it is if a message requires it.
		h.mirrors.stale = h.readMirrorsLocked() != nil || h.mirrors.stale
		// The longer a read takes, the rarer reads are: they take a tenth of a processor at most.
		h.mirrors.due = now.Add(max(resyncGap, 11*time.Since(now)))
	}
	for m := range h.mirrors.followers {
		if len(m.dirty) == 0 && m.begun || !m.begun && h.mirrors.stale {
			continue
		}
		t := told{m, make([]RouteChange, 0, len(m.dirty))}
		for p := range m.dirty {
			t.changes = append(t.changes, RouteChange{p.prefix(), m.routes(p)})
		}
		m.begun = true
		clear(m.dirty)
		all = append(all, t)
	}
	h.mu.Unlock()
	for _, t := range all {
		t.changed(t.changes)
	}
}

// readMirrorsLocked reads the mirrors from the kernel, and marks as dirty what is different. mu is held over the
// requests: what messages say from now on must be applied to what is read. Some of the next ones may
// be older; each says how a route is then, so that the mirrors are right after the last one.
func (h *Host) readMirrorsLocked() error {
	if len(h.mirrors.followers) == 0 {
		return nil
	}
	if err := h.readNexthops(); err != nil {
		return err
	}
	var readers []*mirrorReader
	for m := range h.mirrors.followers {
		readers = append(readers, &mirrorReader{of: m, RouteFollower: newRouteFollower(h, m.device, nil)})
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET}})
	// Of all devices: other interfaces' routes may precede in a span, and a blackhole route has no device.
	allKnown := true
	if err := h.readAll(req, unix.RTM_NEWROUTE, func(b []byte) {
		for _, m := range readers {
			if r, known, ok := h.parseFollowed(b, m.device, 0); ok {
				m.read(&r)
				allKnown = allKnown && known
			}
		}
	}); err != nil {
		return err
	}
	for _, m := range readers {
		m.finish()
	}
	h.mirrors.replaying = true
	_ = h.readLocked() // clears replaying once the queues are empty; the goroutine reports the error
	if !allKnown {
		return unix.EAGAIN // a next-hop object was added or removed in between
	}
	return nil
}

// readAll is requestSocket.each for a dump. One interrupted by a change is no error: a message tells of the change.
func (h *Host) readAll(req *nl.NetlinkRequest, want uint16, f func([]byte)) error {
	err := h.batch.each(req, want, f)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

// mirrorReader is a mirror that is being read from a dump.
type mirrorReader struct {
	*RouteFollower
	of        *RouteFollower // gets the mirror by finish
	last      followedRoute
	elsewhere bool // a route of last's span leads out of another interface
}

// read adds a route of the dump, which has the routes of one span one after the other.
func (m *mirrorReader) read(r *followedRoute) {
	if r.prefix != m.last.prefix || r.spanKey != m.last.spanKey {
		m.elsewhere = false
	}
	m.last = *r
	spans, at := m.span(r)
	switch {
	case !r.ours:
		m.elsewhere = true
		if at >= 0 {
			spans[at].mixed = true
		}
	case at < 0:
		m.prefixes[r.prefix] = append(spans, span{spanKey: r.spanKey, first: !m.elsewhere, mixed: m.elsewhere})
		m.add(&m.prefixes[r.prefix][len(spans)], r, 0)
	case !slices.ContainsFunc(spans[at].routes, func(o mirrored) bool { return o.content == r.content }): // else an equal one has come before it
		m.add(&spans[at], r, len(spans[at].routes))
	}
}

// finish replaces the RouteFollower's mirror, and marks as dirty the prefixes whose routes differ.
func (m *mirrorReader) finish() {
	of := m.of
	for p, spans := range m.prefixes {
		if !sameRoutes(spans, of.prefixes[p]) {
			of.dirty[p] = true
		}
	}
	for p := range of.prefixes {
		if m.prefixes[p] == nil {
			of.dirty[p] = true
		}
	}
	for number, t := range m.tables {
		if m.hasRoutes(number) != of.hasRoutes(number) {
			t.markNowhere(of)
		}
	}
	of.prefixes, of.sources, of.partly, of.tables, of.byNexthop = m.prefixes, m.sources, m.partly, m.tables, m.byNexthop
}

// sameRoutes reports whether spans have the same routes, in the same order.
func sameRoutes(a, b []span) bool {
	return slices.EqualFunc(a, b, func(a, b span) bool {
		return a.spanKey == b.spanKey && slices.EqualFunc(a.routes, b.routes, func(a, b mirrored) bool {
			return a.protocol == b.protocol && a.unreachable == b.unreachable && slices.Equal(a.hops, b.hops)
		})
	})
}
