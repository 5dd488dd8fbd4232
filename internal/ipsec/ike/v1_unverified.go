package ike

const (
	// maxUnverified is how many SAs wait for message 3: those of one second at
	// cheapRepliesPerSecond, which is longer than any round trip.
	maxUnverified = 1024
	// maxSAPayload bounds the SA payload of message 1, which is kept for HASH_I and HASH_R.
	// Routers send a fraction of that.
	maxSAPayload = 2048
)

// unverifiedV1 holds SAs in state sent2 as responder, before the initiator has returned our
// cookie. The source address may be spoofed, so they have no timer and only cost a little memory:
// a new one replaces the oldest.
type unverifiedV1 struct {
	queue []*v1SA // oldest first, including SAs already removed from bySPI
	bySPI map[ikeSPI]*v1SA
}

func (o *unverifiedV1) add(p *Peer, s *v1SA) {
	for len(o.queue) > 0 && (len(o.queue) >= maxUnverified || !p.now.Before(o.queue[0].expireAt)) {
		o.remove(o.queue[0])
		o.queue[0] = nil
		o.queue = o.queue[1:]
	}
	if o.bySPI == nil {
		o.bySPI = make(map[ikeSPI]*v1SA)
	}
	o.queue = append(o.queue, s)
	o.bySPI[s.ckyI] = s
}

// find returns the SA that a message belongs to, a retransmitted message 1 or a message 3, or
// nil.
func (o *unverifiedV1) find(p *Peer, h header) *v1SA {
	s := o.bySPI[h.initiator]
	if s == nil || !p.now.Before(s.expireAt) || h.responder != s.ckyR && h.responder != (ikeSPI{}) {
		return nil
	}
	return s
}

// remove removes an SA that has advanced or expired.
func (o *unverifiedV1) remove(s *v1SA) {
	if o.bySPI[s.ckyI] == s {
		delete(o.bySPI, s.ckyI)
	}
}
