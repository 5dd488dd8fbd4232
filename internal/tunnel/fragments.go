package tunnel

// An MTU above the path's hands the kernel one large packet to cut and has the far
// kernel put it together: one look-up, one queue, one system call for what would be
// forty packets. It pays on a path that loses nothing. One lost fragment loses the
// whole packet, and a wrapped 16-bit ID can join fragments of two (RFC 4963).

const (
	// lossyShare: one packet in so many that cannot be put together is worth a warning.
	lossyShare = 1000
	// lossyLeast is the least number of packets that says anything.
	lossyLeast = 10
)

// cuts reports whether packets as large as the interface takes are cut on their way.
func (t *Tunnel) cuts() bool { return t.MTU() > t.route.Load().maxInner }

// warnOfFragments says once, at the start, what a large MTU means, and once when
// this host's kernel loses packets for want of a fragment.
func (t *Tunnel) warnOfFragments() {
	if !t.cuts() {
		return
	}
	done, failed, err := t.host.network.Reassembly()
	if err != nil {
		return
	}
	if !t.fragmentingLogged {
		t.fragmentingLogged = true
		t.reassembled, t.unassembled = done, failed
		t.log.Info("packets above the path MTU are sent in fragments: fast where none is lost, and one lost fragment loses the whole packet",
			"actual-mtu", t.MTU(), "path-mtu", t.route.Load().path.MTU)
		return
	}
	done, failed = done-t.reassembled, failed-t.unassembled
	if !t.fragmentLossLogged && failed >= lossyLeast && failed > (done+failed)/lossyShare {
		t.fragmentLossLogged = true
		t.log.Warn("fragments are lost on the way here, and with each its whole packet",
			"not-reassembled", failed, "reassembled", done, "remedy", "set mtu to auto at both ends")
	}
}
