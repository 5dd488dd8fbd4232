package tunnel

import (
	"cmp"
	"fmt"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/netstate"
	"ipipd/keepalive"
)

// fastPath is a tunnel's attachment to the eBPF fast path (package fastpath). control owns it;
// syncFastPath derives it from the tunnel's other state.
type fastPath struct {
	programs *fastpath.FastPath // nil: the fast path is not allowed, or there is a programsErr
	// programsErr is why the programs could not be loaded.
	programsErr error
	// link is nil until ipip_decap is attached, by begin where that is possible. It stays attached
	// while packets go through userspace: attaching takes a descriptor.
	link atomic.Pointer[fastpath.Link]
	// blocker is why packets go through userspace; "" if they do not, nil before the first
	// syncFastPath.
	blocker atomic.Pointer[string]
	// tap names the capture that was found on the egress of the interface; nil is none.
	tap atomic.Pointer[string]
	// captured is what captures want the eBPF programs to copy, captureErr why that is not possible.
	captured   fastpath.Capture
	captureErr error
	// others is what othersReceive has last returned.
	others atomic.Bool
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

// syncFastPath enables, updates or disables the fast path to match the tunnel's state.
func (c *control) syncFastPath() {
	c.noteCaptures()
	defer c.closeFastCapture()
	if !c.cfg.FastPathAllowed() {
		c.disableFastPath()
		c.attachedTo = 0
		why := &notAllowed
		if c.ipsecPolicy != nil {
			why = &encrypts
		}
		c.fast.blocker.Store(why)
		return
	}
	link, err := c.openFastPath()
	c.openFastCapture()
	blocker := c.fastPathBlocker()
	switch {
	case blocker != "":
	case err != nil:
		blocker = err.Error()
	default:
		blocker = c.enableFastPath(link)
	}
	if blocker != "" {
		c.disableFastPath()
	}
	old := c.fast.blocker.Swap(&blocker)
	if blocker == "" && (old == nil || *old != "") {
		c.engine.noteTraffic() // poll it; before Swap the poller could look, see none, and sleep
	}
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
	case c.noPath != nil:
		return "there is no way to the remote"
	case c.route.Load().txDrop == drop.NoLocalAddress && !c.route.Load().receiveOnly:
		return "local-address is not on this host"
	case c.iface.Load().Moved:
		return "the interface is in another network namespace"
	case c.fast.captureErr != nil:
		return captureRuns + ": " + c.fast.captureErr.Error()
	case !c.iface.Load().Up: // userspace counts the packets that the TUN then refuses
		return "the interface is down"
	}
	tap, programs := "", ""
	if found := c.fast.tap.Load(); found != nil {
		tap = *found
	}
	if err := c.fast.programsErr; err != nil {
		programs = err.Error()
	}
	if c.many != nil {
		return cmp.Or(programs, c.manyBlocker(), c.answer.Egress, tap)
	}
	return cmp.Or(c.bypassBlocker(), c.answer.Ingress, c.answer.Egress, tap, programs)
}

