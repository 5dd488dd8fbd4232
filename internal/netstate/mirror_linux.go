package netstate

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"ipipd/internal/fib"
)

// RouteFollower mirrors the kernel's routes out of one interface, in all tables. It follows route messages,
// and dumps the tables again where there may have been none: the kernel removes the routes of an
// interface that goes down, and those that lose their preferred source, without a message.
//
// The Host's mu guards it.
type RouteFollower struct {
	host    *Host
	device  int
	changed func([]RouteChange)

	prefixes map[prefixKey][]span
	sources  map[[4]byte]int // preferred sources of routes, counted
	partly   int             // number of routes with next hops out of other interfaces as well
	tables   map[uint32]*mirroredTable
	// byNexthop counts routes by the ID of their next-hop object and by prefix.
	byNexthop map[uint32]map[prefixKey]int
	dirty     map[prefixKey]bool // prefixes that changed must be called for
	begun     bool               // changed was called
}

// prefixKey is a prefix: its address in the upper 32 bits, its length in the lower ones.
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
// kernel's order. A message of a replacement names the replaced route by these only: it is the kernel's
// first, which may lead out of another interface.
type span struct {
	spanKey
	// mixed: the kernel may have routes out of other interfaces among these; first: none before routes[0].
	mixed, first bool
	routes       []mirrored
}

type spanKey struct {
	table, metric uint32
	tos           uint8
}

// mirrored is one route of a span.
type mirrored struct {
	content     uint64 // hash of all that the kernel tells a span's routes apart by: contentOf
	source      [4]byte
	nexthop     uint32 // ID of its next-hop object; 0 is none
	protocol    uint8
	unreachable bool
	partly      bool      // its RTA_MULTIPATH has next hops out of other interfaces as well
	hops        []fib.Hop // out of the interface
}

// mirroredTable counts a routing table's routes in the mirror. Its unreachable, blackhole and prohibit routes
// matter only while it has a route out of the interface.
type mirroredTable struct {
	out     int               // routes out of the interface
	nowhere map[prefixKey]int // unreachable, blackhole and prohibit routes, by prefix
}

// FollowRoutes follows the routes out of an interface. changed is called from the Host's goroutine, first
// with all prefixes that have routes, of which there may be none, and then with those whose routes have
// changed since the last call; it must not block.
func (h *Host) FollowRoutes(device int, changed func([]RouteChange)) *RouteFollower {
	m := newRouteFollower(h, device, changed)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mirrors.followers[m] = true
	h.mirrors.stale, h.mirrors.due = true, time.Time{}
	h.wakeLocked()
	return m
}

// Close ends the RouteFollower. A last call of changed may still come.
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

// span returns the spans of a route's prefix, and the index of the route's own, -1 if there is none.
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
	case r.exclusive: // the kernel's span was empty: what is here is outdated
		for len(s.routes) > 0 {
			m.delete(r.prefix, s, 0)
		}
		if r.ours {
			*s = span{spanKey: r.spanKey, first: true}
			m.add(s, r, 0)
		}
	case r.replace && old >= 0: // the same route with other flags, or with its next-hop object changed
		m.update(s, old, r)
	case r.replace:
		if s.mixed && !s.first {
			m.host.mirrors.stale = true // which route was replaced is not known
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

// count marks a prefix as dirty and updates the counts, by n = +1 for a route added to a span, -1 for one deleted.
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

// countTable adds n to a mirroredTable. Its routes that lead nowhere begin to matter with its first route out of the
// interface, and cease to with the last.
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

// markNowhere marks as dirty the prefixes of the table's routes that lead nowhere.
func (t *mirroredTable) markNowhere(m *RouteFollower) {
	for p := range t.nowhere {
		m.dirty[p] = true
	}
}

// hasRoutes reports whether the table of that number has a route out of the interface.
func (m *RouteFollower) hasRoutes(number uint32) bool {
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

// routes returns the routes of a prefix that changed is called with.
func (m *RouteFollower) routes(p prefixKey) (routes []fib.Route) {
	for _, s := range m.prefixes[p] {
		for _, r := range s.routes {
			if r.unreachable && !m.hasRoutes(s.table) {
				continue
			}
			routes = append(routes, fib.Route{Table: s.table, Metric: s.metric, TOS: s.tos, Protocol: r.protocol, Unreachable: r.unreachable, Hops: r.hops})
		}
	}
	return routes
}
