package tunnel

import (
	"errors"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/keepalive"
)

// fastPathState is a tunnel's attachment to the eBPF fast path (package fastpath). Its contents
// derive from the tunnel's other state; syncFastPath updates the kernel.
type fastPathState struct {
	link atomic.Pointer[fastpath.Link] // nil while all packets go through userspace
	// blocker is why there is no link; "" if there is one, nil before the first syncFastPath.
	blocker atomic.Pointer[string]

	// Guarded by the tunnel's mu.
	programmed fastpath.Tunnel
	tapMonitor tapMonitor
}

// loadFastPath loads the eBPF programs on first use.
func (e *Engine) loadFastPath() (*fastpath.FastPath, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fastPath == nil && e.fastPathErr == nil {
		e.fastPath, e.fastPathErr = e.openFastPath()
	}
	return e.fastPath, e.fastPathErr
}

// syncFastPath enables, updates or disables the fast path to match the tunnel's state. The caller
// holds mu, or is Start.
func (t *Tunnel) syncFastPath() {
	if t.closed {
		return
	}
	blocker := t.fastPathBlocker()
	t.fast.tapMonitor.blocker = ""
	if blocker == "" {
		blocker = t.enableFastPath()
	}
	if blocker != "" {
		t.disableFastPath()
	}
	t.scheduleTapCheck()
	old := t.fast.blocker.Swap(&blocker)
	if old != nil && *old == blocker || !t.cfg.fastPathAllowed() {
		return
	}
	switch {
	case blocker != "":
		t.log.Info("packets are carried in userspace", "fast-path", blocker)
	case old == nil:
		t.log.Debug("the kernel carries plain packets", "fast-path", "active")
	default: // the last log line was the one above
		t.log.Info("the kernel carries plain packets", "fast-path", "active")
	}
}

// fastPathBlocker is the reason why this tunnel must not use the fast path; "" if it may.
func (t *Tunnel) fastPathBlocker() string {
	switch {
	case t.ipsecPolicy != nil:
		return "ipsec-secret is set"
	case !t.cfg.fastPathAllowed():
		return "allow-fast-path is no"
	case t.noRoute:
		return "there is no way to the remote"
	case t.localAbsent():
		return "local-address is not on this host"
	case t.iface.Moved:
		return "the interface is in another network namespace"
	case !t.iface.Up: // userspace counts the packets that it refuses
		return "the interface is down"
	}
	if t.bypassBlocker != "" { // fwmark is one of the reasons
		return t.bypassBlocker
	}
	if blocker := t.engine.network.IngressFilters(t.underlay.Device); blocker != "" {
		return blocker
	}
	return t.engine.network.EgressHooks(t.iface.Index)
}

// enableFastPath attaches or updates the link, and returns the reason if it cannot.
func (t *Tunnel) enableFastPath() (blocker string) {
	f, err := t.engine.loadFastPath()
	if err != nil {
		return err.Error()
	}
	want := t.fastTunnel()
	if blocker := t.tapBlocker(f, want.Ifindex); blocker != "" {
		return blocker
	}
	if link := t.fast.link.Load(); link != nil && want.Ifindex == t.fast.programmed.Ifindex {
		if err := link.Update(want); err != nil {
			return err.Error()
		}
	} else {
		t.disableFastPath()
		link, err := f.Attach(want)
		if err != nil {
			return err.Error()
		}
		t.fast.link.Store(link)
	}
	t.fast.programmed = want
	return ""
}

// fastTunnel is the kernel's configuration of this tunnel.
func (t *Tunnel) fastTunnel() fastpath.Tunnel {
	route := t.route.Load()
	next := t.underlay.Gateway
	if next == [4]byte{} {
		next = route.path.Remote
	}
	f := fastpath.Tunnel{
		Ifindex: t.iface.Index, MTU: t.MTU(),
		Local: route.path.Local, Remote: route.path.Remote,
		UnderlayIfindex: t.underlay.Device, NextHop: next, PathMTU: route.path.MTU,
		DSCP: route.outer.DSCP, TTL: route.outer.TTL, DontFragmentInherit: route.outer.DontFragmentInherit,
		ClampTCPMSS: t.cfg.ClampTCPMSS,
	}
	if t.echo != nil {
		f.EchoSource, f.EchoDestination = t.cfg.KeepaliveTarget.As4(), t.cfg.Addresses[0].Addr().As4()
	}
	// Packets that change the keepalive state, or need an ICMP error, must go through
	// userspace.
	state, reachable := keepalive.State(t.state.Load()), !t.unreachable.Load()
	f.TxEnabled = reachable && state.Running()
	f.RxEnabled = reachable && (state == keepalive.Up || state == keepalive.Off)
	return f
}

// disableFastPath closes the link, if there is one, and adds its counters to the tunnel's. The
// caller holds mu, or is Start.
func (t *Tunnel) disableFastPath() {
	link := t.fast.link.Swap(nil)
	if link == nil {
		return
	}
	stopped := t.fast.programmed
	stopped.TxEnabled, stopped.RxEnabled = false, false
	_ = link.Update(stopped) // stop counting; this fails if the device is gone
	s, _ := link.Stats()
	t.counters.rx.add(int(s.RxPackets), s.RxBytes)
	t.counters.tx.add(int(s.TxPackets), s.TxBytes)
	t.drop(drop.SendFailed, int(s.TxFailed))
	t.mergeLastReceived(s.LastReceived)
	_ = link.Close()
}

// mergeLastReceived records the fast path's time of the last packet. It does not wake the
// supervisor.
func (t *Tunnel) mergeLastReceived(at time.Time) {
	if since := int64(at.Sub(t.epoch)); !at.IsZero() && since > t.lastReceivedNs.Load() {
		t.lastReceivedNs.Store(since)
	}
}

// fastStats returns the link's counters; zero without a link.
func (t *Tunnel) fastStats() (s fastpath.Stats) {
	if link := t.fast.link.Load(); link != nil {
		var err error
		if s, err = link.Stats(); err != nil && !errors.Is(err, fastpath.ErrClosed) {
			t.log.Debug("cannot read what the kernel carried", "err", err)
		}
	}
	return s
}

// fastState is Status.FastPath: "active", or why not.
func (t *Tunnel) fastState() string {
	switch blocker := t.fast.blocker.Load(); {
	case blocker == nil:
		return "starting"
	case *blocker != "":
		return *blocker
	}
	return "active"
}

// totals are the counters of userspace and fast path together. It holds mu so that a link being
// closed is counted once.
func (t *Tunnel) totals() (rxPackets, rxBytes, txPackets, txBytes uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.fastStats()
	rxPackets, rxBytes = t.counters.rx.load()
	txPackets, txBytes = t.counters.tx.load()
	return rxPackets + s.RxPackets, rxBytes + s.RxBytes, txPackets + s.TxPackets, txBytes + s.TxBytes
}

// idCounters returns ID ranges for n queues. If the fast path is allowed, the upper half of all
// IDs is reserved for it (package fastpath).
func (t *Tunnel) idCounters(n int) []idCounter {
	if t.cfg.fastPathAllowed() {
		return splitIDs(2 * n)[:n]
	}
	return splitIDs(n)
}
