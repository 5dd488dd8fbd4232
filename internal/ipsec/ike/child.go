package ike

import (
	"encoding/binary"
	"time"
)

// add installs an SA for receiving. Beyond maxChildren the oldest SA goes, except for the current
// one.
func (p *Peer) add(c *Child) {
	p.children, p.changed = append(p.children, c), true
	p.actions = append(p.actions, AddInbound{c})
	for len(p.children) > maxChildren {
		oldest := p.children[0]
		if oldest == p.current {
			oldest = p.children[1]
		}
		p.remove(oldest)
	}
}

// activate makes c usable for sending, once the peer is known to have it. The newest active SA
// becomes the current one.
func (p *Peer) activate(c *Child) {
	if c.active || !c.removeAt.IsZero() || !p.has(c) {
		return
	}
	c.active, c.activateAt, p.changed = true, time.Time{}, true
	for _, x := range p.children {
		if x.active {
			c = x // the last is the newest
		}
	}
	p.setOutbound(c)
	p.problem, p.backoff = Problem{}, 0
}

// activateLater activates c after activateDelay, or when the peer sends on it. It is for the end
// that sends the last message of a negotiation: the peer may not have it yet, and some peers
// install the SA only then. The current SA is used meanwhile, but not up to its expiry.
func (p *Peer) activateLater(c *Child) {
	c.activateAt, p.changed = p.now.Add(min(activateDelay, p.current.ExpireAt.Sub(p.now)/2)), true
}

// notePeerSends records that the peer sends on c. That confirms the negotiation, even where its
// last message was lost, and lets the SA that c replaces be deleted.
func (p *Peer) notePeerSends(c *Child) {
	if c.peerSends || !c.removeAt.IsZero() {
		return
	}
	c.peerSends, p.changed = true, true
	p.finishQuickMode(c)
	p.activate(c)
	if old := c.replaces; old != nil {
		p.scheduleDelete(old, overlapTime)
	}
}

func (p *Peer) has(c *Child) bool {
	for _, x := range p.children {
		if x == c {
			return true
		}
	}
	return false
}

func (p *Peer) setOutbound(c *Child) {
	if c != p.current {
		p.current, p.changed = c, true
		p.actions = append(p.actions, UseOutbound{c})
	}
}

// scheduleDelete deletes a replaced SA after a delay.
func (p *Peer) scheduleDelete(old *Child, after time.Duration) {
	if old.removeAt.IsZero() && old.deleteAt.IsZero() {
		old.deleteAt, p.changed = p.now.Add(after), true
	}
}

// deactivate stops sending on an SA, and falls back to the newest other one.
func (p *Peer) deactivate(c *Child) {
	c.active, c.activateAt, p.changed = false, time.Time{}, true
	if c != p.current {
		return
	}
	var best *Child
	for _, x := range p.children {
		if (x.active || !x.activateAt.IsZero()) && x.removeAt.IsZero() {
			best = x // the last is the newest
		}
	}
	if best != nil && !best.active {
		p.activate(best)
		return
	}
	p.setOutbound(best)
}

// remove removes an SA, inbound direction included.
func (p *Peer) remove(c *Child) {
	for i, x := range p.children {
		if x == c {
			p.children = append(p.children[:i:i], p.children[i+1:]...)
			break
		}
	}
	c.replaces = nil // or a chain of replaced SAs is kept in memory
	p.deactivate(c)
	p.actions = append(p.actions, Remove{c})
	p.rerun = true
}

// retire stops sending on SAs. They still receive up to the time until, or their receiveUntil if that is earlier.
func (p *Peer) retire(until time.Time, cs ...*Child) {
	for _, c := range cs { // all first, so that none of them becomes current again
		c.deleteAt, c.removeAt = time.Time{}, earlier(c.removeAt, earlier(until, c.receiveUntil))
	}
	for _, c := range cs {
		p.deactivate(c)
	}
	p.rerun = true
}

// childrenBefore returns the SAs established before then.
func (p *Peer) childrenBefore(then time.Time) (cs []*Child) {
	for _, c := range p.children {
		if c.Established.Before(then) {
			cs = append(cs, c)
		}
	}
	return cs
}

