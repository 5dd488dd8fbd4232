package ike

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	"ipipd/internal/ipsec/esp"
)

// startV2 starts IKE_SA_INIT as initiator.
func (p *Peer) startV2() {
	s := &v2SA{p: p, initiator: true, state: sentInit, path: p.firstPath(), startedAt: p.now, group: p.cfg.Phase1[0].Group}
	p.random(s.spiI[:])
	s.ni = make([]byte, nonceLen)
	p.random(s.ni)
	p.v2 = append(p.v2, s)
	s.sendInit()
}

func (s *v2SA) sendInit() {
	p := s.p
	if s.dh == nil || s.dh.group != s.group {
		var err error
		if s.dh, err = newDHKey(s.group, p.cfg.Rand); err != nil {
			p.dropV2(s, p.retireUnanswered)
			p.noteFailure(Problem{Kind: Refused, Phase: 1, Detail: err.Error()})
			return
		}
	}
	var ps []payload
	if s.cookie != nil {
		ps = append(ps, notifyV2(n2Cookie, s.cookie))
	}
	ps = append(ps,
		payload{kind: v2SecurityAssociation, body: appendSAV2(offerIKE(p.cfg.Phase1, nil))},
		payload{kind: v2KeyExchange, body: keBody(s.dh)},
		payload{kind: v2Nonce, body: s.ni})
	ps = append(ps, s.natPayloads(ikeSPI{})...)
	ps = append(ps, notifyV2(n2Fragmentation, nil))
	s.initRequest = message(s.header(exchangeInit, 0, false), ps)
	p.transmit(&s.retransmission, s.path, s.initRequest)
}

func keBody(e *dhKey) []byte {
	return append([]byte{byte(e.group >> 8), byte(e.group), 0, 0}, e.public...)
}

// parseKE parses the body of a KE payload; group 0 means none.
func parseKE(b []byte) (Group, []byte) {
	if len(b) < 4 {
		return 0, nil
	}
	return Group(binary.BigEndian.Uint16(b)), b[4:]
}

// receiveInit processes the IKE_SA_INIT response.
func (s *v2SA) receiveInit(h header, b []byte, via udpPath) {
	p := s.p
	ps, rest, err := parsePayloads(b[headerLen:], h.next)
	if err != nil || len(rest) != 0 {
		return
	}
	if firstType(ps) == v2Notify && find(ps, v2SecurityAssociation) == nil {
		s.handleInitError(ps)
		return
	}
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	group, ke := parseKE(find(ps, v2KeyExchange))
	nr := find(ps, v2Nonce)
	if err != nil || len(sas) != 1 || !validNonceV2(nr) || h.responder == (ikeSPI{}) || group != s.group {
		return
	}
	proposal, _, ok := chooseIKE(p.cfg.Phase1, sas)
	if !ok || proposal.Group != group {
		return
	}
	shared, err := s.dh.shared(ke)
	if err != nil {
		return
	}
	s.proposal, s.nr, s.spiR, s.initResponse = proposal, bytes.Clone(nr), h.responder, bytes.Clone(b)
	if s.keys, err = deriveV2(proposal, skeyseed(proposal, s.ni, s.nr, shared), s.ni, s.nr, s.spiI, s.spiR, true); err != nil {
		return
	}
	s.canFragment = hasNotify(ps, n2Fragmentation)
	s.discoverNAT(ps, s.spiR, via)
	if s.nat.udp() {
		s.path.local = 4500
		if s.path.remote.Port() == 500 {
			s.path.remote = addrPort(p.cfg.Remote, 4500)
		}
	}
	s.state, s.sendID, s.spi, s.requestedAt = sentAuth, 1, p.newSPI(), p.now
	id := p.ourID()
	auth := []payload{{kind: v2IDi, body: id}}
	if p.noChildren() {
		auth = append(auth, notifyV2(n2InitialContact, nil))
	}
	value := authV2(proposal.Hash, p.cfg.Secret, s.initRequest, s.nr, s.keys.skPi, id)
	auth = append(auth, payload{kind: v2Auth, body: append([]byte{authShared, 0, 0, 0}, value...)})
	auth = append(auth, s.childOffer(s.spi, nil)...)
	s.transmit(&requestV2{kind: requestAuth}, auth)
}

