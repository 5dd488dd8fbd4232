package netstate

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Follower has the present Answer to one Query. Its methods are safe for concurrent use.
type Follower struct {
	host    *Host
	changed func()
	answer  atomic.Pointer[Answer]

	// updating is held while the Answer is computed, requests included. It guards the fields found to
	// program, and is locked before the Host's mu.
	updating sync.Mutex
	found    found
	source   [4]byte // Query.Local, or the last source that a route preferred for this Query
	program  uint32  // ID of the program that Attach was called with; 0 is none

	// The Host's mu guards the rest.
	query          Query
	keys           []key // of the Host's index that lead to this Follower
	dirty          dirty
	queued, closed bool
	changes, downs uint64 // of Query.Interface
}

// dirty says which parts of an Answer must be computed again.
type dirty uint8

const (
	dirtyMemory dirty = 1 << iota // what follows from the Host's memory
	dirtyRoute                    // the route look-ups as well
)

// Follow computes the first Answer before it returns. changed is called from the Host's
// goroutine, after the Answer has changed in any field; it must not block.
func (h *Host) Follow(q Query, changed func()) *Follower {
	f := &Follower{host: h, changed: changed}
	f.answer.Store(&Answer{})
	f.updating.Lock()
	defer f.updating.Unlock()
	h.mu.Lock()
	h.followers[f] = true
	h.mu.Unlock()
	f.set(q)
	return f
}

// Answer returns the present Answer, at once. It is never nil.
func (f *Follower) Answer() *Answer { return f.answer.Load() }

// Set replaces the Query, and returns its Answer, for which changed is not called.
func (f *Follower) Set(q Query) *Answer {
	f.updating.Lock()
	defer f.updating.Unlock()
	f.set(q)
	return f.Answer()
}

// set is Set, with updating held.
func (f *Follower) set(q Query) {
	h := f.host
	h.mu.Lock()
	if was := f.query; was.Remote != q.Remote || was.Local != q.Local || was.Mark != q.Mark || was.UnderlayDevice != q.UnderlayDevice {
		f.source = [4]byte{}
	}
	f.query = q
	f.dirty |= dirtyRoute
	if q.Interface != 0 {
		h.tunnelInterfaces[q.Interface] = true
	}
	h.mu.Unlock()
	h.synchronize()
	f.computeLocked()
}

// Close ends the Follower: its Answer stays as it is. A call of changed that has begun may
// go on.
func (f *Follower) Close() {
	h := f.host
	f.updating.Lock()
	defer f.updating.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	f.closed = true
	delete(h.followers, f)
	h.setKeysLocked(f, nil)
}

// update computes what is dirty, and calls changed if the Answer has changed. It reports
// whether it looked up routes.
func (f *Follower) update() (lookedUp bool) {
	f.updating.Lock()
	changed, lookedUp := f.computeLocked()
	f.updating.Unlock()
	if changed {
		f.changed()
	}
	return lookedUp
}

// computeLocked computes the dirty parts of the Answer, with updating held.
func (f *Follower) computeLocked() (changed, lookedUp bool) {
	h := f.host
	h.mu.Lock()
	q, what, seen := f.query, f.dirty, h.seen
	f.dirty = 0
	next := *f.Answer()
	next.InterfaceChanges, next.InterfaceDowns = f.changes, f.downs
	skip := f.closed || what == 0
	h.mu.Unlock()
	if skip {
		return false, false
	}
	lookedUp = what&dirtyRoute != 0
	if lookedUp {
		f.lookupLocked(&q, &next)
	}
	n := f.fromMemoryLocked(&q, &next)

	h.mu.Lock()
	// A message since the look-ups may be about what the follower only now depends on.
	keys := f.dependsOn(&q, &next)
	if _, ok := h.links[q.Interface]; q.Interface != 0 && !ok {
		keys = append(keys, key{kind: byAbsence})
	}
	again := h.setKeysLocked(f, keys) && h.seen != seen
	if n != nil && h.neighbours[next.Route.neighbour(q.Remote)] != n {
		again = true // removed meanwhile, with the last other follower of that next hop
	}
	if again {
		h.markLocked(f, dirtyRoute)
		h.wakeLocked()
	}
	h.mu.Unlock()
	if next.equal(f.Answer()) {
		return false, lookedUp
	}
	f.answer.Store(&next)
	return true, lookedUp
}

