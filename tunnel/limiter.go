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