const authShared = 2

// validNonceV2 checks a nonce's length: 16 to 256 bytes (RFC 7296 section 3.9).
func validNonceV2(b []byte) bool { return len(b) >= 16 && len(b) <= 256 }

// handleInitError processes an IKE_SA_INIT response without an SA, which is not authenticated. A
// COOKIE or INVALID_KE_PAYLOAD makes us try again, at most 3 times; other notifications only set
// the Problem.
func (s *v2SA) handleInitError(ps []payload) {
	p := s.p
	eachNotify(ps, func(kind uint16, _, data []byte) {
		switch {
		case kind == n2Cookie && len(data) >= 1 && len(data) <= 64 && s.initRetries < 3:
			s.initRetries++
			s.cookie = bytes.Clone(data)
			s.sendInit()
		case kind == n2InvalidKE && len(data) == 2 && s.initRetries < 3:
			group := Group(binary.BigEndian.Uint16(data))
			for _, x := range p.cfg.Phase1 {
				if x.Group == group && group != s.group {
					s.initRetries++
					s.group = group
					s.sendInit()
					return
				}
			}
		case kind == n2NoProposal:
			p.noteHint(Problem{Kind: NoCommonProposal, Phase: 1, Ours: proposalList(p.cfg.Phase1)})
		case kind < 16384:
			p.noteHint(Problem{Kind: Refused, Phase: 1, Detail: fmt.Sprintf("notification %d", kind)})
		}
	})
}

// respondInit responds to IKE_SA_INIT. The Diffie-Hellman exchange is expensive and the source
// may be spoofed, so beyond a few half-open SAs, or a few requests a second, the initiator must
// return a COOKIE (RFC 7296 section 2.6). An initiator with one does not compete with spoofed sources.
func (p *Peer) respondInit(h header, b []byte, via udpPath) {
	ps, rest, err := parsePayloads(b[headerLen:], h.next)
	if err != nil || len(rest) != 0 {
		return
	}
	r := header{initiator: h.initiator, version: version2, exchange: exchangeInit, flags: flagResponse}
	ni := find(ps, v2Nonce)
	sas, err := parseSAV2(find(ps, v2SecurityAssociation))
	group, ke := parseKE(find(ps, v2KeyExchange))
	if err != nil || !validNonceV2(ni) || len(ke) == 0 {
		return
	}
	halfOpen := 0
	var oldest *v2SA
	for _, s := range p.v2 {
		if !s.initiator && s.state == answeredInit {
			if halfOpen++; oldest == nil {
				oldest = s
			}
		}
	}
	send := p.sendUnverified
	switch {
	case p.cookieSecrets.verify(p, ps, ni, h.initiator):
		if !p.allowVerifiedDH() {
			return
		}
		send = p.send
	case halfOpen >= maxHalfOpen/2 || !p.cfg.Limits.allowUnverifiedDH(p.now):
		if p.cfg.Limits.allowCheapReply(p.now) {
			send(via, message(r, []payload{notifyV2(n2Cookie, p.cookieSecrets.generate(p, ni, h.initiator))}))
		}
		return
	}
	proposal, answer, ok := chooseIKE(p.cfg.Phase1, sas)
	if !ok {
		p.noteHint(Problem{Kind: NoCommonProposal, Phase: 1, Ours: proposalList(p.cfg.Phase1), Theirs: formatOfferV2(sas)})
		send(via, message(r, []payload{notifyV2(n2NoProposal, nil)}))
		return
	}
	if group != proposal.Group {
		send(via, message(r, []payload{notifyV2(n2InvalidKE, []byte{byte(proposal.Group >> 8), byte(proposal.Group)})}))
		return
	}
	if halfOpen >= maxHalfOpen {
		p.dropV2(oldest, p.retireUnanswered)
	}
	s := &v2SA{
		p: p, state: answeredInit, spiI: h.initiator, path: via, startedAt: p.now, expireAt: p.now.Add(halfOpenTime),
		proposal: proposal, group: group, ni: bytes.Clone(ni), nr: make([]byte, nonceLen), initRequest: bytes.Clone(b), recvID: 1,
	}
	p.random(s.spiR[:])
	p.random(s.nr)
	dh, err := newDHKey(group, p.cfg.Rand)
	if err != nil {
		return
	}
	shared, err := dh.shared(ke)
	if err != nil {
		return
	}
	if s.keys, err = deriveV2(proposal, skeyseed(proposal, s.ni, s.nr, shared), s.ni, s.nr, s.spiI, s.spiR, false); err != nil {
		return
	}
	s.canFragment = hasNotify(ps, n2Fragmentation)
	s.discoverNAT(ps, ikeSPI{}, via)
	out := []payload{
		{kind: v2SecurityAssociation, body: appendSAV2([]saProposalV2{answer})},
		{kind: v2KeyExchange, body: keBody(dh)}, {kind: v2Nonce, body: s.nr},
	}
	out = append(out, s.natPayloads(s.spiR)...)
	if s.canFragment {
		out = append(out, notifyV2(n2Fragmentation, nil))
	}
	s.initResponse = message(s.header(exchangeInit, 0, true), out)
	p.v2 = append(p.v2, s)
	send(via, s.initResponse)
}

