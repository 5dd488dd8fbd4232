package netlab

import (
	"testing"
	"time"
)

func TestScale(t *testing.T) {
	t.Logf("this machine is %.1f times slower than an idle one", slowdown())
	if got := Scale(time.Second); got < time.Second || got != Scale(time.Second) {
		t.Errorf("Scale(1s) is %v, and then %v", got, Scale(time.Second))
	}
	if got := Seconds(1200 * time.Millisecond); got != "2" {
		t.Errorf("1.2 s are %s whole seconds", got)
	}
}
