package ike

import (
	"encoding/binary"
	"time"
)

// add makes an SA known: the peer may send by it from now on.
func (p *Peer) add(c *Child) {
	p.children = append(p.children, c)
	p.actions = append(p.actions, AddInbound{c})
	// Whoever makes more SAs than anyone needs loses the oldest.
	for len(p.children) > maxChildren {
		oldest := p.children[0]
		if oldest == p.current {
			oldest = p.children[1]
		}
		p.remove(oldest)
	}
}

// activate says that the peer has the SA too: packets are sealed by it from now on,
// unless there is a newer one.
func (p *Peer) activate(c *Child) {
	if c.active || !c.removeAt.IsZero() || !p.has(c) {
		return
	}
	c.active, c.activateAt = true, time.Time{}
	for _, x := range p.children {
		if x.active {
			c = x // the last is the newest
		}
	}
	p.setOutbound(c)
	p.problem, p.backoff = Problem{}, 0
}

// activateLater is usable for who sends the last message of a negotiation: the other
// end may not have it, and some make the SA only then. What is used is used for a
// little longer, but not into its last moments, or until the peer sends by the new one.
func (p *Peer) activateLater(c *Child) {
	c.activateAt = p.now.Add(min(activateDelay, p.current.ExpireAt.Sub(p.now)/2))
}

// notePeerSends says that the peer seals by an SA. So it has it, even if the message
// that says so was lost, and is done with the SA that this one replaced.
func (p *Peer) notePeerSends(c *Child) {
	if c.peerSends || !c.removeAt.IsZero() {
		return
	}
	c.peerSends = true
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
		p.current = c
		p.actions = append(p.actions, UseOutbound{c})
	}
}

// scheduleDelete retires an SA for which there is a new one: we delete it after a time.
func (p *Peer) scheduleDelete(old *Child, after time.Duration) {
	if old.removeAt.IsZero() && old.deleteAt.IsZero() {
		old.deleteAt = p.now.Add(after)
	}
}

// deactivate stops sending by an SA.
func (p *Peer) deactivate(c *Child) {
	c.active, c.activateAt = false, time.Time{}
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

// remove ends an SA.
func (p *Peer) remove(c *Child) {
	for i, x := range p.children {
		if x == c {
			p.children = append(p.children[:i:i], p.children[i+1:]...)
			break
		}
	}
	c.replaces = nil // which may have replaced another, and so on
	p.deactivate(c)
	p.actions = append(p.actions, Remove{c})
	p.rerun = true
}

// retire stops sending by SAs, and opens what the peer has sent by them until then.
func (p *Peer) retire(until time.Time, cs ...*Child) {
	for _, c := range cs { // all, before one of them is taken for the next to send by
		c.deleteAt, c.removeAt = time.Time{}, earlier(c.removeAt, earlier(until, c.receiveUntil))
	}
	for _, c := range cs {
		p.deactivate(c)
	}
	p.rerun = true
}

// childrenBefore are the SAs that there were then.
func (p *Peer) childrenBefore(then time.Time) (cs []*Child) {
	for _, c := range p.children {
		if c.Established.Before(then) {
			cs = append(cs, c)
		}
	}
	return cs
}

// deletedByPeer retires SAs that the peer sends by no more: what it has sent is on
// the way for a while yet.
func (p *Peer) deletedByPeer(cs ...*Child) { p.retire(p.now.Add(overlapTime), cs...) }

// retireUnanswered retires SAs because the peer does not answer. If it is there after all,
// it sends by them until it is told of others.
func (p *Peer) retireUnanswered(cs ...*Child) { p.retire(p.now.Add(lingerTime), cs...) }

// noChildren reports whether there is no SA that has not been retired.
func (p *Peer) noChildren() bool {
	for _, c := range p.children {
		if c.removeAt.IsZero() {
			return false
		}
	}
	return true
}

// setPorts has an SA sent by to where the peer is now, or sent by so later.
func (p *Peer) setPorts(c *Child, at udpPath) {
	c.Outbound.SourcePort, c.Outbound.DestinationPort = at.local, at.remote.Port()
	p.actions = append(p.actions, SetPorts{c, at.local, at.remote.Port()})
}

// byOutboundSPI finds the SA that the peer knows by that SPI.
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

// setLifetimes sets when the SA is rekeyed and when it ends: the two ends at
// slightly different times. asked is when the initiator asked for it.
//
// Neither end may seal by it when the other does not open any more, and where
// messages are lost the two come to have it up to half a minute apart: the
// responder when the question arrives, the initiator when the answer does. So the
// initiator seals until a lifetime after it asked, which is before the responder's
// time is over; and each opens until a lifetime after it has the SA, and longer by
// what packets are on the way, which for the initiator is after the responder's.
func (p *Peer) setLifetimes(c *Child, requestedAt time.Time, life time.Duration) {
	if life <= 0 || life > p.cfg.Lifetime2 {
		life = p.cfg.Lifetime2
	}
	c.Established = p.now
	c.RekeyAt = requestedAt.Add(p.softLifetime(life))
	c.ExpireAt = requestedAt.Add(life)
	c.receiveUntil = p.now.Add(life + overlapTime)
}

// softLifetime is 75 to 80 % of a lifetime, RouterOS's 24 of 30 minutes.
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
				p.retire(c.receiveUntil, c) // or until the peer has heard of it
			} else {
				p.deletedByPeer(c)
			}
		}
	}
}

