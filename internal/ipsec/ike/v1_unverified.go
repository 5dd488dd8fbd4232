package ike

const (
	// maxUnverified is how many answers to message 1 wait for message 3: a second of
	// them at cheapRepliesPerSecond, which is longer than any round trip.
	maxUnverified = 1024
	// maxSAPayload bounds the SA payload of message 1, which both hashes cover and
	// which has to be kept: several times what routers send.
	maxSAPayload = 2048
)

// unverifiedV1 are attempts at main mode of others in state sent2. The sender's address
// may be false, so that they are to cost a little memory and nothing else: the oldest
// goes for a new one, and no timer runs for any.
type unverifiedV1 struct {
	queue []*v1SA // as they came; those that have gone on are in it too
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

// find is the one that a message is for: message 1 again, or message 3.
func (o *unverifiedV1) find(p *Peer, h header) *v1SA {
	s := o.bySPI[h.initiator]
	if s == nil || !p.now.Before(s.expireAt) || h.responder != s.ckyR && h.responder != (ikeSPI{}) {
		return nil
	}
	return s
}

// remove takes one out that has gone on, or has become too old.
func (o *unverifiedV1) remove(s *v1SA) {
	if o.bySPI[s.ckyI] == s {
		delete(o.bySPI, s.ckyI)
	}
}
