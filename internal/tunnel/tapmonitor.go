package tunnel

import (
	"fmt"
	"time"

	"ipipd/internal/fastpath"
)

// Packets of the fast path skip the egress of the tunnel's interface: its qdisc, tc filters,
// later eBPF programs and captures. So the fast path is disabled while any of these is
// present, as in RouterOS. Netlink notifies of some of them (Network.EgressHooks, see
// fastPathBlocker); captures and eBPF programs have to be polled.

const (
	// tapCheckInterval is the polling interval while the fast path forwards packets, or is
	// disabled because of a tap.
	tapCheckInterval = time.Second
	// tapCheckIdle is how long polling goes on after the last packet. An idle tunnel is checked
	// in the supervisor's ordinary rounds.
	tapCheckIdle = 3 * time.Second
)

// tapMonitor polls for captures and eBPF programs on the interface's egress. The tunnel's mu
// guards it.
type tapMonitor struct {
	device    int
	blocker   string // what was found; "" is nothing
	sent      uint64 // the fast path's packet counter as last read
	last      time.Time
	scheduled bool // a timer for checkTaps is running
}

// due reports whether to poll; sent is the fast path's packet counter.
func (w *tapMonitor) due(sent uint64, now time.Time) bool {
	if sent != w.sent {
		w.sent, w.last = sent, now
	}
	return w.blocker != "" || now.Sub(w.last) < tapCheckIdle
}

// scheduleTapCheck starts the timer for checkTaps if a check is due. The caller holds mu, or is
// Start.
func (t *Tunnel) scheduleTapCheck() {
	w := &t.fast.tapMonitor
	if !w.scheduled && w.due(t.fastStats().TxPackets, time.Now()) {
		w.scheduled = true
		time.AfterFunc(tapCheckInterval, t.checkTaps)
	}
}

// checkTaps wakes the supervisor if a tap has appeared or gone.
func (t *Tunnel) checkTaps() {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := &t.fast.tapMonitor
	w.scheduled = false
	if t.closed || t.fast.link.Load() == nil && w.blocker == "" {
		return // netlink notifies of the present blocker
	}
	f, err := t.engine.loadFastPath()
	if err != nil {
		return
	}
	if old := w.blocker; t.tapBlocker(f, w.device) != old {
		t.wakeSupervisor()
	}
	t.scheduleTapCheck()
}

// tapBlocker is the capture or eBPF program that f would hide the interface's packets from; "" if
// there is none. The caller holds mu, or is Start.
func (t *Tunnel) tapBlocker(f *fastpath.FastPath, device int) (blocker string) {
	blocker = t.engine.network.EgressTaps(device)
	if blocker == "" {
		foreign, err := f.ForeignOnEgress(device)
		switch {
		case err != nil:
			blocker = fmt.Sprintf("cannot tell which eBPF programs the interface has: %v", err)
		case foreign:
			blocker = "another eBPF program hangs on the egress of the interface (tcx)"
		}
	}
	t.fast.tapMonitor.device, t.fast.tapMonitor.blocker = device, blocker
	return blocker
}
