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

// usable says that the peer has the SA too: packets are sealed by it from now on.
func (p *Peer) usable(c *Child) {
	if c.usable || !p.has(c) {
		return
	}
	c.usable, c.useAt = true, time.Time{}
	p.use(c)
	p.problem, p.backoff = Problem{}, 0
}

// usableSoon is usable for who completes a negotiation: the other end learns of it
// last, and some make the SA only then. What is used is used for a little longer,
// or until the peer sends by the new one.
func (p *Peer) usableSoon(c *Child) {
	c.useAt = p.now.Add(switchTime)
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

// replaced retires an SA for which there is a new one: we delete it when packets
// that are on the way have arrived.
func (p *Peer) replaced(old *Child) {
	if old != nil && p.has(old) && old.deleteAt.IsZero() {
		old.deleteAt = p.now.Add(overlapTime)
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
	p.unusable(c)
	p.actions = append(p.actions, Remove{c})
	p.again = true
}

// deletedByPeer stops sending by an SA, and takes for a while yet what the peer
// has sent by it.
func (p *Peer) deletedByPeer(c *Child) {
	p.unusable(c)
	if c.removeAt.IsZero() {
		c.removeAt = p.now.Add(overlapTime)
	}
	c.deleteAt = time.Time{}
	p.again = true
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
// slightly different times.
func (p *Peer) schedule(c *Child, life time.Duration) {
	if life <= 0 || life > p.cfg.Lifetime2 {
		life = p.cfg.Lifetime2
	}
	c.Established = p.now
	c.RekeyAt = p.now.Add(p.soft(life))
	c.ExpireAt = p.now.Add(life)
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
		if p.due(c.ExpireAt) {
			p.tellDeleted(c)
			p.remove(c)
			continue
		}
		if p.due(c.deleteAt) {
			c.deleteAt = time.Time{}
			p.tellDeleted(c)
			p.unusable(c)
			c.removeAt = p.now.Add(overlapTime)
		}
		if p.due(c.removeAt) {
			p.remove(c)
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

// reset forgets everything about a peer that is not there, or not the one it was.
func (p *Peer) reset() {
	p.use(nil)
	for len(p.children) > 0 {
		p.remove(p.children[0])
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
	} else if p.past(c.RekeyAt) && !c.rekeying {
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
	p.tryMain = false
	if main {
		p.startV1()
	} else {
		p.startV2()
	}
	p.again = true
}
