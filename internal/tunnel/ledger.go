package tunnel

import (
	"sync"
	"sync/atomic"
)

// A ledger is memory that outlives the process, where there is a Manager: in it each tunnel counts what userspace
// carries and drops, as the kernel does in the maps of the fast path, so that no total ever goes back.

// ledgerEntry has the counters of one tunnel.
type ledgerEntry struct {
	ifindex atomic.Uint32 // of the tunnel's interface; 0: the entry is free
	fast    atomic.Uint32 // 1: the fast path counts packets of the tunnel beside it
	counters
}

// ledger's methods do nothing if it is nil.
type ledger struct {
	// anew: the process before has left a ledger that cannot be used.
	anew bool

	mu      sync.Mutex
	entries []ledgerEntry         // the memory is never unmapped: who has a Tunnel that is closed may read it
	old     map[*ledgerEntry]bool // the entries of the process before that no tunnel has taken
}

// take returns the entry of the process before (old) for an adopted interface, or else a free one; nil if there is none.
func (l *ledger) take(ifindex int, adopted bool) (entry *ledgerEntry, old bool) {
	if l == nil {
		return nil, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	id := uint32(ifindex)
	var free *ledgerEntry
	for i := range l.entries {
		switch e := &l.entries[i]; e.ifindex.Load() {
		case 0:
			if free == nil {
				free = e
			}
		case id:
			if adopted && l.old[e] {
				delete(l.old, e)
				return e, true
			}
		}
	}
	if free != nil {
		free.fast.Store(0)
		free.reset()
		free.ifindex.Store(id)
	}
	return free, false
}

// settle frees the entries of the process before that no tunnel has taken.
func (l *ledger) settle() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for e := range l.old {
		e.ifindex.Store(0)
	}
	clear(l.old)
}

// reset sets all counters to zero.
func (c *counters) reset() {
	for _, t := range []*trafficCounter{&c.tx, &c.rx} {
		t.packets.Store(0)
		t.bytes.Store(0)
	}
	for i := range c.drops {
		c.drops[i].Store(0)
	}
}

// takeCounters has the tunnel count in its entry, before anybody else counts.
func (c *control) takeCounters() {
	entry, old := c.engine.ledger.take(c.ifindex, c.adopted)
	if entry == nil {
		return
	}
	c.Tunnel.entry, c.Tunnel.counters = entry, &entry.counters
	if old && entry.fast.Load() != 0 && (c.fast.programs == nil || !c.cfg.FastPathAllowed()) {
		entry.fast.Store(0)
		entry.reset() // what the kernel has counted is lost
	}
}

// noteFastCounters notes that the fast path counts beside the entry. adopted: it goes on with what it had counted.
func (t *Tunnel) noteFastCounters(adopted bool) {
	if t.entry != nil && t.entry.fast.Swap(1) != 0 && !adopted {
		t.entry.reset()
	}
}

// dropCounters frees the entry of a tunnel that is closed, unless the next process goes on with it.
func (t *Tunnel) dropCounters() {
	if t.entry != nil && !t.engine.leaving.Load() {
		t.entry.ifindex.Store(0)
	}
}