// sendDelete has the peer know that we delete an SA.
func (p *Peer) sendDelete(c *Child) {
	if c.v2 != nil {
		c.v2.deleteChild(c)
		return
	}
	if s := p.newestV1(); s != nil {
		s.sendDelete(protoESP, be32(c.Inbound.SPI))
	}
}

// dpd is dead peer detection. probe asks the peer whether it is there. It reports
// whether the peer is dead.
type dpd struct {
	probes int
	at     time.Time
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
		d.probes, d.at = 0, time.Time{}
		p.due(due)
		return false
	}
	if d.probes > 0 && !p.due(d.at) {
		return false
	}
	if d.probes >= max(1, p.cfg.DPDRetries) {
		return true
	}
	probe()
	d.probes++
	d.at = p.now.Add(p.cfg.DPDInterval)
	p.rerun = true
	return false
}

// maintain begins what is missing: an SA of IKE, an SA of ESP, a rekey of either.
func (p *Peer) maintain() {
	var rekey *Child
	need := p.refresh
	if c := p.current; c == nil {
		coming := p.unconfirmedChild()
		need = coming == nil || p.past(coming.Established.Add(holdTime))
	} else if p.past(c.RekeyAt) && !c.rekeying && !p.hasSuccessor(c) {
		need, rekey = true, c
	} else if p.refresh {
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
	if !need || p.quickInProgress() || p.cfg.Passive && p.current == nil {
		return
	}
	if p.current == nil && !s.initiator && !p.past(s.established.Add(holdTime)) {
		return // the peer's quick mode is on its way
	}
	if !p.past(p.nextChild) {
		return
	}
	p.nextChild = p.now.Add(backoffFirst)
	s.startQuick(rekey)
	p.rerun = true
}

// fallbackRekeyAt is when an end that the peer's rekey has not reached begins its own.
func (c *Child) fallbackRekeyAt() time.Time { return c.RekeyAt.Add(c.ExpireAt.Sub(c.RekeyAt) / 2) }

// hasSuccessor reports whether there is an SA to come after c already that only
// waits to be used. One that does not get there is not waited for.
func (p *Peer) hasSuccessor(c *Child) bool {
	newest := p.children[len(p.children)-1]
	return newest != c && !newest.active && newest.removeAt.IsZero() && !p.past(c.fallbackRekeyAt())
}

// unconfirmedChild is the newest SA that the peer has asked for by IKEv2 and not shown yet
// to have; nil if there is none.
func (p *Peer) unconfirmedChild() (found *Child) {
	for _, c := range p.children {
		if c.v2 != nil && !c.active && c.removeAt.IsZero() {
			found = c
		}
	}
	return found
}

// retryDelay is how long to wait before another try to replace what ends then: a second
// and up to spread more, but half of the time that is left at most. It is by chance,
// since what was in the way may have been the peer's try.
func (p *Peer) retryDelay(spread time.Duration, end time.Time) time.Duration {
	fraction := time.Duration(p.random32() % 1024)
	d := backoffFirst + spread/1024*fraction
	if half := max(end.Sub(p.now), backoffFirst/10) / 2; d > half {
		d = half / 1024 * fraction
	}
	return d
}

// startPhase1 begins phase 1 if nothing of the kind is under way.
func (p *Peer) startPhase1(main bool) {
	if p.cfg.Passive || p.initiatingV1() || p.initiatingV2() {
		return
	}
	// A peer that has begun is let finish; else the two would get in each other's way.
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
