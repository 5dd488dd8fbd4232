package ike

import (
	"bytes"
	"time"
)

// requestRekey rekeys the IKE SA (RFC 7296 section 1.3.2).
func (s *v2SA) requestRekey() {
	p := s.p
	s.rekeying = true
	n := &v2SA{p: p, initiator: true, path: s.path, startedAt: p.now, group: s.proposal.Group, nat: s.nat, canFragment: s.canFragment}
	p.random(n.spiI[:])
	n.ni = make([]byte, nonceLen)
	p.random(n.ni)
	s.enqueue(&requestV2{kind: requestRekey, rekey: &rekeyRequest{old: s, next: n, offer: s.rekeyOffer()}})
}

// rekeyOffer returns the proposals for the IKE SA in place of s. That of s comes first, as its group is known to work.
func (s *v2SA) rekeyOffer() []Proposal {
	offer := []Proposal{s.proposal}
	for _, x := range s.p.cfg.Phase1 {
		if x != s.proposal {
			offer = append(offer, x)
		}
	}
	return offer
}

// retryRekey schedules another rekey of an IKE SA, as the present one failed.
func (p *Peer) retryRekey(r *rekeyRequest) {
	r.old.rekeying = false
	r.old.rekeyAt = p.now.Add(p.retryDelay(8*time.Second, r.old.expireAt))
}

// buildRekey returns the payloads of a request for a new IKE SA; nil if it cannot be sent.
func (s *v2SA) buildRekey(r *rekeyRequest) []payload {
	p, n := s.p, r.next
	var err error
	if n.dh, err = newDHKey(n.group, p.cfg.Rand); err != nil || s.replaced {
		p.retryRekey(r)
		return nil
	}
	return []payload{
		{kind: v2SecurityAssociation, body: appendSAV2(offerIKE(r.offer, n.spiI[:]))},
		{kind: v2Nonce, body: n.ni}, {kind: v2KeyExchange, body: keBody(n.dh)},
	}
}

// receiveRekeyed processes the response to a request for a new IKE SA.
func (s *v2SA) receiveRekeyed(r *rekeyRequest, ps []payload) {
	p, n := s.p, r.next
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	group, ke := parseKE(find(ps, v2KeyExchange))
	n.nr = bytes.Clone(find(ps, v2Nonce))
	if err != nil || len(sas) != 1 || len(sas[0].spi) != 8 || !validNonceV2(n.nr) || group != n.group {
		p.retryRekey(r)
		return
	}
	var ok bool
	if n.proposal, _, ok = chooseIKE(r.offer, sas); !ok || n.proposal.Group != n.group {
		p.retryRekey(r)
		return
	}
	shared, err := n.dh.shared(ke)
	if err != nil {
		p.retryRekey(r)
		return
	}
	copy(n.spiR[:], sas[0].spi)
	if !s.replaceWith(n, shared) {
		p.retryRekey(r)
		return
	}
	// Queued requests move to the new SA, this one is deleted.
	n.queue, s.queue = s.queue, nil
	s.enqueue(&requestV2{kind: requestDeleteIKE})
}

// receiveRekey responds to a request for a new IKE SA.
func (s *v2SA) receiveRekey(h header, ps []payload, sas []saProposalV2, ni []byte) {
	p := s.p
	if s.rekeying || s.childInProgress() {
		s.respond(h, []payload{notifyV2(n2TemporaryFailure, nil)})
		return
	}
	proposal, answer, ok := chooseIKE(p.cfg.Phase1, sas)
	if !ok || len(answer.spi) != 8 {
		s.respond(h, []payload{notifyV2(n2NoProposal, nil)})
		return
	}
	group, ke := parseKE(find(ps, v2KeyExchange))
	if group != proposal.Group {
		s.respond(h, []payload{notifyV2(n2InvalidKE, []byte{byte(proposal.Group >> 8), byte(proposal.Group)})})
		return
	}
	n := &v2SA{
		p: p, path: s.path, startedAt: p.now, proposal: proposal, group: group, ni: ni, nr: make([]byte, nonceLen),
		nat: s.nat, canFragment: s.canFragment,
	}
	copy(n.spiI[:], answer.spi)
	p.random(n.spiR[:])
	p.random(n.nr)
	dh, err := newDHKey(group, p.cfg.Rand)
	if err != nil {
		s.respond(h, []payload{notifyV2(n2TemporaryFailure, nil)})
		return
	}
	shared, err := dh.shared(ke)
	if err != nil {
		s.respond(h, []payload{notifyV2(n2InvalidSyntax, nil)})
		return
	}
	answer.spi = n.spiR[:]
	s.respond(h, []payload{
		{kind: v2SecurityAssociation, body: appendSAV2([]saProposalV2{answer})},
		{kind: v2Nonce, body: n.nr}, {kind: v2KeyExchange, body: keBody(dh)},
	})
	s.replaceWith(n, shared)
}

// replaceWith moves the Child SAs to the new IKE SA n. s waits for its DELETE. It returns false
// if the keys cannot be derived.
func (s *v2SA) replaceWith(n *v2SA, shared []byte) bool {
	p := s.p
	var err error
	if n.keys, err = deriveV2(n.proposal, s.keys.rekeySKEYSEED(n.ni, n.nr, shared), n.ni, n.nr, n.spiI, n.spiR, n.initiator); err != nil {
		return false
	}
	n.establish()
	s.replaced, s.rekeying = true, true
	s.keepaliveAt, s.probing, s.deadAt = time.Time{}, true, time.Time{}
	s.expireAt = earlier(s.expireAt, p.now.Add(lingerTime))
	for _, c := range p.children {
		if c.v2 == s {
			c.v2 = n
		}
	}
	p.v2 = append(p.v2, n)
	p.rerun = true
	return true
}