// deletedByPeer retires SAs on which the peer no longer sends. Packets in flight are still
// received.
func (p *Peer) deletedByPeer(cs ...*Child) { p.retire(p.now.Add(overlapTime), cs...) }

// retireUnanswered retires SAs of a peer that does not answer. If it is alive after all, it sends
// on them until it gets new ones.
func (p *Peer) retireUnanswered(cs ...*Child) { p.retire(p.now.Add(lingerTime), cs...) }

// noChildren reports whether all SAs are retired.
func (p *Peer) noChildren() bool {
	for _, c := range p.children {
		if c.removeAt.IsZero() {
			return false
		}
	}
	return true
}

// setPorts changes the UDP ports of an SA after a NAT rebinding.
func (p *Peer) setPorts(c *Child, via udpPath) {
	c.Outbound.SourcePort, c.Outbound.DestinationPort, p.changed = via.local, via.remote.Port(), true
	p.actions = append(p.actions, SetPorts{c, via.local, via.remote.Port()})
}

// byOutboundSPI returns the SA with that outbound SPI, which is how the peer names it, or nil.
func (p *Peer) byOutboundSPI(b []byte) *Child {
	if len(b) != 4 {
		return nil
	}
	for _, c := range p.children {
		if c.Outbound.SPI == binary.BigEndian.Uint32(b) {
			return c
		}
	}
	return nil
}

// byInboundSPI returns the SA with that inbound SPI, or nil.
func (p *Peer) byInboundSPI(spi uint32) *Child {
	for _, c := range p.children {
		if c.Inbound.SPI == spi {
			return c
		}
	}
	return nil
}

// setLifetimes sets when c is rekeyed and expires, which differs between the two ends.
// requestedAt is when the initiator sent its request; life is what the peer proposed, 0 for none.
//
// With lost messages the responder (on the request) and the initiator (on the response) install
// an SA up to half a minute apart, and neither may send when the other no longer receives. So the
// initiator sends until a lifetime after its request, which is before the responder stops
// receiving. Each end receives until a lifetime after it installed the SA, plus overlapTime for
// packets in flight.
func (p *Peer) setLifetimes(c *Child, requestedAt time.Time, life time.Duration) {
	if life <= 0 || life > p.cfg.Lifetime2 {
		life = p.cfg.Lifetime2
	}
	c.Established = p.now
	c.RekeyAt = requestedAt.Add(p.softLifetime(life))
	c.ExpireAt = requestedAt.Add(life)
	c.receiveUntil = p.now.Add(life + overlapTime)
}

// softLifetime is 75 to 80 % of a lifetime, as RouterOS (24 of 30 minutes). The jitter avoids
// simultaneous rekeys.
func (p *Peer) softLifetime(life time.Duration) time.Duration {
	return life/5*4 - life/20/256*time.Duration(p.random32()%256)
}

func (p *Peer) stepChildren() {
	for _, c := range append([]*Child(nil), p.children...) {
		if p.due(c.activateAt) {
			p.activate(c)
		}
		switch {
		case !c.removeAt.IsZero():
			if p.due(c.removeAt) {
				p.remove(c)
			}
		case p.due(c.ExpireAt):
			p.sendDelete(c)
			p.retire(c.receiveUntil, c)
		case p.due(c.deleteAt):
			p.sendDelete(c)
			if c.v2 != nil {
				p.retire(c.receiveUntil, c) // or until the peer answers the DELETE
			} else {
				p.deletedByPeer(c)
			}
		}
	}
}

// sendDelete tells the peer that we delete an SA.
func (p *Peer) sendDelete(c *Child) {
	if c.v2 != nil {
		c.v2.deleteChild(c)
		return
	}
	if s := p.newestV1(); s != nil {
		s.sendDelete(protoESP, be32(c.Inbound.SPI))
	}
}

// dpd is dead peer detection in the manner of RFC 3706. step calls probe when a probe is due, and
// reports whether the peer is dead.
type dpd struct {
	probes    int
	nextProbe time.Time
}

