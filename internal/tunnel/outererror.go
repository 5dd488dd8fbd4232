package tunnel

import (
	"fmt"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
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

// outerError hands an ICMP error about an outer packet with this tunnel's addresses to control if a packet of
// this tunnel can have caused it, or returns why not. It does not relay the error, since the quote may be
// forged: forward sends an ICMP error for the inner sender's next packet (RFC 2003, section 5).
//
// A tunnel that never sets DF cannot get fragmentation needed (3/4) from a router, whatever DF the
// message quotes. Destination unreachable is false for a peer that is alive. Not all false ones
// are forged: a userspace peer's kernel answers protocol unreachable if the receive buffer is full.
func (t *Tunnel) outerError(e *encap.OuterError, now time.Time) (d drop.Reason) {
	defer func() {
		if d != drop.None {
			t.count(d, 1)
		}
	}()
	var handle func(*control, *encap.OuterError, time.Time)
	switch own := t.quotesOwn(e); {
	case own && e.Type == ipv4.ICMPTimeExceeded && t.config.Load().TTL == 0: // the inner TTL ran out, as by traceroute
	case !own, e.TooBig() && !t.config.Load().DontFragment, e.Unreachable() && t.peerAlive(now):
		return drop.OuterErrorNotBelieved
	case e.TooBig():
		handle = (*control).tooBig
	case e.Unreachable():
		handle = (*control).unreachableError
	}
	kept := *e
	if handle == nil || !t.post(func(c *control) { handle(c, &kept, now) }) { // a full queue holds errors that say the same
		return drop.OuterErrorIgnored
	}
	return drop.None
}

// tooBig handles fragmentation needed.
func (c *control) tooBig(e *encap.OuterError, now time.Time) {
	changed, d := c.pathMTU.TooBig(now, e, c.underlay.MTU)
	if changed {
		c.pathMTUFrom = e.Reporter
	}
	if d != drop.None {
		c.drop(d)
	}
}

// unreachableError handles destination unreachable.
func (c *control) unreachableError(e *encap.OuterError, now time.Time) {
	c.reach.MarkUnreachable(now)
	c.unreachableAt = now
	c.unreachable.Store(true)
	code := warning.RemoteUnreachable
	if e.ProtocolUnreachable() {
		c.protoUnreachable = true
		code = warning.PeerNotSetUp
	}
	c.raise(code, fmt.Sprintf("ICMP %d/%d from %v", e.Type, e.Code, address(e.Reporter)), "")
}

// peerAlive reports whether a packet of the peer was received, by userspace or the fast path, within
// the keepalive interval plus recentlyReceived: an idle peer sends one packet an interval.
// Otherwise repeated forged errors would break the first connection after a pause.
func (t *Tunnel) peerAlive(now time.Time) bool {
	silence := t.config.Load().keepalive().Interval + recentlyReceived
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
func (c *control) updateReachability(now time.Time) {
	if !c.reach.Reachable(now) && c.lastReceived().After(c.unreachableAt) {
		c.reach.MarkReachable()
		c.protoUnreachable = false
	}
	if c.reach.Reachable(now) {
		c.reach.MarkReachable()
		c.unreachable.Store(false)
		c.clear(warning.RemoteUnreachable)
		c.clear(warning.PeerNotSetUp)
	}
}
