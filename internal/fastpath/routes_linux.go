package fastpath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"ipipd/internal/fib"
)

// Routes is the copy, in eBPF maps, of the routes out of one interface with many remotes, of their gateways, and
// of the prefixes of accept-from and accept-to. Its methods are safe for concurrent use; the unexported ones are called
// with f.mu held.
type Routes struct {
	f       *FastPath
	ifindex uint32
	// number is the index of its table in the maps; 0 if all were taken.
	number uint32
	// table is what the maps hold, numbers the indexes of its gateways in remotes. f.mu guards these and the rest.
	table    *fib.Table
	numbers  map[[4]byte]uint32
	lengths  [33]int                 // how many prefixes of each length table has
	from, to map[netip.Prefix]uint32 // the prefixes of accept-from and accept-to, with their values in the maps
	// incomplete is why the maps lack a prefix: a shorter one would lead its packets elsewhere, so that
	// no Link of the interface may be enabled.
	incomplete error
	// devices has the device that ipip_decap is attached to for each remote, senders those for accept-from.
	devices map[[4]byte]int
	senders map[int]bool
	// lacking is why the maps lack a gateway: its packets go to userspace.
	lacking error
}

// NewRoutes returns empty Routes for an interface, which must have none so far. The caller closes them.
func (f *FastPath) NewRoutes(ifindex int) *Routes {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &Routes{f: f, ifindex: uint32(ifindex), number: f.freeTable(), table: new(fib.Table), numbers: map[[4]byte]uint32{}, devices: map[[4]byte]int{}, senders: map[int]bool{}}
	if r.number == 0 {
		r.incomplete = &Unavailable{Why: fmt.Sprintf("this process has %d interfaces with many remotes on the fast path already, the maximum", maxTables-1)}
	}
	if f.objects != nil {
		f.routes[r.ifindex] = r
	}
	return r
}

// freeTable returns the index of an unused table; 0 if there is none.
func (f *FastPath) freeTable() uint32 {
	var taken [maxTables]bool
	for _, r := range f.routes {
		taken[r.number] = true
	}
	return uint32(1 + slices.Index(taken[1:], false)) // Index is -1 if all are taken
}

// tableOf returns the index of the table of a Tunnel's routes; 0 if it has none.
func (f *FastPath) tableOf(t *Tunnel) uint32 {
	if r := f.routes[uint32(t.Ifindex)]; t.Many && r != nil {
		return r.number
	}
	return 0
}

// Close removes the copy from the maps, and disables the interface's Links.
func (r *Routes) Close() {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if !r.open() {
		return
	}
	r.disableLocked(ErrClosed)
	delete(r.f.routes, r.ifindex)
	r.empty()
	_ = r.receiveSenders(nil)
	for _, list := range []struct {
		m   *ebpf.Map
		old map[netip.Prefix]uint32
	}{{r.f.objects.AcceptFrom, r.from}, {r.f.objects.AcceptTo, r.to}} {
		for p := range list.old {
			_ = list.m.Delete(r.prefixKey(p))
		}
	}
}

// open reports whether the maps may be used.
func (r *Routes) open() bool { return r.f.objects != nil && !r.f.left && r.f.routes[r.ifindex] == r }

// disableLocked makes all packets of the interface go to userspace until Sync has succeeded.
func (r *Routes) disableLocked(err error) {
	r.incomplete = err
	r.f.disableMany(func(l *Link) bool { return uint32(l.tunnel.Ifindex) == r.ifindex })
}

// checkRoutes returns why a Tunnel with many remotes may not be enabled; nil if it may.
func (f *FastPath) checkRoutes(t *Tunnel) error {
	if !t.Many || !t.TxEnabled && !t.RxEnabled {
		return nil
	}
	r := f.routes[uint32(t.Ifindex)]
	switch {
	case r == nil:
		return ErrClosed
	case f.reserveErr != nil:
		return f.reserveErr
	}
	return r.incomplete
}

// Follow updates the copy to the next Table: prefixes are those that have changed, added and removed the
// gateways of fib.Edit.Commit. At any moment a packet goes by its old route or by its new one. After an error all
// packets go to userspace until Sync succeeds.
func (r *Routes) Follow(next *fib.Table, prefixes []netip.Prefix, added, removed [][4]byte) error {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if !r.open() {
		return ErrClosed
	}
	if r.incomplete != nil {
		return r.incomplete
	}
	if err := r.checkSize(next); err != nil {
		return err
	}
	r.addRemotes(added)
	set, gone := order(next, prefixes)
	if err := r.write(next, set, gone); err != nil {
		return err
	}
	for _, g := range removed {
		r.deleteRemote(g)
	}
	r.table = next
	return nil
}

