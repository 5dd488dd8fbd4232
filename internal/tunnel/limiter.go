package tunnel

import (
	"sync/atomic"
	"time"
)

// limiter lets perSecond events through in each second of the clock. Its zero
// value is ready, and it may be asked by several goroutines: what one of them
// counts too little at the turn of a second does no harm.
type limiter struct {
	second atomic.Int64
	count  atomic.Int32
}

// perSecond is what Linux allows for ICMP errors of a whole host by default
// (icmp_msgs_per_sec).
const perSecond = 1000

func (l *limiter) allow(now time.Time) bool {
	if second := now.Unix(); l.second.Swap(second) != second {
		l.count.Store(0)
	}
	return l.count.Add(1) <= perSecond
}

// notice is a log line about a state that strangers can bring about, by a forged ICMP
// error for one: it is due once while the state lasts, and not again within a minute,
// however often the state comes and goes. Its zero value is ready; one goroutine at a
// time uses it.
type notice struct {
	told bool
	last time.Time
}

func (n *notice) due(now time.Time) bool {
	if n.told || now.Sub(n.last) < time.Minute {
		return false
	}
	n.told, n.last = true, now
	return true
}

// over is that the state has ended, or is another.
func (n *notice) over() { n.told = false }
