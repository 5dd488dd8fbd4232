package tunnel

import (
	"testing"
	"time"
)

func TestWatch(t *testing.T) {
	var w watch
	at := time.Unix(1000, 0)
	look := func(what string, sent uint64, after, want time.Duration) {
		t.Helper()
		at = at.Add(after)
		if got := w.wait(sent, at); got != want {
			t.Errorf("%s: waits %v, want %v", what, got, want)
		}
	}
	look("nothing was ever sent", 0, 0, lookEvery)
	look("idle", 0, time.Hour, lookEvery)
	look("packets are sent", 5, lookEvery, watchEvery)
	look("and more", 6, watchEvery, watchEvery)
	look("a moment without any", 6, watchEvery, watchEvery)
	look("they have ended", 6, watchFor, lookEvery)
	look("idle again", 6, time.Hour, lookEvery)
	w.seen = true
	look("something is there", 6, time.Hour, watchEvery)
	look("still", 0, time.Hour, watchEvery) // the counters go with the fast path
	w.seen = false
	look("it has gone", 0, watchFor, lookEvery)
}
