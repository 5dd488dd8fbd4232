package tunnel

import (
	"sync/atomic"
	"time"
)

// limiter allows perSecond events in each second of the clock. Its zero value is ready. It is safe
// for concurrent use, and may allow a few more at the turn of a second.
type limiter struct {
	second atomic.Int64
	count  atomic.Int32
}

// perSecond is Linux's default of icmp_msgs_per_sec, for a whole host.
const perSecond = 1000

func (l *limiter) allow(now time.Time) bool {
	if second := now.Unix(); l.second.Swap(second) != second {
		l.count.Store(0)
	}
	return l.count.Add(1) <= perSecond
}