// lookupLocked looks up the routes by requests to the kernel, with updating held.
func (f *Follower) lookupLocked(q *Query, a *Answer) {
	h := f.host
	f.found = found{}
	a.Device, a.Err, a.ReturnDevice, a.Loop = 0, nil, 0, InterfaceRoute{}
	if q.Remote == [4]byte{} {
		a.NetworkChanges++
	}
	if q.UnderlayDevice != "" {
		a.Device, a.Err = h.linkNamed(q.UnderlayDevice)
	}
	var asked [4]byte
	if a.Err == nil {
		f.found, asked, a.Err = h.lookup(q.Remote, q.Local, q.Mark, a.Device, h.link)
	}
	switch {
	case q.Local != [4]byte{}:
		f.source = q.Local
	case a.Err == nil:
		f.source = f.found.Source
	}
	a.HasLocal = true
	// A source that the kernel looked up a route from is local: it refuses others.
	if f.source != [4]byte{} && (a.Err != nil || asked == [4]byte{}) {
		has, err := h.isLocal(f.source)
		a.HasLocal = has || err != nil
	}
	if a.Err != nil {
		return
	}
	a.Loop = h.loop(q, &f.found)
	a.ReturnDevice = f.found.Device
	if q.Mark != 0 || a.Device != 0 || q.Local == [4]byte{} {
		back, _, _ := h.packetRoute(q.Remote, f.source, 0, 0)
		a.ReturnDevice = back.device
	}
}

// loop returns Answer.Loop. With an UnderlayDevice there is none: a socket bound to it sends by no other interface.
func (h *Host) loop(q *Query, f *found) InterfaceRoute {
	if q.UnderlayDevice != "" || !f.entry.Prefix.IsValid() {
		return InterfaceRoute{}
	}
	main := uint32(unix.RT_TABLE_MAIN)
	if q.Interface != 0 {
		if table, err := h.routeTable(q.Interface); err == nil {
			main = table
		}
	}
	bits := f.entry.Prefix.Bits()
	metric := uint64(f.entry.Metric)
	if f.Device == q.Interface { // an equal metric is that of the route itself
		metric++
	}
	for _, r := range q.Routes {
		if cmp.Or(r.Table, main) == f.entry.Table && r.Prefix.Contains(netip.AddrFrom4(q.Remote)) &&
			(r.Prefix.Bits() > bits || r.Prefix.Bits() == bits && uint64(r.Metric) < metric) {
			return r
		}
	}
	return InterfaceRoute{}
}

// fromMemoryLocked computes the parts of the Answer that need no route look-up, with updating held. It returns the next
// hop's neighbour entry, nil if there is none.
func (f *Follower) fromMemoryLocked(q *Query, a *Answer) *neighbourEntry {
	h := f.host
	a.Route = f.found.Route
	a.Egress = ""
	if q.Interface != 0 {
		a.Egress = h.egressBlocker(q.Interface)
	}
	a.Clsact = q.Interface != 0 && h.hasQdisc(q.Interface, "clsact")
	a.Attached = a.Clsact && f.program != 0 && h.runs(q.Interface, f.program, a.Attached)
	if a.Err != nil {
		a.Bypass, a.Ingress = "there is no route", ""
		return nil
	}
	a.Ingress = h.ingressFilters(a.Route.Device)
	a.Bypass = h.bypass(a.Route.Device, a.Route.DeviceName, f.source, q.Remote)
	if q.AnyLocal && a.Ingress == "" {
		a.Ingress = h.received(a.Route.Device, q.Remote)
	}
	if !a.Route.Ethernet {
		return nil
	}
	n := a.Route.neighbour(q.Remote)
	e, state := h.neighbour(n)
	a.Route.Resolved, a.Route.DestinationMAC, a.Route.Static = state.resolved, state.mac, state.static
	if !state.resolved && a.Bypass == "" && q.Mark == 0 {
		// After a failure the neighbour stays unresolved.
		_ = h.refresh(n, e, 0)
	}
	return e
}

// neighbour returns the key of the neighbour entry of the next hop to dst.
func (r *Route) neighbour(dst [4]byte) neighbour {
	if r.Gateway != [4]byte{} {
		dst = r.Gateway
	}
	return neighbour{r.Device, dst}
}

