package ike

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"
)

// maintainV2 starts what is missing under s, the newest IKE SA: a Child SA, or a rekey. After
// simultaneous initiation older IKE SAs can have Child SAs too.
func (p *Peer) maintainV2(s *v2SA, need bool, rekey *Child) {
	for _, x := range p.v2 {
		if x.state == establishedV2 && !x.rekeying && (x == s || x.hasChild()) && p.past(x.rekeyAt) {
			x.requestRekey()
		}
	}
	if rekey != nil {
		// A Child SA is rekeyed on its own IKE SA.
		if rekey.v2 == nil {
			rekey = nil
		} else {
			s = rekey.v2
		}
	}
	if !need || s.childInProgress() || p.current == nil && !p.mayInitiate() && p.unconfirmedChild() == nil {
		return
	}
	if p.current == nil && !s.initiator && !p.past(s.established.Add(holdTime)) {
		return // the peer's request is about to come
	}
	if !p.past(p.nextChild) {
		return
	}
	p.nextChild = p.now.Add(backoffFirst)
	s.requestChild(rekey)
}

// hasChild reports whether s has a Child SA in use.
func (s *v2SA) hasChild() bool {
	for _, c := range s.p.children {
		if c.v2 == s && c.removeAt.IsZero() {
			return true
		}
	}
	return false
}

func (s *v2SA) childInProgress() bool {
	if s.pending != nil && s.pending.createsChild() {
		return true
	}
	for _, r := range s.queue {
		if r.createsChild() {
			return true
		}
	}
	return false
}

// pfsGroups returns the groups acceptable for a Child SA, the configured one first; nil without
// PFS.
func (p *Peer) pfsGroups() []Group {
	if p.cfg.PFS == 0 {
		return nil
	}
	gs := []Group{p.cfg.PFS}
	for _, g := range groups {
		if g.group.rank() > p.cfg.PFS.rank() {
			gs = append(gs, g.group)
		}
	}
	return gs
}

// requestChild requests a Child SA, in place of old unless that is nil.
func (s *v2SA) requestChild(old *Child) { s.requestChildWithGroups(old, s.p.pfsGroups(), 0) }

func (s *v2SA) requestChildWithGroups(old *Child, groups []Group, retries int) {
	p := s.p
	r := &childRequest{old: old, groups: groups, retries: retries, spi: p.newSPI(), ni: make([]byte, nonceLen)}
	p.random(r.ni)
	if old != nil {
		old.rekeying = true
	}
	s.enqueue(&requestV2{kind: requestNewChild, child: r})
}

// retryChild schedules another request for a Child SA that could not be made.
func (p *Peer) retryChild(r *childRequest) {
	end := p.now.Add(time.Hour)
	if r.old != nil {
		r.old.rekeying, end = false, r.old.ExpireAt
	}
	p.nextChild = p.now.Add(p.retryDelay(4*time.Second, end))
}

// buildChildRequest returns the payloads of a request for a Child SA; nil if it cannot be sent.
func (s *v2SA) buildChildRequest(r *childRequest) (ps []payload) {
	p := s.p
	r.requestedAt = p.now
	if r.old != nil {
		if !p.has(r.old) || !r.old.removeAt.IsZero() {
			r.old = nil // gone while the request was queued
		} else {
			ps = append(ps, payload{kind: v2Notify, body: append([]byte{v2ProtocolESP, 4, n2RekeySA >> 8, n2RekeySA & 0xff}, be32(r.old.Inbound.SPI)...)})
		}
	}
	offer := s.childOffer(r.spi, r.groups)
	ps = append(ps, offer[:2]...)
	ps = append(ps, payload{kind: v2Nonce, body: r.ni})
	if len(r.groups) > 0 {
		var err error
		if r.dh, err = newDHKey(r.groups[0], p.cfg.Rand); err != nil {
			p.retryChild(r)
			return nil
		}
		ps = append(ps, payload{kind: v2KeyExchange, body: keBody(r.dh)})
	}
	return append(ps, offer[2:]...)
}

