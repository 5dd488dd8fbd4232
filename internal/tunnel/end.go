package tunnel

import (
	"time"

	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
)

// Where packets end that go no further: those of a tunnel in Tunnel.drop, those of no tunnel
// in Engine.dropPacket. Captures see them there, or have seen them where count is called.

// drop counts a packet of this tunnel of which a capture has no bytes.
func (t *Tunnel) drop(why drop.Reason) {
	t.count(why, 1)
	if captures := t.captures.Load(); captures != nil {
		captures.Lost(why, 1, time.Now())
	}
}

// dropPacket counts a packet of this tunnel, and captures its bytes p.
func (t *Tunnel) dropPacket(why drop.Reason, where capture.Point, p []byte) {
	t.count(why, 1)
	t.capture(where, p, why)
}

// count is drop for packets that captures have seen.
func (t *Tunnel) count(why drop.Reason, n int) {
	t.counters.drops.Add(why, uint64(n))
	if why == drop.Loop && t.looped.note(1) {
		t.wakeControl()
	}
}

// dropPacket counts a packet that belongs to no tunnel, and captures its bytes p.
func (e *Engine) dropPacket(why drop.Reason, p []byte) {
	e.count(why, 1)
	if captures := e.captures.Load(); captures != nil {
		captures.Packet(capture.NoTunnel, p, 0, why, time.Now())
	}
}

// count is dropPacket for packets that captures have seen.
func (e *Engine) count(why drop.Reason, n int) { e.drops.Add(why, uint64(n)) }

// dropCounts returns the dropped packets of this tunnel by reason, the fast path's included.
func (t *Tunnel) dropCounts() map[string]uint64 {
	m := t.counters.drops.Map()
	fast := t.fastStats()
	for why, n := range fastDrops(&fast) {
		if n > 0 {
			m[why.String()] += n
		}
	}
	return m
}

// fastDrops returns the packets that the fast path has dropped, by reason.
func fastDrops(s *fastpath.Stats) map[drop.Reason]uint64 {
	return map[drop.Reason]uint64{
		drop.SendFailed: s.TxFailed, drop.ReversePath: s.ReversePath, drop.NotInAcceptFrom: s.NotInAcceptFrom, drop.NotInAcceptTo: s.NotInAcceptTo,
	}
}

// dropCounts returns the dropped packets that belong to no tunnel, by reason.
func (e *Engine) dropCounts() map[string]uint64 {
	m := e.drops.Map()
	if n := e.socket.Overflows(); n > 0 {
		m[drop.ReceiveOverflow.String()] = n
	}
	return m
}