// verifyAuth verifies the peer's AUTH payload, and then its identity.
func (s *v2SA) verifyAuth(id, auth, signed, nonce, sk []byte) (Problem, bool) {
	if len(id) < 5 || len(auth) < 5 || auth[0] != authShared ||
		subtle.ConstantTimeCompare(auth[4:], authV2(s.proposal.Hash, s.p.cfg.Secret, signed, nonce, sk, id)) != 1 {
		return Problem{Kind: SecretMismatch, Detail: ": its authentication does not verify"}, false
	}
	return s.p.checkIdentity(id, s.nat)
}

// receiveAuth processes the IKE_AUTH response.
func (s *v2SA) receiveAuth(ps []payload) {
	p := s.p
	id, auth := find(ps, v2IDr), find(ps, v2Auth)
	if auth == nil {
		problem := Problem{Kind: Refused, Phase: 1, Detail: fmt.Sprintf("notification %d", errorNotify(ps))}
		if errorNotify(ps) == n2AuthFailed {
			problem = Problem{Kind: SecretMismatch, Detail: ", or our identity is not what it expects: it says that our authentication failed"}
		}
		p.dropV2(s, p.retireUnanswered)
		p.noteFailure(problem)
		return
	}
	if problem, ok := s.verifyAuth(id, auth, s.initResponse, s.ni, s.keys.skPr); !ok {
		p.dropV2(s, p.retireUnanswered)
		p.noteFailure(problem)
		return
	}
	s.establish()
	s.handleChildResponse(ps, s.spi, s.requestedAt, nil, s.ni, s.nr, nil)
	s.ping() // shows the peer that its response arrived, as there may be no other request for long
}

