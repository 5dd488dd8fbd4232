package netlab

import (
	"testing"

	"ipipd/internal/drop"
)

// Each reason is provoked somewhere.
func TestDropProvoked(t *testing.T) {
	n := 0
	for r := range drop.All() {
		n++
		if DropProvoked[r.String()] == "" {
			t.Errorf("%s: say which test provokes it", r)
		}
	}
	if len(DropProvoked) != n {
		t.Errorf("%d reasons, want %d", len(DropProvoked), n)
	}
}
