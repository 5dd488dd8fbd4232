package ike

import "time"

const (
	// maxUnverified limits the SAs that wait for message 3. In a lasting flood each waits for a second
	// (cheapRepliesPerSecond), which is longer than any round trip.
	maxUnverified = 1024
	// maxSAPayload bounds the SA payload of message 1, which is kept for HASH_I and HASH_R.
	// Routers send a fraction of that.
	maxSAPayload = 2048
)

// unverifiedV1 holds SAs in state sent2 as responder, before the initiator has returned our
// cookie. The source address may be spoofed, so they have no timer and only cost a little memory:
// a new one replaces the oldest, of whichever Peer. Limits.mu guards it.
type unverifiedV1 struct {
	queue []waitingV1 // oldest first, including SAs already removed from bySPI
	bySPI map[unverifiedKey]*v1SA
}

// waitingV1 is an SA in the queue, with copies of the fields that Peers other than its own need.
type waitingV1 struct {
	unverifiedKey
	s        *v1SA
	expireAt time.Time
}

type unverifiedKey struct {
	p   *Peer
	spi ikeSPI
}

// addUnverified adds an SA.
func (p *Peer) addUnverified(s *v1SA) {
	l := p.cfg.Limits
	l.mu.Lock()
	defer l.mu.Unlock()
	o := &l.unverifiedV1
	for len(o.queue) > 0 && (len(o.queue) >= maxUnverified || !p.now.Before(o.queue[0].expireAt)) {
		o.remove(o.queue[0].unverifiedKey, o.queue[0].s)
		o.queue[0] = waitingV1{}
		o.queue = o.queue[1:]
	}
	if o.bySPI == nil {
		o.bySPI = make(map[unverifiedKey]*v1SA)
	}
	key := unverifiedKey{p, s.ckyI}
	o.queue = append(o.queue, waitingV1{key, s, s.expireAt})
	o.bySPI[key] = s
}

// findUnverified returns the SA that a message belongs to, a retransmitted message 1 or a message 3, or
// nil.
func (p *Peer) findUnverified(h header) *v1SA {
	l := p.cfg.Limits
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.unverifiedV1.bySPI[unverifiedKey{p, h.initiator}]
	if s == nil || !p.now.Before(s.expireAt) || h.responder != s.ckyR && h.responder != (ikeSPI{}) {
		return nil
	}
	return s
}

// removeUnverified removes an SA whose message 3 has come.
func (p *Peer) removeUnverified(s *v1SA) {
	l := p.cfg.Limits
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unverifiedV1.remove(unverifiedKey{p, s.ckyI}, s)
}

// forgetUnverified removes all SAs of a Peer that is closed.
func (p *Peer) forgetUnverified() {
	l := p.cfg.Limits
	l.mu.Lock()
	defer l.mu.Unlock()
	o, kept := &l.unverifiedV1, l.unverifiedV1.queue[:0]
	for _, w := range o.queue {
		if w.p != p {
			kept = append(kept, w)
		} else {
			o.remove(w.unverifiedKey, w.s)
		}
	}
	clear(o.queue[len(kept):])
	o.queue = kept
}

func (o *unverifiedV1) remove(key unverifiedKey, s *v1SA) {
	if o.bySPI[key] == s {
		delete(o.bySPI, key)
	}
}