// receiveChild processes the response to a request for a Child SA.
func (s *v2SA) receiveChild(r *childRequest, ps []payload) {
	p := s.p
	nr := bytes.Clone(find(ps, v2Nonce))
	group, ke := parseKE(find(ps, v2KeyExchange))
	switch kind := errorNotify(ps); {
	case kind == n2InvalidKE && r.retries < 3:
		var want Group
		eachNotify(ps, func(kind uint16, _, data []byte) {
			if kind == n2InvalidKE && len(data) == 2 {
				want = Group(binary.BigEndian.Uint16(data))
			}
		})
		for i, g := range r.groups {
			if g == want && i > 0 {
				rest := append([]Group{g}, append(append([]Group(nil), r.groups[:i]...), r.groups[i+1:]...)...)
				s.requestChildWithGroups(r.old, rest, r.retries+1)
				return
			}
		}
		p.retryChild(r)
	case kind == n2ChildNotFound && r.old != nil: // the peer no longer has it
		p.deletedByPeer(r.old)
	case kind != 0:
		p.retryChild(r)
		if kind != n2TemporaryFailure {
			s.childRefused(kind)
		}
	case !validNonceV2(nr) || (r.dh != nil) != (ke != nil) || r.dh != nil && group != r.dh.group:
		p.retryChild(r)
	default:
		var shared []byte
		if r.dh != nil {
			var err error
			if shared, err = r.dh.shared(ke); err != nil {
				p.retryChild(r)
				return
			}
		}
		if !s.handleChildResponse(ps, r.spi, r.requestedAt, shared, r.ni, nr, r.dh) {
			p.retryChild(r)
			return
		}
		if r.old == nil {
			s.ping() // shows the peer that its response arrived, as there may be no other request for long
		} else {
			p.scheduleDelete(r.old, min(overlapTime, r.old.ExpireAt.Sub(p.now)/2))
		}
	}
}

func (s *v2SA) childRefused(kind uint16) {
	p := s.p
	problem := Problem{Kind: Refused, Phase: 2, Detail: fmt.Sprintf("notification %d", kind)}
	switch kind {
	case n2NoProposal:
		problem = Problem{Kind: NoCommonProposal, Phase: 2, Ours: proposalList(p.cfg.Phase2) + " with " + p.cfg.PFS.String()}
	case n2TSUnacceptable:
		problem.Detail = "an SA for protocol 4 between our addresses"
	}
	p.noteFailure(problem)
	p.nextChild = later(p.nextChild, p.nextStart)
}

// handleChildResponse installs the Child SA of a response. It returns false if there is none that
// we can use.
func (s *v2SA) handleChildResponse(ps []payload, spi uint32, requestedAt time.Time, shared, ni, nr []byte, dh *dhKey) bool {
	p := s.p
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	if err != nil || len(sas) != 1 {
		if kind := errorNotify(ps); kind != 0 {
			s.childRefused(kind)
		}
		return false
	}
	var groups []Group
	if dh != nil {
		groups = []Group{dh.group}
	}
	proposal, esn, _, ok := chooseESP(p.cfg.Phase2, sas, groups)
	_, local := tsIncludes(find(ps, v2TSi), p.cfg.Local.As4(), s.nat.local)
	_, remote := tsIncludes(find(ps, v2TSr), p.cfg.Remote.As4(), s.nat.remote)
	if !ok || !local || !remote || !hasNotify(ps, n2TransportMode) {
		// The peer has installed an SA that we cannot use.
		p.noteFailure(Problem{Kind: Refused, Phase: 2, Detail: "it has no transport mode for protocol 4 between our addresses"})
		p.nextChild = later(p.nextChild, p.nextStart)
		s.enqueue(&requestV2{kind: requestDelete, spi: spi})
		return false
	}
	c := s.newChild(proposal, esn, spi, binary.BigEndian.Uint32(sas[0].spi), true, shared, ni, nr)
	p.setLifetimes(c, requestedAt, 0)
	p.add(c)
	p.activate(c)
	p.renegotiate = false
	return true
}

