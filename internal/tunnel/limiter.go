package tunnel

import (
	"sync/atomic"
	"time"
)

// limiter allows so many events in each second of the clock. Its zero value is ready. It is safe
// for concurrent use, and may allow a few more at the turn of a second.
type limiter struct {
	second atomic.Int64
	count  atomic.Int32
}

const (
	// perSecond is Linux's default of icmp_msgs_per_sec, for a whole host.
	perSecond = 1000
	// remotePerSecond is for each of many remotes: whoever forges the address of one takes nothing from the others.
	remotePerSecond = 10
)

func (l *limiter) allow(now time.Time, most int32) bool {
	if second := now.Unix(); l.second.Swap(second) != second {
		l.count.Store(0)
	}
	return l.count.Add(1) <= most
}
