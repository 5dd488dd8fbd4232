package tunnel

import (
	"fmt"
	"time"

	"ipipd/internal/fastpath"
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

// watch is the looking for what nobody tells of.
type watch struct {
	device int
	why    string // what was seen; "" is nothing
	sent   uint64 // packets that the kernel had sent when it was last asked
	last   time.Time
	armed  bool // look is due
}

// wanted reports whether to look again soon, where the kernel has sent that many packets.
func (w *watch) wanted(sent uint64, now time.Time) bool {
	if sent != w.sent {
		w.sent, w.last = sent, now
	}
	return w.why != "" || now.Sub(w.last) < watchFor
}

// keepWatch has look called when that is wanted. The caller holds mu, or is alone.
func (t *Tunnel) keepWatch() {
	w := &t.fast.watch
	if !w.armed && w.wanted(t.fastStats().TxPackets, time.Now()) {
		w.armed = true
		time.AfterFunc(watchEvery, t.look)
	}
}

// look wakes the supervisor if what hangs on the interface has changed.
func (t *Tunnel) look() {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := &t.fast.watch
	w.armed = false
	if t.closed || t.fast.link.Load() == nil && w.why == "" {
		return // what is in the way now is told of
	}
	f, err := t.host.fastPath()
	if err != nil {
		return
	}
	if old := w.why; t.passedOver(f, w.device) != old {
		t.wakeSupervisor()
	}
	t.keepWatch()
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
	t.fast.watch.device, t.fast.watch.why = device, why
	return why
}
