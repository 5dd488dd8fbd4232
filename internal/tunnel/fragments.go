package tunnel

import (
	"math"
	"time"

	"ipipd/internal/warning"
)

// With an MTU above the path MTU, the kernel fragments one large outer packet and the peer's
// kernel reassembles it: one route look-up and one system call instead of forty. That pays
// without packet loss only: one lost fragment loses the whole packet, and after a wrap of the
// 16-bit ID fragments of different packets can be joined (RFC 4963).

const (
	// lossRatio: more than one failed reassembly in so many packets is worth a warning.
	lossRatio = 1000
	// lossMinimum is the least number of failed reassemblies that is significant.
	lossMinimum = 10
)

// mayFragment reports whether the interface's MTU is above what the path takes unfragmented.
func (t *Tunnel) mayFragment() bool { return t.MTU() > t.route.Load().maxInner }

// warnFragments warns that an MTU above the path's has packets fragmented, and of fragments that are lost.
func (c *control) warnFragments(r *route, now time.Time) {
	may := c.mayFragment()
	if may && !c.warned(warning.Fragments) {
		c.engine.noteTraffic() // poll it
	}
	c.warnIf(may, warning.Fragments, "actual-mtu %d, path-mtu %d", c.MTU(), r.path.MTU)
	if !may {
		c.forget(&c.fragmentLoss, warning.FragmentLoss)
	}
	c.warnSeen(&c.fragmentLoss, warning.FragmentLoss, "%d packets not reassembled", peerHolds, now)
}

// reassembled are the host's ReasmOKs and ReasmFails (RFC 4293).
type reassembled struct{ done, failed uint64 }

// checkFragmentLoss tells control if this host fails to reassemble packets, by the counters of all its packets.
func (t *Tunnel) checkFragmentLoss(now time.Time, count func() (reassembled, error)) {
	a := &t.activity
	if !t.mayFragment() {
		a.reassembledAt = time.Time{}
		return
	}
	total, err := count()
	if err != nil {
		return
	}
	done, failed := total.done-a.reassembled.done, total.failed-a.reassembled.failed
	switch known := now.Sub(a.reassembledAt) < peerHolds; {
	case known && failed >= lossMinimum && failed > (done+failed)/lossRatio:
		if t.fragmentLoss.note(int(min(failed, math.MaxInt32))) {
			t.wakeControl()
		}
	case known:
		return
	}
	a.reassembledAt, a.reassembled = now, total
}
