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

// usable says that the peer has the SA too: packets are sealed by it from now on,
// unless there is a newer one.
func (p *Peer) usable(c *Child) {
	if c.usable || !c.removeAt.IsZero() || !p.has(c) {
		return
	}
	c.usable, c.useAt = true, time.Time{}
	for _, x := range p.children {
		if x.usable {
			c = x // the last is the newest
		}
	}
	p.use(c)
	p.problem, p.backoff = Problem{}, 0
}

// usableSoon is usable for who sends the last message of a negotiation: the other
// end may not have it, and some make the SA only then. What is used is used for a
// little longer, but not into its last moments, or until the peer sends by the new one.
func (p *Peer) usableSoon(c *Child) {
	c.useAt = p.now.Add(min(switchTime, p.current.ExpireAt.Sub(p.now)/2))
}

// peerUses says that the peer seals by an SA. So it has it, even if the message
// that says so was lost, and is done with the SA that this one replaced.
func (p *Peer) peerUses(c *Child) {
	if c.peerUses || !c.removeAt.IsZero() {
		return
	}
	c.peerUses = true
	p.confirmed(c)
	p.usable(c)
	if old := c.replaces; old != nil {
		p.replaced(old, overlapTime)
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

func (p *Peer) use(c *Child) {
	if c != p.current {
		p.current = c
		p.actions = append(p.actions, UseOutbound{c})
	}
}

// replaced retires an SA for which there is a new one: we delete it after a time.
func (p *Peer) replaced(old *Child, after time.Duration) {
	if old.removeAt.IsZero() && old.deleteAt.IsZero() {
		old.deleteAt = p.now.Add(after)
	}
}

// unusable stops sending by an SA.
func (p *Peer) unusable(c *Child) {
	c.usable, c.useAt = false, time.Time{}
	if c != p.current {
		return
	}
	var best *Child
	for _, x := range p.children {
		if (x.usable || !x.useAt.IsZero()) && x.removeAt.IsZero() {
			best = x // the last is the newest
		}
	}
	if best != nil && !best.usable {
		p.usable(best)
		return
	}
	p.use(best)
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
	p.unusable(c)
	p.actions = append(p.actions, Remove{c})
	p.again = true
}

// retire stops sending by SAs, and opens what the peer has sent by them until then.
func (p *Peer) retire(until time.Time, cs ...*Child) {
	for _, c := range cs { // all, before one of them is taken for the next to send by
		c.deleteAt, c.removeAt = time.Time{}, earlier(c.removeAt, earlier(until, c.openUntil))
	}
	for _, c := range cs {
		p.unusable(c)
	}
	p.again = true
}

// establishedBefore are the SAs that there were then.
func (p *Peer) establishedBefore(then time.Time) (cs []*Child) {
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

// abandoned retires SAs because the peer does not answer. If it is there after all,
// it sends by them until it is told of others.
func (p *Peer) abandoned(cs ...*Child) { p.retire(p.now.Add(lingerTime), cs...) }

// alone reports whether there is no SA that has not been retired.
func (p *Peer) alone() bool {
	for _, c := range p.children {
		if c.removeAt.IsZero() {
			return false
		}
	}
	return true
}

// setPorts has an SA sent by to where the peer is now, or sent by so later.
func (p *Peer) setPorts(c *Child, at path) {
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

// schedule sets when the SA is rekeyed and when it ends: the two ends at
// slightly different times. asked is when the initiator asked for it.
//
// Neither end may seal by it when the other does not open any more, and where
// messages are lost the two come to have it up to half a minute apart: the
// responder when the question arrives, the initiator when the answer does. So the
// initiator seals until a lifetime after it asked, which is before the responder's
// time is over; and each opens until a lifetime after it has the SA, and longer by
// what packets are on the way, which for the initiator is after the responder's.
func (p *Peer) schedule(c *Child, asked time.Time, life time.Duration) {
	if life <= 0 || life > p.cfg.Lifetime2 {
		life = p.cfg.Lifetime2
	}
	c.Established = p.now
	c.RekeyAt = asked.Add(p.soft(life))
	c.ExpireAt = asked.Add(life)
	c.openUntil = p.now.Add(life + overlapTime)
}

// soft is 75 to 80 % of a lifetime, RouterOS's 24 of 30 minutes.
func (p *Peer) soft(life time.Duration) time.Duration {
	return life/5*4 - life/20/256*time.Duration(p.random32()%256)
}

func (p *Peer) stepChildren() {
	for _, c := range append([]*Child(nil), p.children...) {
		if p.due(c.useAt) {
			p.usable(c)
		}
		switch {
		case !c.removeAt.IsZero():
			if p.due(c.removeAt) {
				p.remove(c)
			}
		case p.due(c.ExpireAt):
			p.tellDeleted(c)
			p.retire(c.openUntil, c)
		case p.due(c.deleteAt):
			p.tellDeleted(c)
			if c.v2 != nil {
				p.retire(c.openUntil, c) // or until the peer has heard of it
			} else {
				p.deletedByPeer(c)
			}
		}
	}
}

// tellDeleted has the peer know that we delete an SA.
func (p *Peer) tellDeleted(c *Child) {
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
	heard := p.heard
	if heard.Before(established) {
		heard = established
	}
	if due := heard.Add(p.cfg.DPDInterval); p.now.Before(due) {
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
	p.again = true
	return false
}

// maintain begins what is missing: an SA of IKE, an SA of ESP, a rekey of either.
func (p *Peer) maintain() {
	var rekey *Child
	need := p.refresh
	if c := p.current; c == nil {
		coming := p.unproven()
		need = coming == nil || p.past(coming.Established.Add(holdTime))
	} else if p.past(c.RekeyAt) && !c.rekeying && !p.succeeding(c) {
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
			p.start(p.cfg.Mode == Main || p.cfg.Mode == Auto && p.tryMain)
		}
		return
	}
	if p.past(s.rekeyAt) {
		p.start(true)
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
	p.again = true
}

// lastCall is when an end that the peer's rekey has not reached begins its own.
func (c *Child) lastCall() time.Time { return c.RekeyAt.Add(c.ExpireAt.Sub(c.RekeyAt) / 2) }

// succeeding reports whether there is an SA to come after c already that only
// waits to be used. One that does not get there is not waited for.
func (p *Peer) succeeding(c *Child) bool {
	newest := p.children[len(p.children)-1]
	return newest != c && !newest.usable && newest.removeAt.IsZero() && !p.past(c.lastCall())
}

// unproven is the newest SA that the peer has asked for by IKEv2 and not shown yet
// to have; nil if there is none.
func (p *Peer) unproven() (found *Child) {
	for _, c := range p.children {
		if c.v2 != nil && !c.usable && c.removeAt.IsZero() {
			found = c
		}
	}
	return found
}

// retryIn is how long to wait before another try to replace what ends then: a second
// and up to spread more, but half of the time that is left at most. It is by chance,
// since what was in the way may have been the peer's try.
func (p *Peer) retryIn(spread time.Duration, end time.Time) time.Duration {
	chance := time.Duration(p.random32() % 1024)
	d := backoffFirst + spread/1024*chance
	if half := max(end.Sub(p.now), backoffFirst/10) / 2; d > half {
		d = half / 1024 * chance
	}
	return d
}

// start begins phase 1 if nothing of the kind is under way.
func (p *Peer) start(main bool) {
	if p.cfg.Passive || p.startingV1() || p.startingV2() {
		return
	}
	// A peer that has begun is let finish; else the two would get in each other's way.
	if !p.past(p.holdUntil) || !p.past(p.nextStart) {
		return
	}
	p.tryMain, p.held = false, false
	if main {
		p.startV1()
	} else {
		p.startV2()
	}
	p.again = true
}