// handleChildRequest installs the Child SA that a request asks for, and returns the payloads of
// the response. groups is nil for an exchange without a KE payload.
func (s *v2SA) handleChildRequest(ps []payload, groups []Group, ni, nr []byte) []payload {
	p := s.p
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	if err != nil {
		return []payload{notifyV2(n2NoProposal, nil)}
	}
	proposal, esn, answer, ok := chooseESP(p.cfg.Phase2, sas, groups)
	if !ok {
		p.noteHint(Problem{Kind: NoCommonProposal, Phase: 2, Ours: proposalList(p.cfg.Phase2) + " with " + p.cfg.PFS.String(), Theirs: formatOfferV2(sas)})
		return []payload{notifyV2(n2NoProposal, nil)}
	}
	remote, okRemote := tsIncludes(find(ps, v2TSi), p.cfg.Remote.As4(), s.nat.remote)
	local, okLocal := tsIncludes(find(ps, v2TSr), p.cfg.Local.As4(), s.nat.local)
	if !okRemote || !okLocal || !hasNotify(ps, n2TransportMode) {
		p.noteHint(Problem{Kind: Refused, Phase: 2, Detail: "it wants an SA for other traffic than protocol 4 between our addresses, or no transport mode"})
		return []payload{notifyV2(n2TSUnacceptable, nil)}
	}
	var (
		shared []byte
		dh     *dhKey
		out    = []payload{notifyV2(n2TransportMode, nil)}
	)
	if groups != nil {
		group, ke := parseKE(find(ps, v2KeyExchange))
		if group != proposal.Group {
			return []payload{notifyV2(n2InvalidKE, []byte{byte(proposal.Group >> 8), byte(proposal.Group)})}
		}
		if dh, err = newDHKey(group, p.cfg.Rand); err != nil {
			return []payload{notifyV2(n2NoProposal, nil)}
		}
		if shared, err = dh.shared(ke); err != nil {
			return []payload{notifyV2(n2InvalidSyntax, nil)}
		}
	}
	spi := p.newSPI()
	peerSPI := binary.BigEndian.Uint32(answer.spi)
	answer.spi = be32(spi)
	out = append(out, payload{kind: v2SecurityAssociation, body: appendSAV2([]saProposalV2{answer})})
	if groups != nil || find(ps, v2Nonce) != nil {
		out = append(out, payload{kind: v2Nonce, body: nr})
	}
	if dh != nil {
		out = append(out, payload{kind: v2KeyExchange, body: keBody(dh)})
	}
	out = append(out, payload{kind: v2TSi, body: trafficSelector(remote)}, payload{kind: v2TSr, body: trafficSelector(local)})
	// The response can be lost. The SA is activated once the peer sends on it, or sends another
	// request, such as the DELETE of the SA that it replaces.
	c := s.newChild(proposal, esn, spi, peerSPI, false, shared, ni, nr)
	p.setLifetimes(c, p.now, 0)
	p.add(c)
	return out
}

// handleRequest processes an authentic request of the peer.
func (s *v2SA) handleRequest(h header, ps []payload, via udpPath) {
	if kind, bad := unsupportedCritical(ps); bad {
		s.respond(h, []payload{notifyV2(n2UnsupportedCritical, []byte{byte(kind)})})
		return
	}
	switch {
	case s.state == answeredInit && h.exchange == exchangeAuth:
		s.receiveAuthRequest(h, ps, via)
	case s.state != establishedV2:
	case h.exchange == exchangeCreateChild:
		s.receiveCreateChild(h, ps)
	case h.exchange == exchangeInformational:
		s.receiveInformational(h, ps)
	default:
		s.respond(h, []payload{notifyV2(n2InvalidSyntax, nil)})
	}
}