// receiveAuthRequest processes the IKE_AUTH request.
func (s *v2SA) receiveAuthRequest(h header, ps []payload, via udpPath) {
	p := s.p
	id, auth := find(ps, v2IDi), find(ps, v2Auth)
	s.path = via // the peer may have moved to port 4500
	if problem, ok := s.verifyAuth(id, auth, s.initRequest, s.nr, s.keys.skPi); !ok {
		p.noteHint(problem)
		s.respond(h, []payload{notifyV2(n2AuthFailed, nil)})
		p.dropV2(s, p.retireUnanswered)
		return
	}
	s.establish()
	if hasNotify(ps, n2InitialContact) {
		s.initialContact()
	}
	own := p.ourID()
	value := authV2(s.proposal.Hash, p.cfg.Secret, s.initResponse, s.ni, s.keys.skPr, own)
	out := []payload{{kind: v2IDr, body: own}, {kind: v2Auth, body: append([]byte{authShared, 0, 0, 0}, value...)}}
	s.respond(h, append(out, s.handleChildRequest(ps, nil, s.ni, s.nr)...))
	if c := p.unconfirmedChild(); c != nil && c.v2 == s {
		s.firstChild, s.confirmAt = c, p.now.Add(confirmTimeout)
	}
	s.noteAuthentic(via)
}

func (s *v2SA) initialContact() {
	p := s.p
	p.deletedByPeer(p.childrenBefore(s.startedAt)...)
	for _, old := range append([]*v2SA(nil), p.v2...) {
		if old != s && old.state == establishedV2 && old.established.Before(s.startedAt) {
			p.dropV2(old, p.deletedByPeer)
		}
	}
}

func (s *v2SA) establish() {
	p := s.p
	s.retransmission.stop()
	s.state, s.established, p.changed = establishedV2, p.now, true
	s.rekeyAt = p.now.Add(p.softLifetime(p.cfg.Lifetime1))
	s.expireAt = p.now.Add(p.cfg.Lifetime1)
	if s.nat.local {
		s.keepaliveAt = p.now.Add(keepaliveTime)
	}
	s.dh = nil
	p.lastReceived = p.now
	p.limitEstablishedV2()
	if p.problem.Kind == SecretMismatch || p.problem.Phase == 1 || p.problem.Kind == NoAnswer {
		p.problem = Problem{}
	}
	p.rerun = true
}

// limitEstablishedV2 drops an IKE SA beyond maxEstablished: the oldest, a replaced one first. A
// peer has one, and a few more during a rekey or after a restart.
func (p *Peer) limitEstablishedV2() {
	var oldest *v2SA
	n := 0
	for _, s := range p.v2 {
		if s.state != establishedV2 {
			continue
		}
		if n++; oldest == nil || s.replaced && !oldest.replaced {
			oldest = s
		}
	}
	if n > maxEstablished {
		p.dropV2(oldest, p.deletedByPeer)
	}
}

// childOffer returns the payloads that offer a Child SA, in IKE_AUTH (without groups) or
// CREATE_CHILD_SA.
func (s *v2SA) childOffer(spi uint32, groups []Group) []payload {
	return []payload{
		notifyV2(n2TransportMode, nil),
		{kind: v2SecurityAssociation, body: appendSAV2(offerESP(s.p.cfg.Phase2, spi, groups))},
		{kind: v2TSi, body: trafficSelector(s.p.cfg.Local.As4())},
		{kind: v2TSr, body: trafficSelector(s.p.cfg.Remote.As4())},
	}
}

// newChild derives the keys of a Child SA. spi is the inbound one.
func (s *v2SA) newChild(p Proposal, esn bool, spi, peerSPI uint32, weInitiated bool, shared, ni, nr []byte) *Child {
	suite := p.suite()
	out, in := s.keys.childKeys(suite, shared, ni, nr)
	if !weInitiated {
		out, in = in, out
	}
	group := p.Group
	if shared == nil {
		group = s.proposal.Group
	}
	c := &Child{
		Inbound:  esp.Config{SPI: spi, Suite: suite, Protocol: protocolIPIP, Keys: in, ESN: esn},
		Outbound: esp.Config{SPI: peerSPI, Suite: suite, Protocol: protocolIPIP, Keys: out, ESN: esn},
		Version:  2, IKE: s.proposal, Group: group, v2: s,
	}
	if s.nat.udp() {
		c.Outbound.SourcePort, c.Outbound.DestinationPort = s.path.local, s.path.remote.Port()
	}
	return c
}
