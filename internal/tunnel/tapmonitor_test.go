package tunnel

import (
	"testing"
	"time"
)

func TestTapMonitorDue(t *testing.T) {
	var w tapMonitor
	at := time.Unix(1000, 0)
	look := func(what string, sent uint64, after time.Duration, want bool) {
		t.Helper()
		at = at.Add(after)
		if got := w.due(sent, at); got != want {
			t.Errorf("%s: wanted %v", what, got)
		}
	}
	look("nothing was ever sent", 0, 0, false)
	look("idle", 0, time.Hour, false)
	look("packets are sent", 5, pollInterval, true)
	look("and more", 6, tapCheckInterval, true)
	look("a moment without any", 6, tapCheckInterval, true)
	look("they have ended", 6, tapCheckIdle, false)
	look("idle again", 6, time.Hour, false)
	w.blocker = "something is there"
	look("something is there", 6, time.Hour, true)
	look("still", 0, time.Hour, true) // the counters go with the fast path
	w.blocker = ""
	look("it has gone", 0, tapCheckIdle, false)
}
