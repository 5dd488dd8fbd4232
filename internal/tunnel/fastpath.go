package tunnel

import (
	"cmp"
	"os"
	"sync/atomic"
	"time"

	"ipipd/internal/fastpath"
	"ipipd/keepalive"
)

// fastPath is a tunnel's attachment to the eBPF fast path (package fastpath). control owns it;
// syncFastPath derives it from the tunnel's other state.
type fastPath struct {
	programs *fastpath.FastPath // nil: the fast path is not allowed, or programsErr
	// programsErr is why the programs could not be loaded.
	programsErr error
	// link is nil until the programs are attached, by Start where that is possible. They stay
	// attached while packets go through userspace: attaching takes a descriptor, and the kernel
	// an RCU grace period.
	link atomic.Pointer[fastpath.Link]
	// blocker is why packets go through userspace; "" if they do not, nil before the first
	// syncFastPath.
	blocker atomic.Pointer[string]
	// tap is what poll has found on the egress of the interface; nil is nothing.
	tap atomic.Pointer[string]
}

// active reports whether the fast path carries packets.
func (f *fastPath) active() bool {
	blocker := f.blocker.Load()
	return blocker != nil && *blocker == ""
}

// Why the fast path is not allowed.
var (
	notAllowed = "allow-fast-path is no"
	encrypts   = "ipsec-secret is set"
)

// syncFastPath enables, updates or disables the fast path to match the tunnel's state. While the
// programs are being attached the state stays what it was.
func (c *control) syncFastPath() {
	if !c.cfg.fastPathAllowed() {
		c.disableFastPath()
		why := &notAllowed
		if c.ipsecPolicy != nil {
			why = &encrypts
		}
		c.fast.blocker.Store(why)
		return
	}
	blocker := c.fastPathBlocker()
	c.attachFastPath()
	if blocker == "" && c.attaching {
		return
	}
	if blocker == "" {
		blocker = c.enableFastPath()
	}
	if blocker != "" {
		c.disableFastPath()
	}
	old := c.fast.blocker.Swap(&blocker)
	switch {
	case old != nil && *old == blocker:
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

// enableFastPath updates the link, and returns the reason if it cannot.
func (c *control) enableFastPath() (blocker string) {
	if err := c.fast.programsErr; err != nil {
		return err.Error()
	}
	link := c.fast.link.Load()
	if link == nil { // attachFastPath has failed
		c.retry = true
		return c.attachErr.Error()
	}
	want := c.fastTunnel()
	if c.fast.active() && want == c.programmed {
		return ""
	}
	if !c.fast.active() || want.Ifindex != c.programmed.Ifindex {
		if tap := c.engine.egressTaps().on(c.fast.programs, want.Ifindex); tap != "" {
			c.fast.tap.Store(&tap)
			c.engine.noteTraffic() // poll until it is gone
			return tap
		}
	}
	if err := link.Update(want); err != nil {
		c.retry = true
		return err.Error()
	}
	c.programmed = want
	c.engine.noteTraffic() // poll it
	return ""
}

// attachError is why the programs could not be attached.
type attachError struct {
	error
	tried   fastpath.Tunnel
	retryAt time.Time
}

// attachFastPath has the programs attached, once, whether the tunnel may use the fast path yet or not,
// so that nothing has to be opened when it may. To attach one takes the kernel an RCU grace period with
// the RTNL held: it is done in a goroutine, one tunnel after the other, so that no tunnel's probes
// wait for all others' programs, and not each takes a thread.
func (c *control) attachFastPath() {
	if c.fast.programs == nil || c.fast.link.Load() != nil || c.attaching || c.iface.Load().Moved {
		return
	}
	t := c.fastTunnel()
	t.TxEnabled, t.RxEnabled = false, false
	if !c.underlay.Ethernet {
		t.UnderlayIfindex = 0
	}
	if failed := c.attachErr; failed != nil && failed.tried == t && time.Now().Before(failed.retryAt) {
		return
	}
	c.attaching = true
	c.loops.Go(func() {
		link, err := c.attachLink(t)
		c.events <- func(c *control) { // endFastPath waits for it
			c.attaching = false
			c.attachErr = &attachError{err, t, time.Now().Add(retryInterval)}
			if err == nil {
				c.attachErr = nil
				c.fast.link.Store(link)
			}
			if c.ctx.Err() == nil {
				c.syncFastPath()
			}
		}
	})
}

// attachLink attaches the programs, with the fast path disabled.
func (t *Tunnel) attachLink(f fastpath.Tunnel) (*fastpath.Link, error) {
	t.engine.linking.Lock()
	defer t.engine.linking.Unlock()
	if t.closing.Load() {
		return nil, os.ErrClosed
	}
	link, err := t.fast.programs.Attach(f)
	if err == nil {
		link.Disable()
	}
	return link, err
}

// endFastPath closes the link of a tunnel that ends.
func (c *control) endFastPath() {
	for c.attaching {
		(<-c.events)(c)
	}
	if link := c.fast.link.Load(); link != nil {
		c.engine.linking.Lock()
		defer c.engine.linking.Unlock()
		_ = link.Close() // fails if the device is gone
	}
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
		f.EchoSource, f.EchoDestination = c.cfg.KeepaliveTarget.As4(), c.cfg.Addresses[0].Prefix.Addr().As4()
	}
	// Packets that change the keepalive state, or need an ICMP error, must go through
	// userspace.
	state, reachable := keepalive.State(c.state.Load()), !c.unreachable.Load()
	f.TxEnabled = reachable && state.Running()
	f.RxEnabled = reachable && (state == keepalive.Up || state == keepalive.Off)
	return f
}

// disableFastPath has all packets go through userspace.
func (c *control) disableFastPath() {
	if link := c.fast.link.Load(); link != nil {
		link.Disable()
	}
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
func (t *Tunnel) fastStats() (s fastpath.Stats) {
	link := t.fast.link.Load()
	if link == nil {
		return s
	}
	s, err := link.Stats()
	if err != nil {
		t.log.Debug("cannot read the counters of the fast path", "err", err)
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

// totals are the counters of userspace and fast path together.
func (t *Tunnel) totals() (rxPackets, rxBytes, txPackets, txBytes uint64) {
	s := t.fastStats()
	rxPackets, rxBytes = t.counters.rx.load()
	txPackets, txBytes = t.counters.tx.load()
	return rxPackets + s.RxPackets, rxBytes + s.RxBytes, txPackets + s.TxPackets, txBytes + s.TxBytes
}
