package netstate

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"ipipd/internal/fib"
)

// RouteFollower has the routes out of one interface, in all tables: a mirror of what the kernel's tables
// have of it. It follows messages, and reads all again where the kernel tells of nothing: it removes
// the routes of an interface that goes down, or that lose their preferred source, without a
// message.
//
// The Host's mu guards it.
type RouteFollower struct {
	host    *Host
	device  int
	changed func([]RouteChange)

	prefixes map[prefixKey][]span
	sources  map[[4]byte]int // preferred sources of routes, counted
	partly   int             // routes that have other next hops as well, out of another interface
	tables   map[uint32]*mirroredTable
	// byNexthop are the prefixes of routes by a next-hop object, counted.
	byNexthop map[uint32]map[prefixKey]int
	dirty     map[prefixKey]bool // to be told of
	begun     bool               // changed was called
}

// prefixKey is a prefix: its address in the upper half, its length.
type prefixKey uint64

func prefixKeyOf(a [4]byte, bits int) prefixKey {
	return prefixKey(binary.BigEndian.Uint32(a[:]))<<32 | prefixKey(bits)
}

func (k prefixKey) prefix() netip.Prefix {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], uint32(k>>32))
	return netip.PrefixFrom(netip.AddrFrom4(a), int(k&0xff))
}

// span has the routes out of the interface that have the same prefix, table, metric and TOS, in the
// kernel's order. Messages name a replaced route by these only: it is the first one, which may lead
// elsewhere.
type span struct {
	spanKey
	// mixed: routes may lead elsewhere; first: not one before routes[0].
	mixed, first bool
	routes       []mirrored
}

type spanKey struct {
	table, metric uint32
	tos           uint8
}

// mirrored is one route of a span.
type mirrored struct {
	content     uint64 // of all that the kernel tells routes apart by
	source      [4]byte
	nexthop     uint32 // ID of its next-hop object; 0 is none
	protocol    uint8
	unreachable bool
	partly      bool      // it has other next hops as well, itself
	hops        []fib.Hop // out of the interface
}

// mirroredTable is what a routing table has of the mirror. A table without a route out of the interface is of
// no concern to it, nor are routes there that lead nowhere.
type mirroredTable struct {
	out     int               // routes out of the interface
	nowhere map[prefixKey]int // the prefixes of routes that lead nowhere, counted
}

// FollowRoutes follows the routes out of an interface. changed is called from the Host's goroutine, first
// with all that there is, which may be nothing, and then with what has changed, however often since the
// last call; it must not block.
func (h *Host) FollowRoutes(device int, changed func([]RouteChange)) *RouteFollower {
	m := newRouteFollower(h, device, changed)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mirrors.followers[m] = true
	h.mirrors.stale, h.mirrors.due = true, time.Time{}
	h.wake()
	return m
}

// Close ends it. A last call of changed may still come.
func (m *RouteFollower) Close() {
	h := m.host
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.mirrors.followers, m)
	if len(h.mirrors.followers) == 0 {
		h.mirrors = newMirrors()
	}
}

func newRouteFollower(h *Host, device int, changed func([]RouteChange)) *RouteFollower {
	return &RouteFollower{
		host: h, device: device, changed: changed, prefixes: map[prefixKey][]span{}, sources: map[[4]byte]int{},
		tables: map[uint32]*mirroredTable{}, byNexthop: map[uint32]map[prefixKey]int{}, dirty: map[prefixKey]bool{},
	}
}

// span finds the span of a route, or where it is to be.
func (m *RouteFollower) span(r *followedRoute) (spans []span, at int) {
	spans = m.prefixes[r.prefix]
	at = slices.IndexFunc(spans, func(s span) bool { return s.spanKey == r.spanKey })
	return spans, at
}

// newRoute handles RTM_NEWROUTE.
func (m *RouteFollower) newRoute(r *followedRoute) {
	spans, at := m.span(r)
	if at < 0 {
		if r.ours {
			m.prefixes[r.prefix] = append(spans, span{spanKey: r.spanKey, first: r.exclusive || !r.append, mixed: !r.exclusive})
			m.add(&m.prefixes[r.prefix][len(spans)], r, 0)
		}
		return
	}
	s := &spans[at]
	old := slices.IndexFunc(s.routes, func(o mirrored) bool { return r.ours && o.content == r.content })
	switch {
	case r.exclusive: // there was none: what is here is older
		for len(s.routes) > 0 {
			m.delete(r.prefix, s, 0)
		}
		if r.ours {
			*s = span{spanKey: r.spanKey, first: true}
			m.add(s, r, 0)
		}
	case r.replace && old >= 0: // in place: told again, because of a flag or its next-hop object
		m.update(s, old, r)
	case r.replace:
		if s.mixed && !s.first {
			m.host.mirrors.stale = true // which one has gone is not known
		} else {
			m.delete(r.prefix, s, 0)
		}
		m.host.mirrors.stale = m.host.mirrors.stale || m.host.mirrors.replaying
		if s.first = r.ours; r.ours {
			m.add(s, r, 0)
		} else {
			s.mixed = true
		}
	case r.ours:
		if old >= 0 {
			m.delete(r.prefix, s, old)
		}
		if r.append {
			m.add(s, r, len(s.routes))
		} else {
			m.add(s, r, 0)
			s.first = true
		}
	default:
		s.mixed = true
		s.first = s.first && r.append
	}
	m.prune(r.prefix)
}