// Sync makes the copy equal to a Table, whatever it was before, as after an error.
func (r *Routes) Sync(next *fib.Table) error {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if !r.open() {
		return ErrClosed
	}
	if r.number == 0 {
		return r.incomplete
	}
	if err := r.checkSize(next); err != nil {
		return err
	}
	var gateways [][4]byte
	for g := range next.Gateways() {
		gateways = append(gateways, g)
	}
	r.lacking = nil
	r.addRemotes(gateways)
	var prefixes []netip.Prefix
	for p := range next.All() {
		prefixes = append(prefixes, p)
	}
	for p := range r.table.All() {
		if _, ok := next.Next(p); !ok {
			prefixes = append(prefixes, p)
		}
	}
	set, gone := order(next, prefixes)
	if err := r.write(next, set, gone); err != nil {
		return err
	}
	r.pruneRemotes(next)
	r.table, r.incomplete = next, nil
	return nil
}

// checkSize fails if the map has no room for a Table beside those of other interfaces.
func (r *Routes) checkSize(next *fib.Table) error {
	n := next.Len()
	for _, other := range r.f.routes {
		if other != r {
			n += other.table.Len()
		}
	}
	if n <= maxRoutes {
		return nil
	}
	err := &Unavailable{Why: fmt.Sprintf("the interfaces with many remotes have %d prefixes, more than the %d that the fast path takes", n, maxRoutes)}
	r.disableLocked(err)
	return err
}

// order returns the prefixes in the order in which to write them, so that at any moment each packet goes by its old
// route or by its new one: set has those of next, longest first, then gone those that next lacks, shortest first.
func order(next *fib.Table, prefixes []netip.Prefix) (set, gone []netip.Prefix) {
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return cmp.Or(a.Bits()-b.Bits(), a.Addr().Compare(b.Addr())) })
	for _, p := range slices.Compact(prefixes) {
		if _, ok := next.Next(p); ok {
			set = append(set, p)
		} else {
			gone = append(gone, p)
		}
	}
	slices.Reverse(set)
	return set, gone
}

// write sets and removes prefixes, in their order.
func (r *Routes) write(next *fib.Table, set, gone []netip.Prefix) error {
	had := func(p netip.Prefix) bool { _, ok := r.table.Next(p); return ok }
	m := &r.f.objects.fib
	for _, p := range set {
		if !had(p) {
			r.lengths[p.Bits()]++
		}
	}
	m.setLengths(r.number, &r.lengths) // first: look-ups do not see a prefix of a length that is not set
	for _, p := range set {
		n, _ := next.Next(p)
		if !m.set(r.number, p, r.leadsTo(n)) {
			r.abandon(set)
			return r.incomplete
		}
	}
	for _, p := range gone {
		if had(p) {
			m.remove(r.number, p)
			r.lengths[p.Bits()]--
		}
	}
	m.setLengths(r.number, &r.lengths)
	return nil
}

// leadsTo returns the last field of a route's word: the number of its remote, or toSeveral and so on.
func (r *Routes) leadsTo(n fib.Next) uint32 {
	switch n.Kind {
	case fib.Via:
		if number, ok := r.numbers[n.Gateway]; ok {
			return number
		}
		return toMixed
	case fib.Direct:
		return toDirect
	case fib.Nowhere:
		return toNowhere
	case fib.Mixed:
		return toMixed
	}
	return toSeveral
}

// abandon gives up a change that the hash table has no room for: it removes the copy. Packets go to userspace until Sync.
func (r *Routes) abandon(set []netip.Prefix) {
	r.disableLocked(&Unavailable{Why: "the hash table of the fast path's routes has no place for one of the prefixes"})
	for _, p := range set {
		r.f.objects.fib.remove(r.number, p)
	}
	r.empty()
}

// empty takes the table out of the maps.
func (r *Routes) empty() {
	m := &r.f.objects.fib
	r.lengths = [33]int{}
	m.setLengths(r.number, &r.lengths)
	for p := range r.table.All() {
		m.remove(r.number, p)
	}
	r.table = new(fib.Table)
	for g := range r.numbers {
		r.deleteRemote(g)
	}
}

// pruneRemotes removes the gateways that next does not have.
func (r *Routes) pruneRemotes(next *fib.Table) {
	for g := range r.numbers {
		if !next.HasGateway(g) {
			r.deleteRemote(g)
		}
	}
}

func (r *Routes) deleteRemote(g [4]byte) {
	if number, ok := r.numbers[g]; ok {
		_ = r.f.objects.Numbers.Delete(remoteKey{r.number, g})
		_ = r.f.objects.Remotes.Update(number, remoteValue{}, ebpf.UpdateLock)
		r.f.remoteNumbers.free(number)
		delete(r.numbers, g)
	}
	_ = r.attachFor(g, 0)
}

// attachFor attaches ipip_decap to the device on which a remote's packets arrive, in place of its last one; 0 is none.
func (r *Routes) attachFor(g [4]byte, device int) error {
	old := r.devices[g]
	if device == old {
		return nil
	}
	if err := r.f.acquireUnderlay(device); err != nil {
		return err
	}
	r.f.releaseUnderlay(old)
	if r.devices[g] = device; device == 0 {
		delete(r.devices, g)
	}
	return nil
}

