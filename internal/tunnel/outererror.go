package tunnel

import (
	"fmt"
	"time"

	"ipipd/encap"
	"ipipd/internal/ipv4"
)

// What ICMP errors from the outer path teach: the soft state of RFC 2003, section 5.
// Anybody can forge them. So they are believed only where they fit what is known, each
// can do little and not for long, and none causes a log line by itself.

// sent reports whether an ICMP error is about a packet that this tunnel can have
// sent. One that is encrypted sends no plain ones.
func (t *Tunnel) sent(e *encap.OuterError) bool {
	if t.ipsecPolicy != nil {
		return t.ipsecPolicy.sent(e)
	}
	return e.Protocol == ipv4.ProtocolIPIP
}

// outerError takes an ICMP error about an outer packet with this tunnel's addresses.
// The inner sender is not told of it here, but by carry with its next packet (RFC 2003,
// section 5): what a message quotes may be invented.
func (t *Tunnel) outerError(e *encap.OuterError, now time.Time) {
	d := encap.DropOuterErrorIgnored
	switch {
	case !t.sent(e):
		d = encap.DropOuterErrorNotBelieved
	case e.TooBig():
		d = t.tooBig(e, now)
	case e.Unreachable():
		d = t.unreachableError(e, now)
	}
	if d != encap.DropNone {
		t.drop(d)
	}
}

// tooBig takes a datagram too big (3/4), which a tunnel that sets no DF gets from no
// router, whatever DF is in what the message quotes.
func (t *Tunnel) tooBig(e *encap.OuterError, now time.Time) encap.Drop {
	if !t.cfg.DontFragment {
		return encap.DropOuterErrorNotBelieved
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	changed, d := t.pathMTU.TooBig(now, e, t.underlay.MTU)
	if changed {
		t.pathMTUFrom = e.Reporter
		t.pathMTUNotice.over()
		t.wakeSupervisor()
	}
	return d
}

// unreachableError takes an error that says that the remote cannot be reached, which
// is false of one that was just heard. There are honest ones: a userspace tunnel whose
// receive buffer is full has its kernel answer protocol unreachable.
func (t *Tunnel) unreachableError(e *encap.OuterError, now time.Time) encap.Drop {
	if t.heardFreshly(now) {
		return encap.DropOuterErrorNotBelieved
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reach.MarkUnreachable(now)
	t.unreachableAt = now
	if !t.unreachable.Swap(true) {
		t.wakeSupervisor() // the fast path must not go on
	}
	if t.arrivalNotice.due(now) {
		t.log.Warn("outer packets do not arrive", "icmp-type", e.Type, "icmp-code", e.Code, "from", address(e.Reporter))
	}
	if e.ProtocolUnreachable() {
		t.protoUnreachable = true
		if t.listenerNotice.due(now) {
			t.log.Warn(fmt.Sprintf("nothing at the remote takes protocol %d: set up its end of the tunnel", e.Protocol), "from", address(e.Reporter))
		}
	}
	return encap.DropNone
}

// heardFreshly reports whether the peer was heard a moment ago, by either path: within
// freshly, or, as an idle one is heard once in an interval of the keepalive, within that
// beside. Else whoever forges an error again and again breaks each first connection after
// a pause. The kernel is asked only where that is news.
func (t *Tunnel) heardFreshly(now time.Time) bool {
	silence := t.cfg.Keepalive.Interval + recentlyHeard
	since := func() time.Duration {
		noteReceived := t.lastHeard.Load()
		if noteReceived == 0 {
			return silence
		}
		return now.Sub(t.epoch.Add(time.Duration(noteReceived)))
	}
	if since() < silence {
		return true
	}
	t.mergeLastReceived(t.fastStats().LastReceived)
	return since() < silence
}

// followReachability forgets that the remote is unreachable once it is heard, or
// the last message that said so is old.
func (t *Tunnel) followReachability(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.reach.Reachable(now) && t.lastReceived().After(t.unreachableAt) {
		t.reach.MarkReachable()
		t.protoUnreachable = false
	}
	if t.reach.Reachable(now) {
		t.unreachable.Store(false)
		t.arrivalNotice.over()
		t.listenerNotice.over()
	}
}

// followPathMTU says what was learnt, and forgets it when it is old. The caller holds
// mu.
func (t *Tunnel) followPathMTU(now time.Time) {
	if t.pathMTU.Tick(now) {
		t.log.Info("the path MTU is forgotten: larger packets are tried again")
	}
	if t.pathMTU.Get() != 0 && t.pathMTUNotice.due(now) {
		t.log.Info("path MTU learnt", "path-mtu", t.pathMTU.Effective(t.underlay.MTU), "from", address(t.pathMTUFrom))
	}
}
