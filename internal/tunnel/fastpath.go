package tunnel

import (
	"cmp"
	"sync/atomic"
	"time"

	"ipipd/internal/fastpath"
	"ipipd/keepalive"
)

// fastPath is a tunnel's attachment to the eBPF fast path (package fastpath). control owns it;
// syncFastPath derives it from the tunnel's other state.
type fastPath struct {
	attached atomic.Pointer[attachment] // never nil after Start
	// blocker is why packets go through userspace; "" if they do not, nil before the first
	// syncFastPath.
	blocker atomic.Pointer[string]
	// tap is what poll has found on the egress of the interface; nil is nothing.
	tap atomic.Pointer[string]
}

// attachment is a link, and the counters of the ones before it. It is immutable: totals and link
// change together.
type attachment struct {
	link   *fastpath.Link // nil while all packets go through userspace
	before fastpath.Stats
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

// syncFastPath enables, updates or disables the fast path to match the tunnel's state.
func (c *control) syncFastPath() {
	blocker, active := c.fastPathBlocker(), false
	if blocker == "" {
		blocker, active = c.enableFastPath()
	}
	if blocker != "" {
		c.disableFastPath()
	} else if !active { // being attached
		return
	}
	old := c.fast.blocker.Swap(&blocker)
	if old != nil && *old == blocker || !c.cfg.fastPathAllowed() {
		return
	}
	switch {
	case blocker != "":
		c.log.Info("packets are carried in userspace", "fast-path", blocker)
	case old == nil:
		c.log.Debug("the kernel carries plain packets", "fast-path", "active")
	default: // the last log line was the one above
		c.log.Info("the kernel carries plain packets", "fast-path", "active")
	}
}

// fastPathBlocker is the reason why this tunnel must not use the fast path; "" if it may.
func (c *control) fastPathBlocker() string {
	switch {
	case c.ipsecPolicy != nil:
		return "ipsec-secret is set"
	case !c.cfg.fastPathAllowed():
		return "allow-fast-path is no"
	case c.noRoute:
		return "there is no way to the remote"
	case c.localAbsent():
		return "local-address is not on this host"
	case c.iface.Load().Moved:
		return "the interface is in another network namespace"
	case !c.iface.Load().Up: // userspace counts the packets that it refuses
		return "the interface is down"
	}
	tap := ""
	if found := c.fast.tap.Load(); found != nil {
		tap = *found
	}
	return cmp.Or(c.bypassBlocker(), c.answer.Ingress, c.answer.Egress, tap)
}

// enableFastPath updates the link, or has it attached and is not active yet. blocker is the reason if
// it cannot.
func (c *control) enableFastPath() (blocker string, active bool) {
	f, err := c.engine.loadFastPath()
	if err != nil {
		return err.Error(), false
	}
	want, link := c.fastTunnel(), c.fast.attached.Load().link
	switch {
	case link == nil && !c.linking:
		if failed := c.linkFailed; failed != nil && want == failed.want && time.Now().Before(failed.retryAt) {
			c.retry = true
			return failed.why, false
		}
		c.attach(f, want)
		return "", false
	case link == nil:
		return "", false
	case want == c.programmed:
		return "", true
	case want.Ifindex != c.programmed.Ifindex:
		c.disableFastPath() // and attached again when that is done
		return "", false
	}
	if err := link.Update(want); err != nil {
		c.retry = true
		return err.Error(), false
	}
	c.programmed = want
	return "", true
}

// linkFailure is an attempt to attach that has failed.
type linkFailure struct {
	want    fastpath.Tunnel
	why     string
	retryAt time.Time
}

// attach attaches the link in a goroutine of its own.
func (c *control) attach(f *fastpath.FastPath, want fastpath.Tunnel) {
	stopped := want
	stopped.TxEnabled, stopped.RxEnabled = false, false
	c.inBackground(func() event {
		if c.closing.Load() {
			return func(*control) {}
		}
		if tap := c.engine.egressTaps().on(f, want.Ifindex); tap != "" {
			return func(c *control) {
				c.fast.tap.Store(&tap)
				c.engine.noteTraffic() // poll until it is gone
			}
		}
		link, err := f.Attach(stopped)
		if err != nil {
			return func(c *control) {
				c.linkFailed = &linkFailure{want, err.Error(), time.Now().Add(retryInterval)}
			}
		}
		return func(c *control) {
			c.programmed, c.linkFailed = stopped, nil
			c.fast.attached.Store(&attachment{link, c.fast.attached.Load().before})
			c.engine.noteTraffic() // poll it
		}
	})
}

// inBackground runs work in a goroutine, and then the event that it returns and syncFastPath in
// control's. To attach or detach a program takes the kernel an RCU grace period with the RTNL held: no
// tunnel's probes wait for that of the others, nor does each take a thread. One at a time is under
// way for a tunnel: linking.
func (c *control) inBackground(work func() event) {
	c.linking = true
	c.loops.Go(func() {
		c.engine.linking.Lock()
		then := work()
		c.engine.linking.Unlock()
		c.events <- func(c *control) { // endFastPath waits for it
			c.linking = false
			then(c)
			if c.ctx.Err() == nil {
				c.syncFastPath()
			}
		}
	})
}

// fastTunnel is the kernel's configuration of this tunnel.
func (c *control) fastTunnel() fastpath.Tunnel {
	route := c.route.Load()
	next := c.underlay.Gateway
	if next == [4]byte{} {
		next = route.path.Remote
	}
	f := fastpath.Tunnel{
		Ifindex: c.ifindex, MTU: c.MTU(),
		Local: route.path.Local, Remote: route.path.Remote,
		UnderlayIfindex: c.underlay.Device, NextHop: next, PathMTU: route.path.MTU,
		DSCP: route.outer.DSCP, TTL: route.outer.TTL, DontFragmentInherit: route.outer.DontFragmentInherit,
		ClampTCPMSS: c.cfg.ClampTCPMSS,
	}
	if c.echo != nil {
		f.EchoSource, f.EchoDestination = c.cfg.KeepaliveTarget.As4(), c.cfg.Addresses[0].Addr().As4()
	}
	// Packets that change the keepalive state, or need an ICMP error, must go through
	// userspace.
	state, reachable := keepalive.State(c.state.Load()), !c.unreachable.Load()
	f.TxEnabled = reachable && state.Running()
	f.RxEnabled = reachable && (state == keepalive.Up || state == keepalive.Off)
	return f
}

// disableFastPath has the link closed, if there is one, and keeps its counters. From now on the
// programs leave all packets to userspace.
func (c *control) disableFastPath() {
	if link := c.detach(); link != nil {
		c.inBackground(func() event {
			_ = link.Close()
			return func(*control) {}
		})
	}
}

// endFastPath is disableFastPath for a tunnel that ends. The link is closed when it returns.
func (c *control) endFastPath() {
	for c.linking {
		(<-c.events)(c)
	}
	if link := c.detach(); link != nil {
		c.engine.linking.Lock()
		defer c.engine.linking.Unlock()
		_ = link.Close()
	}
}

// detach takes the link out of use; nil if there is none.
func (c *control) detach() *fastpath.Link {
	a := c.fast.attached.Load()
	if a.link == nil {
		return nil
	}
	stopped := c.programmed
	stopped.TxEnabled, stopped.RxEnabled = false, false
	_ = a.link.Update(stopped) // stop counting; this fails if the device is gone
	s, _ := a.total()
	c.mergeLastReceived(s.LastReceived)
	c.fast.attached.Store(&attachment{before: s})
	return a.link
}

// total is the sum of the counters.
func (a *attachment) total() (s fastpath.Stats, err error) {
	if a.link != nil {
		s, err = a.link.Stats()
	}
	s.RxPackets += a.before.RxPackets
	s.RxBytes += a.before.RxBytes
	s.TxPackets += a.before.TxPackets
	s.TxBytes += a.before.TxBytes
	s.TxFailed += a.before.TxFailed
	return s, err
}

// mergeLastReceived records the fast path's time of the last packet. It does not wake control.
func (t *Tunnel) mergeLastReceived(at time.Time) {
	since := int64(at.Sub(t.epoch))
	if at.IsZero() {
		return
	}
	for last := t.lastReceivedNs.Load(); since > last && !t.lastReceivedNs.CompareAndSwap(last, since); {
		last = t.lastReceivedNs.Load()
	}
}

// fastStats returns the counters of the fast path since Start.
func (t *Tunnel) fastStats() fastpath.Stats {
	for {
		a := t.fast.attached.Load()
		s, err := a.total()
		if t.fast.attached.Load() != a {
			continue // its link may be closed
		}
		if err != nil {
			t.log.Debug("cannot read the counters of the fast path", "err", err)
		}
		return s
	}
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

// totals are the counters of userspace and fast path together.
func (t *Tunnel) totals() (rxPackets, rxBytes, txPackets, txBytes uint64) {
	s := t.fastStats()
	rxPackets, rxBytes = t.counters.rx.load()
	txPackets, txBytes = t.counters.tx.load()
	return rxPackets + s.RxPackets, rxBytes + s.RxBytes, txPackets + s.TxPackets, txBytes + s.TxBytes
}