func (s *v2SA) receiveCreateChild(h header, ps []payload) {
	p := s.p
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	ni := bytes.Clone(find(ps, v2Nonce))
	if err != nil || len(sas) == 0 || !validNonceV2(ni) {
		s.respond(h, []payload{notifyV2(n2InvalidSyntax, nil)})
		return
	}
	if s.replaced {
		s.respond(h, []payload{notifyV2(n2TemporaryFailure, nil)})
		return
	}
	if sas[0].protocol == v2ProtocolIKE {
		s.receiveRekey(h, ps, sas, ni)
		return
	}
	if s.rekeying { // the new IKE SA would not inherit it (RFC 7296 section 2.25.2)
		s.respond(h, []payload{notifyV2(n2TemporaryFailure, nil)})
		return
	}
	var missing []byte
	eachNotify(ps, func(kind uint16, spi, _ []byte) {
		if kind == n2RekeySA && p.byOutboundSPI(spi) == nil {
			missing = spi
		}
	})
	if missing != nil {
		s.respond(h, []payload{{kind: v2Notify, body: append([]byte{v2ProtocolESP, byte(len(missing)), 0, n2ChildNotFound}, missing...)}})
		return
	}
	nr := make([]byte, nonceLen)
	p.random(nr)
	var groups []Group
	if p.cfg.PFS != 0 || find(ps, v2KeyExchange) != nil {
		if groups = p.pfsGroups(); groups == nil {
			group, _ := parseKE(find(ps, v2KeyExchange))
			groups = []Group{group}
		} else if group, _ := parseKE(find(ps, v2KeyExchange)); p.groupAllowed(group) && group.rank() != 0 {
			groups = append([]Group{group}, groups...) // accept the peer's group rather than send INVALID_KE_PAYLOAD
		}
	}
	s.respond(h, s.handleChildRequest(ps, groups, ni, nr))
}

// deleteChild sends a DELETE for a Child SA (RFC 7296 section 1.4.1).
func (s *v2SA) deleteChild(c *Child) {
	if !c.deleting {
		c.deleting = true
		s.enqueue(&requestV2{kind: requestDelete, spi: c.Inbound.SPI})
	}
}

// ping sends an empty INFORMATIONAL request (RFC 7296 section 1.4).
func (s *v2SA) ping() { s.enqueue(&requestV2{kind: requestPing}) }

// receiveInformational processes Delete payloads, and responds.
func (s *v2SA) receiveInformational(h header, ps []payload) {
	p := s.p
	var out []payload
	gone := false
	for _, x := range ps {
		if x.kind != v2Delete || len(x.body) < 4 {
			continue
		}
		size, n := int(x.body[1]), int(binary.BigEndian.Uint16(x.body[2:]))
		spis := x.body[4:]
		switch {
		case x.body[0] == v2ProtocolIKE:
			gone = true
		case x.body[0] == v2ProtocolESP && size == 4 && n <= maxTransforms && len(spis) == 4*n:
			answer := []byte{v2ProtocolESP, 4, 0, 0}
			for ; len(spis) > 0; spis = spis[4:] {
				c := p.byOutboundSPI(spis[:4])
				if c == nil || c.v2 == nil {
					continue
				}
				if !c.deleting { // simultaneous DELETEs are not answered with each other's SPI
					answer = append(answer, be32(c.Inbound.SPI)...)
					answer[3]++
				}
				c.deleting = true
				p.deletedByPeer(c)
			}
			if answer[3] > 0 {
				out = append(out, payload{kind: v2Delete, body: answer})
			}
		}
	}
	s.respond(h, out)
	if gone {
		p.dropV2(s, p.deletedByPeer)
		p.nextStart = later(p.nextStart, p.now.Add(backoffFirst))
	}
}
