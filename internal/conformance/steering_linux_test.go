package conformance

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"ipipd/internal/netlab"
)

// What the fast path receives is spread over the processors if it is data in single
// segments. The daemon of a test has the /sys of another namespace, and says that it
// would have done it.
func TestTheFastPathSpreadsSingleSegmentsOnly(t *testing.T) {
	t.Parallel()
	if runtime.NumCPU() == 1 {
		t.Skip("needs two processors")
	}
	const spread, size = "not spread over the processors", 64 << 20
	t.Run("segments", func(t *testing.T) {
		a, b := hosts(t)
		netlab.Segment(a, "veth0")
		da, db := fast.upA(t, a, "--log-level", "debug"), fast.upB(t, b, "--log-level", "debug")
		isFast(t, da, db)
		netlab.Eventually(t, "the receiver's are spread", func() bool {
			transfer(t, a, b, innerB, size)
			return strings.Contains(db.Log(), spread)
		})
		if strings.Contains(da.Log(), spread) {
			t.Error("so are the sender's, which receives acknowledgements only")
		}
	})
	t.Run("superpackets", func(t *testing.T) {
		a, b := hosts(t)
		da, db := fast.upA(t, a, "--log-level", "debug"), fast.upB(t, b, "--log-level", "debug")
		isFast(t, da, db)
		for range 3 {
			transfer(t, a, b, innerB, size)
			time.Sleep(500 * time.Millisecond)
		}
		if log := da.Log() + db.Log(); strings.Contains(log, spread) {
			t.Errorf("they are spread:\n%s", log)
		}
	})
}