func (d *dpd) step(p *Peer, established time.Time, probe func()) (dead bool) {
	if p.cfg.DPDInterval <= 0 {
		return false
	}
	lastReceived := p.lastReceived
	if lastReceived.Before(established) {
		lastReceived = established
	}
	if due := lastReceived.Add(p.cfg.DPDInterval); p.now.Before(due) {
		d.probes, d.nextProbe = 0, time.Time{}
		p.due(due)
		return false
	}
	if d.probes > 0 && !p.due(d.nextProbe) {
		return false
	}
	if d.probes >= max(1, p.cfg.DPDRetries) {
		return true
	}
	probe()
	d.probes++
	d.nextProbe = p.now.Add(p.cfg.DPDInterval)
	p.rerun = true
	return false
}

// maintain starts what is missing: an IKE SA, a pair of ESP SAs, or a rekey of either.
func (p *Peer) maintain() {
	var rekey *Child
	need := p.renegotiate
	if c := p.current; c == nil {
		coming := p.unconfirmedChild()
		need = coming == nil || p.past(coming.Established.Add(holdTime))
	} else if p.past(c.RekeyAt) && !c.rekeying && !p.hasSuccessor(c) {
		need, rekey = true, c
	} else if p.renegotiate {
		rekey = c
	}
	if s := p.newestV2(); s != nil {
		p.maintainV2(s, need, rekey)
		return
	}
	s := p.newestV1()
	if s == nil {
		if need {
			p.startPhase1(p.cfg.Mode == Main || p.cfg.Mode == Auto && p.tryMain)
		}
		return
	}
	if p.past(s.rekeyAt) {
		p.startPhase1(true)
	}
	if !need || p.quickInProgress() || p.current == nil && !p.mayInitiate() {
		return
	}
	if p.current == nil && !s.initiator && !p.past(s.established.Add(holdTime)) {
		return // the peer's quick mode is about to come
	}
	if !p.past(p.nextChild) {
		return
	}
	p.nextChild = p.now.Add(backoffFirst)
	s.startQuick(rekey)
	p.rerun = true
}

// fallbackRekeyAt is when we rekey although the peer should have completed its rekey.
func (c *Child) fallbackRekeyAt() time.Time { return c.RekeyAt.Add(c.ExpireAt.Sub(c.RekeyAt) / 2) }

// hasSuccessor reports whether an SA that replaces c is installed but not active yet. It does not
// count after fallbackRekeyAt.
func (p *Peer) hasSuccessor(c *Child) bool {
	newest := p.children[len(p.children)-1]
	return newest != c && !newest.active && newest.removeAt.IsZero() && !p.past(c.fallbackRekeyAt())
}

// unconfirmedChild returns the newest SA that the peer requested by IKEv2 and has not confirmed,
// or nil.
func (p *Peer) unconfirmedChild() (found *Child) {
	for _, c := range p.children {
		if c.v2 != nil && !c.active && c.removeAt.IsZero() {
			found = c
		}
	}
	return found
}

// retryDelay is how long to wait before the next rekey attempt: backoffFirst and a random part of
// up to spread, but at most half of the time left until end. It is random because simultaneous
// attempts of both ends may have collided.
func (p *Peer) retryDelay(spread time.Duration, end time.Time) time.Duration {
	fraction := time.Duration(p.random32() % 1024)
	d := backoffFirst + spread/1024*fraction
	if half := max(end.Sub(p.now), backoffFirst/10) / 2; d > half {
		d = half / 1024 * fraction
	}
	return d
}

// startPhase1 starts main mode or IKE_SA_INIT, unless one that we started is under way.
func (p *Peer) startPhase1(main bool) {
	if !p.mayInitiate() || p.initiatingV1() || p.initiatingV2() {
		return
	}
	// Let a negotiation of the peer's finish: simultaneous ones would collide.
	if !p.past(p.holdUntil) || !p.past(p.nextStart) {
		return
	}
	p.tryMain, p.holdUsed = false, false
	if main {
		p.startV1()
	} else {
		p.startV2()
	}
	p.rerun = true
}
