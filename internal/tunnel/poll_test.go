package tunnel

import (
	"testing"
	"time"
)

func TestActivity(t *testing.T) {
	var a activity
	at := time.Unix(1000, 0)
	look := func(what string, packets uint64, after time.Duration, want bool) {
		t.Helper()
		at = at.Add(after)
		if got := a.active(packets, at); got != want {
			t.Errorf("%s: wanted %v", what, got)
		}
	}
	look("there never was a packet", 0, 0, false)
	look("idle", 0, time.Hour, false)
	look("packets", 5, pollIdle, true)
	look("and more", 6, pollInterval, true)
	look("a moment without any", 6, pollInterval, true)
	look("they have ended", 6, activeFor, false)
	look("idle again", 6, time.Hour, false)
}
