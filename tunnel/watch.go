package tunnel

import (
	"fmt"
	"time"

	"ipipd/fastpath"
)

// What the kernel carries never reaches who asked to see or to shape what the tunnel's
// interface sends: its queueing discipline, tc filters, eBPF programs behind ours, and
// captures. So the fast path is left while any of these is there, as RouterOS does. Of
// some of them netlink tells (rtnl.EgressHooks, which objection asks); for the others
// one has to look.

const (
	// watchEvery is how often one looks while packets are carried, or are not because
	// of what was seen.
	watchEvery = time.Second
	// watchFor is how long a tunnel is watched after the last packet. An idle one is
	// looked at when its supervisor wakes for something else.
	watchFor = 3 * time.Second
)

// watch is when to look again for what nobody tells of.
type watch struct {
	seen bool   // it is there
	sent uint64 // packets that the kernel had sent when it was last asked
	last time.Time
}

// wait is how long not to look, where the kernel has sent that many packets.
func (w *watch) wait(sent uint64, now time.Time) time.Duration {
	if sent != w.sent {
		w.sent, w.last = sent, now
	}
	if w.seen || now.Sub(w.last) < watchFor {
		return watchEvery
	}
	return lookEvery
}

// passedOver is who would not see, without anybody telling, what f carries from that
// interface; "" if nobody. The caller holds mu, or is alone.
func (t *Tunnel) passedOver(f *fastpath.FastPath, device int) (why string) {
	why = t.host.network.EgressTaps(device)
	if why == "" {
		foreign, err := f.ForeignOnEgress(device)
		switch {
		case err != nil:
			why = fmt.Sprintf("cannot tell which eBPF programs the interface has: %v", err)
		case foreign:
			why = "another eBPF program hangs on the egress of the interface (tcx)"
		}
	}
	t.fast.watch.seen = why != ""
	return why
}
