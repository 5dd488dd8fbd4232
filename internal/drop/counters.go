package drop

import "sync/atomic"

// Counters counts packets by Reason. The zero value is ready; its methods may be called by
// several goroutines.
type Counters [NumReasons]atomic.Uint64

// Add counts n packets.
func (c *Counters) Add(r Reason, n uint64) { c[r].Add(n) }

// Load is the count of one Reason.
func (c *Counters) Load(r Reason) uint64 { return c[r].Load() }

// All is the count of each Reason.
func (c *Counters) All() (all [NumReasons]uint64) {
	for r := range all {
		all[r] = c[r].Load()
	}
	return all
}

// Map is reason → packets, without the reasons that never occurred. It is never nil.
func (c *Counters) Map() map[string]uint64 {
	m := map[string]uint64{}
	for r := range All() {
		if n := c[r].Load(); n > 0 {
			m[r.String()] = n
		}
	}
	return m
}
