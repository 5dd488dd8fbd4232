package tunnel

import (
	"fmt"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// ICMP errors from the outer path set the soft state of RFC 2003, section 5. They are easily
// forged: so they must match the tunnel's state, their effect is small and expires, and their
// log lines are limited.

// quotesOwn reports whether an ICMP error quotes a packet that this tunnel can have sent: ESP
// with the current SPI for an encrypted tunnel, protocol 4 for any other.
func (t *Tunnel) quotesOwn(e *encap.OuterError) bool {
	if t.ipsecPolicy != nil {
		return t.ipsecPolicy.quotesSA(e)
	}
	return e.Protocol == ipv4.ProtocolIPIP
}

// outerError handles an ICMP error about an outer packet with this tunnel's addresses. It does not
// relay the error, since the quote may be forged: forward sends an ICMP error for the inner
// sender's next packet (RFC 2003, section 5).
func (t *Tunnel) outerError(e *encap.OuterError, now time.Time) {
	d := drop.OuterErrorIgnored
	switch {
	case !t.quotesOwn(e):
		d = drop.OuterErrorNotBelieved
	case e.TooBig():
		d = t.tooBig(e, now)
	case e.Unreachable():
		d = t.unreachableError(e, now)
	}
	if d != drop.None {
		t.drop(d, 1)
	}
}

// tooBig handles fragmentation needed (3/4). A tunnel that never sets DF cannot get one from a
// router, whatever DF the message quotes.
func (t *Tunnel) tooBig(e *encap.OuterError, now time.Time) drop.Reason {
	if !t.cfg.DontFragment {
		return drop.OuterErrorNotBelieved
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	changed, d := t.pathMTU.TooBig(now, e, t.underlay.MTU)
	if changed {
		t.pathMTUFrom = e.Reporter
		t.pathMTUNotice.reset()
		t.wakeSupervisor()
	}
	return d
}

// unreachableError handles destination unreachable, which is false for a peer that is alive. Not
// all false ones are forged: a userspace peer's kernel answers protocol unreachable if the
// receive buffer is full.
func (t *Tunnel) unreachableError(e *encap.OuterError, now time.Time) drop.Reason {
	if t.peerAlive(now) {
		return drop.OuterErrorNotBelieved
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reach.MarkUnreachable(now)
	t.unreachableAt = now
	if !t.unreachable.Swap(true) {
		t.wakeSupervisor() // to disable the fast path
	}
	if t.unreachableNotice.due(now) {
		t.log.Warn("outer packets do not arrive", "icmp-type", e.Type, "icmp-code", e.Code, "from", address(e.Reporter))
	}
	if e.ProtocolUnreachable() {
		t.protoUnreachable = true
		if t.protoUnreachableNotice.due(now) {
			t.log.Warn(fmt.Sprintf("nothing at the remote takes protocol %d: set up its end of the tunnel", e.Protocol), "from", address(e.Reporter))
		}
	}
	return drop.None
}

// peerAlive reports whether a packet of the peer was received, by userspace or the fast path, within
// the keepalive interval plus recentlyReceived: an idle peer sends one packet an interval.
// Otherwise repeated forged errors would break the first connection after a pause.
func (t *Tunnel) peerAlive(now time.Time) bool {
	silence := t.cfg.Keepalive.Interval + recentlyReceived
	since := func() time.Duration {
		last := t.lastReceivedNs.Load()
		if last == 0 {
			return silence
		}
		return now.Sub(t.epoch.Add(time.Duration(last)))
	}
	if since() < silence {
		return true
	}
	t.mergeLastReceived(t.fastStats().LastReceived)
	return since() < silence
}

// updateReachability clears the unreachable state once a packet of the peer was received, or the last
// error has expired.
func (t *Tunnel) updateReachability(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.reach.Reachable(now) && t.lastReceived().After(t.unreachableAt) {
		t.reach.MarkReachable()
		t.protoUnreachable = false
	}
	if t.reach.Reachable(now) {
		t.unreachable.Store(false)
		t.unreachableNotice.reset()
		t.protoUnreachableNotice.reset()
	}
}

// updatePathMTU logs a learnt path MTU, and drops an expired one (RFC 1191, section 6.3). The caller
// holds mu.
func (t *Tunnel) updatePathMTU(now time.Time) {
	if t.pathMTU.Tick(now) {
		t.log.Info("the path MTU is forgotten: larger packets are tried again")
	}
	if t.pathMTU.Get() != 0 && t.pathMTUNotice.due(now) {
		t.log.Info("path MTU learnt", "path-mtu", t.pathMTU.Effective(t.underlay.MTU), "from", address(t.pathMTUFrom))
	}
}
