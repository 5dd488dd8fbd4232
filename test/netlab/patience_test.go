package netlab

import (
	"testing"
	"time"
)

func TestSlower(t *testing.T) {
	t.Logf("this machine is %.1f times slower than an idle one", slowness())
	if got := Slower(time.Second); got < time.Second || got != Slower(time.Second) {
		t.Errorf("Slower(1s) is %v, and then %v", got, Slower(time.Second))
	}
	if got := Seconds(1200 * time.Millisecond); got != "2" {
		t.Errorf("1.2 s are %s whole seconds", got)
	}
}
