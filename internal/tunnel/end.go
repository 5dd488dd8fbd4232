package tunnel

import "ipipd/internal/drop"

// Where packets end that go no further: those of a tunnel in Tunnel.drop, those of no tunnel
// in Engine.drop.

// drop counts n packets of this tunnel.
func (t *Tunnel) drop(why drop.Reason, n int) {
	t.counters.drops.Add(why, uint64(n))
	if why == drop.Loop && t.looped.note(1) {
		t.wakeControl()
	}
}

// drop counts n packets that belong to no tunnel.
func (e *Engine) drop(why drop.Reason, n int) { e.drops.Add(why, uint64(n)) }

// dropCounts is reason → packets of this tunnel, the fast path's included.
func (t *Tunnel) dropCounts() map[string]uint64 {
	m := t.counters.drops.Map()
	if n := t.fastStats().TxFailed; n > 0 {
		m[drop.SendFailed.String()] += n
	}
	return m
}

// dropCounts is reason → packets that belong to no tunnel.
func (e *Engine) dropCounts() map[string]uint64 {
	m := e.drops.Map()
	if n := e.socket.Overflows(); n > 0 {
		m[drop.ReceiveOverflow.String()] = n
	}
	return m
}