// addRemotes adds gateways to the maps. Their packets go to userspace until SetRemote.
func (r *Routes) addRemotes(gateways [][4]byte) {
	for _, g := range gateways {
		if _, ok := r.numbers[g]; ok {
			continue
		}
		number, ok := r.f.remoteNumbers.take()
		if !ok {
			r.lacking = &Unavailable{Why: fmt.Sprintf("the fast path takes %d remotes of interfaces with many", maxRemotes)}
			return
		}
		err := r.f.objects.Remotes.Update(number, remoteValue{Address: g}, ebpf.UpdateLock)
		if err == nil {
			err = r.f.objects.Numbers.Put(remoteKey{r.number, g}, number)
		}
		if err != nil {
			r.f.remoteNumbers.free(number)
			r.lacking = r.f.explainMap("a remote", err)
			continue
		}
		r.numbers[g] = number
	}
}

// Lacking returns why the maps lack some remotes, whose packets go to userspace; nil if they lack none. While they do,
// no Tunnel may have Refuse.
func (r *Routes) Lacking() error {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	return r.lacking
}

// SetRemote sets how to send to a gateway; it does nothing for an address that is none. If the kernel does not attach
// ipip_decap to the device, it fails, and packets from that gateway go to userspace.
func (r *Routes) SetRemote(gateway [4]byte, to Remote) error {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if !r.open() {
		return ErrClosed
	}
	number, ok := r.numbers[gateway]
	if !ok {
		return nil
	}
	var was remoteValue
	_ = r.f.objects.Remotes.Lookup(number, &was)
	v := remoteValue{Address: gateway, LastReceived: was.LastReceived, Source: to.Source, NextHop: to.NextHop, UnderlayIfindex: uint32(to.UnderlayIfindex), PathMTU: uint16(to.PathMTU)}
	if to.Tx {
		v.Flags |= remoteTx
	}
	var refused error
	if to.Rx {
		if refused = r.attachFor(gateway, to.UnderlayIfindex); refused == nil {
			v.Flags |= remoteRx
		}
	}
	if err := r.f.objects.Remotes.Update(number, v, ebpf.UpdateLock); err != nil {
		// Better userspace than an outdated entry. Routes still lead to the number, so no other remote may get it.
		r.lacking = r.f.explainMap("a remote", err)
		r.disableLocked(r.lacking)
		return r.lacking
	}
	if !to.Rx || refused != nil {
		_ = r.attachFor(gateway, 0)
	}
	return refused
}

// LastReceived returns when the fast path received the last packet from a gateway; zero if it has received none.
func (r *Routes) LastReceived(gateway [4]byte) time.Time {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	var v remoteValue
	number, ok := r.numbers[gateway]
	if !ok || !r.open() || r.f.objects.Remotes.Lookup(number, &v) != nil {
		return time.Time{}
	}
	at, _ := monotonicToTime(v.LastReceived)
	return at
}

// Accept replaces the prefixes of accept-from and accept-to. An empty list leaves the last one in the map: the caller
// clears Tunnel.AcceptFrom or AcceptTo. It attaches ipip_decap to the Senders' devices.
func (r *Routes) Accept(from []Sender, to []netip.Prefix) error {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	if !r.open() {
		return ErrClosed
	}
	senders, devices := make(map[netip.Prefix]uint32, len(from)), map[int]bool{}
	for _, s := range from {
		senders[s.Prefix.Masked()] = uint32(s.Device)
		if s.Device != 0 {
			devices[s.Device] = true
		}
	}
	if err := r.receiveSenders(devices); err != nil {
		return err
	}
	err := r.acceptIn(r.f.objects.AcceptFrom, &r.from, senders)
	destinations := make(map[netip.Prefix]uint32, len(to))
	for _, p := range to {
		destinations[p.Masked()] = 1
	}
	return errors.Join(err, r.acceptIn(r.f.objects.AcceptTo, &r.to, destinations))
}

// receiveSenders attaches ipip_decap to these devices for accept-from, and releases those that only the last list had.
func (r *Routes) receiveSenders(devices map[int]bool) error {
	for device := range devices {
		if !r.senders[device] {
			if err := r.f.acquireUnderlay(device); err != nil {
				return err
			}
			r.senders[device] = true
		}
	}
	for device := range r.senders {
		if !devices[device] {
			r.f.releaseUnderlay(device)
			delete(r.senders, device)
		}
	}
	return nil
}

func (r *Routes) acceptIn(m *ebpf.Map, old *map[netip.Prefix]uint32, next map[netip.Prefix]uint32) error {
	if len(next) == 0 {
		return nil
	}
	for p, value := range next {
		if was, ok := (*old)[p]; ok && was == value {
			continue
		}
		if err := m.Put(r.prefixKey(p), value); err != nil {
			return r.f.explainMap("a prefix of accept-from or accept-to", err)
		}
	}
	for p := range *old {
		if _, ok := next[p]; !ok {
			_ = m.Delete(r.prefixKey(p))
		}
	}
	*old = next
	return nil
}

func (r *Routes) prefixKey(p netip.Prefix) prefixKey {
	p = p.Masked()
	return prefixKey{Length: 32 + uint32(p.Bits()), Ifindex: r.ifindex, Address: p.Addr().As4()}
}
