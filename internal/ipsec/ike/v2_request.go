package ike

import "time"

// requestKind is what a request of ours is for.
type requestKind uint8

const (
	requestAuth      requestKind = iota + 1 // IKE_AUTH
	requestPing                             // an empty INFORMATIONAL request
	requestDelete                           // DELETE of a Child SA
	requestDeleteIKE                        // DELETE of the IKE SA
	requestNewChild                         // CREATE_CHILD_SA, for a Child SA
	requestRekey                            // CREATE_CHILD_SA, for an IKE SA
)

// requestV2 is a request of ours. The window size is 1, so others wait in the queue (RFC 7296
// section 2.3). After a rekey the queue moves to the new SA. It is data only: Save encodes it.
type requestV2 struct {
	kind requestKind
	// spi is the inbound SPI of the Child SA that the response to requestPing activates, 0 for none, or
	// that requestDelete deletes.
	spi   uint32
	child *childRequest // of requestNewChild
	rekey *rekeyRequest // of requestRekey
}

// childRequest asks for a Child SA.
type childRequest struct {
	old         *Child // the Child SA that it replaces; nil is none
	groups      []Group
	retries     int
	spi         uint32
	ni          []byte
	dh          *dhKey    // nil without PFS, and before it is sent
	requestedAt time.Time // when it was sent
}

// rekeyRequest asks for an IKE SA in place of another one.
type rekeyRequest struct {
	old, next *v2SA
	offer     []Proposal
}

func (r *requestV2) exchange() uint8 {
	switch r.kind {
	case requestAuth:
		return exchangeAuth
	case requestNewChild, requestRekey:
		return exchangeCreateChild
	}
	return exchangeInformational
}

// createsChild reports whether the request creates or rekeys a Child SA.
func (r *requestV2) createsChild() bool { return r.kind == requestAuth || r.kind == requestNewChild }

// buildRequest returns the payloads of a request that is to be sent now. ok is false if it is not wanted any
// more.
func (s *v2SA) buildRequest(r *requestV2) (ps []payload, ok bool) {
	switch r.kind {
	case requestDelete:
		return []payload{{kind: v2Delete, body: append([]byte{v2ProtocolESP, 4, 0, 1}, be32(r.spi)...)}}, true
	case requestDeleteIKE:
		return []payload{{kind: v2Delete, body: []byte{v2ProtocolIKE, 0, 0, 0}}}, true
	case requestNewChild:
		ps = s.buildChildRequest(r.child)
	case requestRekey:
		ps = s.buildRekey(r.rekey)
	default:
		return nil, true
	}
	return ps, ps != nil
}

// receiveResponse processes the response to a request.
func (s *v2SA) receiveResponse(r *requestV2, ps []payload) {
	p := s.p
	switch r.kind {
	case requestAuth:
		s.receiveAuth(ps)
	case requestPing:
		if c := p.byInboundSPI(r.spi); c != nil {
			p.activate(c)
		}
	case requestDelete:
		if c := p.byInboundSPI(r.spi); c != nil {
			p.deletedByPeer(c)
		}
	case requestDeleteIKE:
		p.dropV2(s, p.deletedByPeer)
	case requestNewChild:
		s.receiveChild(r.child, ps)
	case requestRekey:
		s.receiveRekeyed(r.rekey, ps)
	}
}
