package tunnel

import (
	"errors"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/fastpath"
	"ipipd/keepalive"
)

// fast is the part of a tunnel that the kernel carries (package fastpath), where
// it may: the plain packets. What is wanted of it follows from what the rest of
// the tunnel knows, and is put to the kernel whenever that changes.
type fast struct {
	link atomic.Pointer[fastpath.Link] // nil while all packets take the data path here
	// why there is no link; "" if there is. Both are for whoever shows them.
	why atomic.Pointer[string]
	// The tunnel's mu guards the rest. set is what the link was last told.
	set   fastpath.Tunnel
	watch watch
}

// fastPath loads the programs for the first tunnel that asks.
func (h *Engine) fastPath() (*fastpath.FastPath, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.kernelPath == nil && h.kernelPathErr == nil {
		h.kernelPath, h.kernelPathErr = h.openFastPath()
	}
	return h.kernelPath, h.kernelPathErr
}

// syncFastPath has the kernel carry what it may, as the tunnel is now. The caller
// holds mu, or is alone.
func (t *Tunnel) syncFastPath() {
	if t.closed {
		return
	}
	why := t.fastPathBlocker()
	t.fast.watch.why = ""
	if why == "" {
		why = t.enableFastPath()
	}
	if why != "" {
		t.disableFastPath()
	}
	t.keepWatch()
	old := t.fast.why.Swap(&why)
	if old != nil && *old == why || !t.cfg.fastPath() {
		return
	}
	switch {
	case why != "":
		t.log.Info("packets are carried in userspace", "fast-path", why)
	case old == nil:
		t.log.Debug("the kernel carries plain packets", "fast-path", "active")
	default: // the line above was the last one about it
		t.log.Info("the kernel carries plain packets", "fast-path", "active")
	}
}

// fastPathBlocker is why this tunnel must not use the fast path now; "" if it may.
func (t *Tunnel) fastPathBlocker() string {
	switch {
	case t.ipsecPolicy != nil:
		return "ipsec-secret is set"
	case !t.cfg.fastPath():
		return "allow-fast-path is no"
	case t.noRoute:
		return "there is no way to the remote"
	case t.absent():
		return "local-address is not on this host"
	case t.iface.Moved:
		return "the interface is in another network namespace"
	case !t.iface.Up: // what the kernel does not take then has to be counted
		return "the interface is down"
	}
	if t.bypassBlocker != "" { // among them fwmark
		return t.bypassBlocker
	}
	if why := t.host.network.IngressFilters(t.underlay.Device); why != "" {
		return why
	}
	return t.host.network.EgressHooks(t.iface.Index)
}

// enableFastPath tells the kernel, and returns what stood against it.
func (t *Tunnel) enableFastPath() (why string) {
	f, err := t.host.fastPath()
	if err != nil {
		return err.Error()
	}
	want := t.fastTunnel()
	if why := t.passedOver(f, want.Ifindex); why != "" {
		return why
	}
	if link := t.fast.link.Load(); link != nil && want.Ifindex == t.fast.set.Ifindex {
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
	t.fast.set = want
	return ""
}

// fastTunnel is what the kernel has to know.
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
	// A packet that is news to the supervisor has to pass the data path here, and
	// so has one that an inner sender is to be told of.
	state, reachable := keepalive.State(t.state.Load()), !t.unreachable.Load()
	f.TxEnabled = reachable && state.Running()
	f.RxEnabled = reachable && (state == keepalive.Up || state == keepalive.Off)
	return f
}

// disableFastPath brings all packets back to the data path here, and keeps what was
// counted.
func (t *Tunnel) disableFastPath() {
	link := t.fast.link.Swap(nil)
	if link == nil {
		return
	}
	quiet := t.fast.set
	quiet.TxEnabled, quiet.RxEnabled = false, false
	_ = link.Update(quiet) // so that nothing is counted any more; it may fail where the device is gone
	s, _ := link.Stats()
	t.counters.rx.add(int(s.RxPackets), s.RxBytes)
	t.counters.tx.add(int(s.TxPackets), s.TxBytes)
	t.counters.drops.add(encap.DropSendFailed, int(s.TxFailed))
	t.mergeLastReceived(s.LastReceived)
	_ = link.Close()
}

// mergeLastReceived is heard without the waking, for what was noted elsewhere.
func (t *Tunnel) mergeLastReceived(at time.Time) {
	if since := int64(at.Sub(t.epoch)); !at.IsZero() && since > t.lastHeard.Load() {
		t.lastHeard.Store(since)
	}
}

// fastStats is what the kernel has counted; nothing if it carries nothing.
func (t *Tunnel) fastStats() (s fastpath.Stats) {
	if link := t.fast.link.Load(); link != nil {
		var err error
		if s, err = link.Stats(); err != nil && !errors.Is(err, fastpath.ErrClosed) {
			t.log.Debug("cannot read what the kernel carried", "err", err)
		}
	}
	return s
}

// fastState is what print shows: active, or why not.
func (t *Tunnel) fastState() string {
	switch why := t.fast.why.Load(); {
	case why == nil:
		return "starting"
	case *why != "":
		return *why
	}
	return "active"
}

// totals is what both paths have carried. A link that ends meanwhile is counted
// once: what it had counted goes to the counters before it is let go.
func (t *Tunnel) totals() (rxPackets, rxBytes, txPackets, txBytes uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.fastStats()
	rxPackets, rxBytes = t.counters.rx.load()
	txPackets, txBytes = t.counters.tx.load()
	return rxPackets + s.RxPackets, rxBytes + s.RxBytes, txPackets + s.TxPackets, txBytes + s.TxBytes
}

// identifiers are those of n queues, with the upper half of all left to the fast
// path where that is allowed (package fastpath).
func (t *Tunnel) identifiers(n int) []identifier {
	if t.cfg.fastPath() {
		return randomIdentifiers(2 * n)[:n]
	}
	return randomIdentifiers(n)
}