// enableFastPath updates the link, or returns why packets go on through userspace.
func (c *control) enableFastPath(link *fastpath.Link) (blocker string) {
	want := c.fastTunnel()
	if c.fast.active() && want == c.programmed && link.Enabled() {
		return ""
	}
	if !c.fast.active() || want.Ifindex != c.programmed.Ifindex {
		if tap := c.engine.egressTaps().on(want.Ifindex); tap != "" {
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
	return ""
}

// openFastPath attaches both programs, whether the tunnel may use the fast path yet or not, so that nothing
// has to be opened when it may. The link is nil where that is not possible.
//
// A program that an operator has removed with tc is attached again if the clsact is still there, or when the interface
// has been down: they may want another queueing discipline instead, and adding one to an interface that is up loses packets.
func (c *control) openFastPath() (link *fastpath.Link, err error) {
	if c.fast.programs == nil || !c.interfacePresent() || c.pair == 0 {
		return nil, nil
	}
	lost := c.attachedTo == c.ifindex && !c.answer.Attached
	if lost && !c.answer.Clsact {
		return nil, fmt.Errorf("the clsact of the interface was removed, and the eBPF program with it: tc qdisc add dev %s clsact, or set it down and up", c.ifname.get())
	}
	if time.Now().Before(c.attachAt) {
		c.retry = true
		return nil, c.attachErr
	}
	if link, err = c.openLink(); err == nil {
		if c.adopted && !c.fast.programs.Switched() { // the interface runs the program of the process before
			return link, nil
		}
		err = c.attachEncap()
	}
	if err != nil {
		c.attachErr, c.attachAt, c.retry = err, time.Now().Add(retryInterval), true
		return nil, err
	}
	c.attachedTo = c.ifindex
	if lost && c.countRestored("program", 1) == 1 {
		c.log.Info("the eBPF program was removed from the interface, and is added again each time", "remedy", "to be without it set allow-fast-path to no")
	}
	return link, nil
}

// openLink has ipip_decap attached to the underlay device, once.
func (c *control) openLink() (*fastpath.Link, error) {
	if link := c.fast.link.Load(); link != nil {
		return link, nil
	}
	t := c.fastTunnel()
	t.TxEnabled, t.RxEnabled = false, false
	if c.many == nil && !c.underlay.Ethernet {
		t.UnderlayIfindex = 0
	}
	link, err := c.fast.programs.Attach(t)
	if err != nil {
		return nil, err
	}
	link.Disable()
	c.fast.link.Store(link)
	c.inheritFastPath(link)
	return link, nil
}

// inheritFastPath takes over the counters of the process before, and with them when the peer was last heard: it
// need not be heard again before the fast path receives.
func (c *control) inheritFastPath(link *fastpath.Link) {
	adopted, orphaned := link.Adopted()
	if c.noteFastCounters(adopted); !adopted {
		return
	}
	if orphaned > 0 {
		c.log.Warn("there was no process for so long that the kernel has carried no more packets", "fast-path-packets", orphaned)
	}
	if s, err := link.Stats(); err == nil && !s.LastReceived.IsZero() {
		c.monitor.NoteReceived(s.LastReceived)
		c.state.Store(uint32(c.monitor.State()))
	}
}

// encapProgram returns ipip_encap; the zero Program if the fast path is not allowed.
func (c *control) encapProgram() (p netstate.Program) {
	if c.fast.programs != nil && c.cfg.FastPathAllowed() {
		p.FD, p.ID, p.Name = c.fast.programs.Encap()
	}
	return p
}

// attachEncap has the interface run ipip_encap. Configure has done that already, but for an interface that
// was in another network namespace, or a tunnel that was not allowed the fast path.
func (c *control) attachEncap() error {
	if c.answer.Attached {
		return nil
	}
	err := c.follower.Attach(c.encapProgram())
	if c.answer = c.follower.Answer(); err == nil && !c.answer.Attached {
		err = fmt.Errorf("the interface does not run the eBPF program: see tc filter show dev %s egress", c.ifname.get())
	}
	return err
}

// endFastPath closes the link of a tunnel that ends. The program on the interface goes with the interface.
func (c *control) endFastPath() {
	if link := c.fast.link.Load(); link != nil {
		link.Close()
	}
}

// fastTunnel returns what the eBPF programs are to know of this tunnel.
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
		ClampTCPMSS: c.cfg.ClampTCPMSS, Capture: c.fast.captured,
	}
	if c.echo != nil {
		f.EchoSource, f.EchoDestination = c.cfg.KeepaliveTarget.As4(), c.cfg.Addresses[0].Prefix.Addr().As4()
	}
	if c.many != nil {
		return c.fastManyTunnel(f)
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

// fastStats returns the counters of the fast path since the tunnel began.
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
