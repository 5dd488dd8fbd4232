package drop

import (
	"encoding/json"
	"strconv"
	"sync/atomic"
)

// Counters counts packets by Reason. The zero value is ready; its methods may be called by
// several goroutines.
type Counters [NumReasons]atomic.Uint64

// Add counts n packets.
func (c *Counters) Add(r Reason, n uint64) { c[r].Add(n) }

// Load returns the count of one Reason.
func (c *Counters) Load(r Reason) uint64 { return c[r].Load() }

// All returns the count of each Reason.
func (c *Counters) All() (all Counts) {
	for r := range all {
		all[r] = c[r].Load()
	}
	return all
}

// Map returns the counts by the names of reasons, without reasons that never occurred. It is never nil.
func (c *Counters) Map() map[string]uint64 {
	m := map[string]uint64{}
	for r := range All() {
		if n := c[r].Load(); n > 0 {
			m[r.String()] = n
		}
	}
	return m
}

// Counts are the values of Counters when they were read, by Reason. Their JSON has the reasons that
// have occurred, by name.
type Counts [NumReasons]uint64

// MarshalJSON implements json.Marshaler.
func (c Counts) MarshalJSON() ([]byte, error) {
	text := []byte{'{'}
	for r := range All() {
		if c[r] == 0 {
			continue
		}
		if len(text) > 1 {
			text = append(text, ',')
		}
		text = append(strconv.AppendQuote(text, r.String()), ':')
		text = strconv.AppendUint(text, c[r], 10)
	}
	return append(text, '}'), nil
}

// UnmarshalJSON implements json.Unmarshaler. It ignores reasons that only another version has.
func (c *Counts) UnmarshalJSON(text []byte) error {
	var counts map[string]uint64
	if err := json.Unmarshal(text, &counts); err != nil {
		return err
	}
	*c = Counts{}
	for name, n := range counts {
		if r, ok := byName[name]; ok {
			c[r] = n
		}
	}
	return nil
}

var byName = func() map[string]Reason {
	names := make(map[string]Reason, NumReasons)
	for r := range All() {
		names[r.String()] = r
	}
	return names
}()
