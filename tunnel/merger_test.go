package tunnel

import (
	"testing"

	"ipipd/fastpath"
)

// A merger that somebody took away could not be replaced: those who had it let go of none.
func TestAMergerThatCouldNotBeReplacedIsLetGoOf(t *testing.T) {
	h := &Host{openFastPath: func() (*fastpath.FastPath, error) { return nil, errNotReal }}
	h.merger.users, h.merger.lost = 1, 7
	h.releaseMerger()
	if h.merger.users != 0 || h.mergeOverflows() != 7 {
		t.Errorf("%d users, %d overflows", h.merger.users, h.mergeOverflows())
	}
}
