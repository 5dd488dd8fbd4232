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

// warnFragmentation logs once that a large MTU means fragments, and once that this host fails to
// reassemble (its counters are those of all its packets).
func (t *Tunnel) warnFragmentation() {
	if !t.mayFragment() {
		return
	}
	done, failed, err := t.engine.network.Reassembly()
	if err != nil {
		return
	}
	if !t.fragmentingLogged {
		t.fragmentingLogged = true
		t.reasmOKs, t.reasmFails = done, failed
		t.log.Info("packets above the path MTU are sent in fragments: fast where none is lost, and one lost fragment loses the whole packet",
			"actual-mtu", t.MTU(), "path-mtu", t.route.Load().path.MTU)
		return
	}
	done, failed = done-t.reasmOKs, failed-t.reasmFails
	if !t.fragmentLossLogged && failed >= lossMinimum && failed > (done+failed)/lossRatio {
		t.fragmentLossLogged = true
		t.log.Warn("fragments are lost on the way here, and with each its whole packet",
			"not-reassembled", failed, "reassembled", done, "remedy", "set mtu to auto at both ends")
	}
}
