package fdguard

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Receive moderation, as with NIC interrupts: above a message rate, pause a little before
// each wait so that batches grow, because the cost per batch (system calls, a wake-up
// of the reading process) hardly depends on its size. Request-response traffic stays
// below the rate and is never delayed. A segment of a TCP stream over an underlay that segments
// costs the receiver 0.89 times the processor time (8 rounds in turns, 2 processors, busy machine).
const (
	moderateAbove      = 50_000           // messages per second
	rateInterval       = time.Millisecond // over which the rate is measured
	moderateBelowBatch = 64               // larger batches need no delay
	rxDelay            = 100 * time.Microsecond
)

// Moderation is the state of receive moderation. One goroutine at a time uses it.
type Moderation struct {
	since     time.Time // start of the current rate interval
	count     int       // messages in it
	last      int       // messages in the last batch
	aboveRate bool      // in the last complete interval
}

// Observe counts a batch of n messages.
func (m *Moderation) Observe(n int) {
	m.count += n
	m.last = n
}

// Pause sleeps for rxDelay if messages come at a high rate in small batches. Call it before the
// wait for more: after it, it would add to the latency of a message that is there.
func (m *Moderation) Pause() {
	if m.shouldDelay(time.Now()) {
		delay(rxDelay)
	}
}

// shouldDelay reports whether to delay the next receive.
func (m *Moderation) shouldDelay(now time.Time) bool {
	if d := now.Sub(m.since); d >= rateInterval {
		m.aboveRate = float64(m.count) >= moderateAbove*d.Seconds()
		m.since, m.count = now, 0
	}
	return m.aboveRate && m.last < moderateBelowBatch
}

// delay sleeps without telling the Go scheduler.
func delay(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&t)), 0, 0)
}
