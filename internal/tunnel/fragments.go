package tunnel

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

// warnFragmentation logs once that a large MTU means fragments.
func (c *control) warnFragmentation() {
	if c.fragmentingLogged || !c.mayFragment() {
		return
	}
	c.fragmentingLogged = true
	c.log.Info("packets above the path MTU are sent in fragments: fast where none is lost, and one lost fragment loses the whole packet",
		"actual-mtu", c.MTU(), "path-mtu", c.route.Load().path.MTU)
	c.engine.noteTraffic()
}

// reassembled are the host's ReasmOKs and ReasmFails (RFC 4293).
type reassembled struct{ done, failed uint64 }

// checkFragmentLoss logs once that this host, whose counters are those of all its packets, fails
// to reassemble.
func (t *Tunnel) checkFragmentLoss(count func() (reassembled, error)) {
	a := &t.activity
	if a.fragmentLossLogged || !t.mayFragment() {
		return
	}
	now, err := count()
	if err != nil {
		return
	}
	if !a.fragmenting {
		a.fragmenting, a.reassembled = true, now
		return
	}
	done, failed := now.done-a.reassembled.done, now.failed-a.reassembled.failed
	if failed >= lossMinimum && failed > (done+failed)/lossRatio {
		a.fragmentLossLogged = true
		t.log.Warn("fragments are lost on the way here, and with each its whole packet",
			"not-reassembled", failed, "reassembled", done, "remedy", "set mtu to auto at both ends")
	}
}