// neighbour returns the entry of a neighbour, added if missing, and its state, read from the kernel if unknown.
func (h *Host) neighbour(n neighbour) (*neighbourEntry, neighbourState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.neighbours[n]
	if e == nil {
		e = new(neighbourEntry)
		h.neighbours[n] = e
	}
	if !e.known {
		h.mu.Unlock()
		s := h.getNeighbour(n)
		h.mu.Lock()
		if !e.known { // else a message has told a newer state
			e.neighbourState, e.known = s, true
		}
	}
	return e, e.neighbourState
}

// refreshGap is the least time before Refresh asks the kernel for the same neighbour again.
const refreshGap = time.Second

// Refresh makes the kernel resolve, or confirm, the next hop: the kernel cannot know of
// frames that are sent past its IP stack. Call it every few seconds while they are. It does
// nothing for a Route that is not Ethernet, or Static, and within a second after the
// last time for that next hop.
func (f *Follower) Refresh() error {
	h := f.host
	a := f.Answer()
	if a.Err != nil || !a.Route.Ethernet || a.Route.Static {
		return nil
	}
	h.mu.Lock()
	n := a.Route.neighbour(f.query.Remote)
	e := h.neighbours[n]
	h.mu.Unlock()
	if e == nil {
		return nil // another Answer is being computed, or f is closed
	}
	return h.refresh(n, e, refreshGap)
}

// refresh calls resolve, unless it was called for n within gap, or ever if gap is 0.
func (h *Host) refresh(n neighbour, e *neighbourEntry, gap time.Duration) error {
	h.mu.Lock()
	now := time.Now()
	if !e.used.IsZero() && (gap == 0 || now.Sub(e.used) < gap) {
		h.mu.Unlock()
		return nil
	}
	e.used = now
	h.mu.Unlock()
	return h.resolve(n)
}

// dependsOn returns the index keys of all that an Answer depends on.
func (f *Follower) dependsOn(q *Query, a *Answer) (keys []key) {
	add := func(k key) {
		if k.kind == byDevice && k.n == 0 || k.kind == byAddress && k.address == [4]byte{} || slices.Contains(keys, k) {
			return
		}
		keys = append(keys, k)
	}
	for _, address := range [][4]byte{q.Remote, f.source, f.found.prefsrc} {
		add(key{kind: byAddress, address: address})
	}
	if q.Remote == [4]byte{} {
		keys = append(keys, key{kind: byAddress}) // 0.0.0.0, for the default route
	}
	add(key{kind: byDevice, n: a.Route.Device})
	add(key{kind: byDevice, n: a.ReturnDevice})
	add(key{kind: byDevice, n: a.Device})
	if a.Route.Ethernet {
		n := a.Route.neighbour(q.Remote)
		add(key{kind: byNeighbour, n: n.device, address: n.address})
	}
	if q.Interface != 0 {
		add(key{kind: byInterface, n: q.Interface})
		for _, r := range q.Routes {
			if p := r.Prefix.Masked(); p.Addr().Is4() {
				add(key{kind: byPrefix, n: p.Bits(), address: p.Addr().As4()})
			}
		}
	}
	if q.UnderlayDevice != "" {
		add(key{kind: byName, name: q.UnderlayDevice})
	}
	if f.found.nexthop || a.Err != nil || q.Mark != 0 {
		add(key{kind: byNexthop})
	}
	if f.found.multi || f.found.nexthop {
		add(key{kind: byAnyLink})
	}
	return keys
}

// setKeysLocked puts a follower in the index under these keys only, and reports whether any is new.
func (h *Host) setKeysLocked(f *Follower, keys []key) (added bool) {
	// Its route may come to lead again through a tunnel's interface that it has led through.
	for _, k := range f.keys {
		if !f.closed && k.kind == byDevice && h.tunnelInterfaces[k.n] && !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		if !slices.Contains(f.keys, k) {
			h.index.add(k, f)
			added = true
		}
	}
	for _, k := range f.keys {
		if !slices.Contains(keys, k) && h.index.remove(k, f) && k.kind == byNeighbour {
			delete(h.neighbours, neighbour{k.n, k.address})
		}
	}
	f.keys = keys
	return added
}

// equal reports whether the Answers are equal; Err is compared by its text.
func (a *Answer) equal(b *Answer) bool {
	x, y := *a, *b
	if (x.Err == nil) != (y.Err == nil) || x.Err != nil && x.Err.Error() != y.Err.Error() {
		return false
	}
	x.Err, y.Err = nil, nil
	return x == y
}