// deleteRoute handles RTM_DELROUTE.
func (m *RouteFollower) deleteRoute(r *followedRoute) {
	spans, at := m.span(r)
	if at < 0 {
		return
	}
	s := &spans[at]
	if old := slices.IndexFunc(s.routes, func(o mirrored) bool { return o.content == r.content }); old >= 0 {
		m.delete(r.prefix, s, old)
		s.first = s.first && (old > 0 || !s.mixed)
		m.prune(r.prefix)
	}
}

func (m *RouteFollower) add(s *span, r *followedRoute, at int) {
	s.routes = slices.Insert(s.routes, at, r.mirrored)
	m.count(r.prefix, s, &r.mirrored, +1)
}

func (m *RouteFollower) delete(p prefixKey, s *span, at int) {
	old := s.routes[at]
	s.routes = slices.Delete(s.routes, at, at+1)
	m.count(p, s, &old, -1)
}

func (m *RouteFollower) update(s *span, at int, r *followedRoute) {
	if o := &s.routes[at]; o.unreachable != r.unreachable || !slices.Equal(o.hops, r.hops) {
		m.countTable(r.prefix, s.table, o.unreachable, -1)
		o.unreachable, o.hops = r.unreachable, r.hops
		m.countTable(r.prefix, s.table, o.unreachable, +1)
		m.dirty[r.prefix] = true
	}
}

// count keeps what depends on a route of a span that was added or deleted.
func (m *RouteFollower) count(p prefixKey, s *span, r *mirrored, n int) {
	m.dirty[p] = true
	m.countTable(p, s.table, r.unreachable, n)
	if r.partly {
		m.partly += n
	}
	if r.source != [4]byte{} {
		if m.sources[r.source] += n; m.sources[r.source] == 0 {
			delete(m.sources, r.source)
		}
	}
	if r.nexthop == 0 {
		return
	}
	users := m.byNexthop[r.nexthop]
	if users == nil {
		users = map[prefixKey]int{}
		m.byNexthop[r.nexthop] = users
	}
	if users[p] += n; users[p] == 0 {
		delete(users, p)
	}
	if len(users) == 0 {
		delete(m.byNexthop, r.nexthop)
	}
}

// countTable keeps a mirroredTable. With the first route out of the interface, and the last one, its others count
// or do not.
func (m *RouteFollower) countTable(p prefixKey, number uint32, nowhere bool, n int) {
	t := m.tables[number]
	if t == nil {
		t = &mirroredTable{nowhere: map[prefixKey]int{}}
		m.tables[number] = t
	}
	concerned := t.out > 0
	if !nowhere {
		t.out += n
	} else if t.nowhere[p] += n; t.nowhere[p] == 0 {
		delete(t.nowhere, p)
	}
	if concerned != (t.out > 0) {
		t.markNowhere(m)
	}
	if t.out == 0 && len(t.nowhere) == 0 {
		delete(m.tables, number)
	}
}

// markNowhere has a RouteFollower tell of the table's prefixes that lead nowhere.
func (t *mirroredTable) markNowhere(m *RouteFollower) {
	for p := range t.nowhere {
		m.dirty[p] = true
	}
}

// concerns reports whether a table has a route out of the interface.
func (m *RouteFollower) concerns(number uint32) bool {
	t := m.tables[number]
	return t != nil && t.out > 0
}

// prune removes the spans of a prefix that have become empty.
func (m *RouteFollower) prune(p prefixKey) {
	spans := slices.DeleteFunc(m.prefixes[p], func(s span) bool { return len(s.routes) == 0 })
	if len(spans) == 0 {
		delete(m.prefixes, p)
	} else {
		m.prefixes[p] = spans
	}
}

// routes are those of a prefix.
func (m *RouteFollower) routes(p prefixKey) (routes []fib.Route) {
	for _, s := range m.prefixes[p] {
		for _, r := range s.routes {
			if r.unreachable && !m.concerns(s.table) {
				continue
			}
			routes = append(routes, fib.Route{Table: s.table, Metric: s.metric, TOS: s.tos, Protocol: r.protocol, Unreachable: r.unreachable, Hops: r.hops})
		}
	}
	return routes
}
