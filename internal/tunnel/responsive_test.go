package tunnel

import (
	"testing"
	"time"

	"ipipd/test/memory"
)

func TestEngineUnresponsive(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	apply(t, e, lineA, lineB)
	if name := e.Unresponsive(time.Minute); name != "" {
		t.Errorf("%s does not answer", name)
	}
	release := make(chan struct{})
	e.Tunnel("b").events <- func(*control) { <-release }
	if name := e.Unresponsive(20 * time.Millisecond); name != "b" {
		t.Errorf("b is stuck, and %q does not answer", name)
	}
	close(release)
	if name := e.Unresponsive(time.Minute); name != "" {
		t.Errorf("%s does not answer", name)
	}
}
