package ike

import (
	"bytes"
	"crypto/subtle"
	"strings"
	"time"
)

const nonceLen = 32

func (s *v1SA) vendorIDs() []payload {
	return []payload{{kind: v1VendorID, body: vendorNATT}, {kind: v1VendorID, body: vendorDPD}}
}

func (s *v1SA) readVendorIDs(ps []payload) {
	for _, p := range ps {
		if p.kind != v1VendorID {
			continue
		}
		s.natT = s.natT || bytes.Equal(p.body, vendorNATT)
		s.peerDPD = s.peerDPD || len(p.body) >= 14 && bytes.Equal(p.body[:14], vendorDPD[:14]) // the last two octets are a version
	}
}

// startV1 starts main mode as initiator.
func (p *Peer) startV1() {
	s := &v1SA{p: p, initiator: true, state: sent1, path: p.firstPath(), startedAt: p.now}
	p.random(s.ckyI[:])
	s.saI = appendSAV1(encodePhase1(p.cfg.Phase1, p.cfg.Lifetime1))
	p.v1 = append(p.v1, s)
	s.request(message(s.header(exchangeMain, 0), append([]payload{{kind: v1SecurityAssociation, body: s.saI}}, s.vendorIDs()...)))
}

// respondV1 answers message 1. The source address may be spoofed, so it does no Diffie-Hellman
// computation and keeps little.
func (p *Peer) respondV1(h header, b []byte, via udpPath) {
	ps, _, err := parsePayloads(b[headerLen:], h.next)
	if err != nil || firstType(ps) != v1SecurityAssociation {
		return
	}
	saI := find(ps, v1SecurityAssociation)
	sas, err := parseSAV1(saI)
	if err != nil || len(sas) == 0 || len(saI) > maxSAPayload || !p.cfg.Limits.allowCheapReply(p.now) {
		return
	}
	s := &v1SA{
		p: p, state: sent2, ckyI: h.initiator, path: via, startedAt: p.now, saI: bytes.Clone(saI),
		expireAt: p.now.Add(halfOpenTime),
	}
	chosen, ok := s.choosePhase1(sas)
	if !ok {
		p.noteHint(Problem{Kind: NoCommonProposal, Phase: 1, Ours: proposalList(p.cfg.Phase1), Theirs: formatOfferPhase1(sas)})
		notify := append(append(be32(doiIPsec), protoISAKMP, 0), 0, notifyNoProposal)
		r := s.header(exchangeInfo, p.random32())
		p.sendUnverified(via, message(r, []payload{{kind: v1Notification, body: notify}}))
		return
	}
	p.random(s.ckyR[:])
	s.readVendorIDs(ps)
	p.addUnverified(s)
	answer := []payload{{kind: v1SecurityAssociation, body: appendSAV1(chosen)}}
	if s.natT {
		answer = append(answer, payload{kind: v1VendorID, body: vendorNATT})
	}
	answer = append(answer, payload{kind: v1VendorID, body: vendorDPD})
	s.reply(b, message(s.header(exchangeMain, 0), answer))
}

// limitHalfOpenV1 drops the oldest of the least advanced half-open SAs of the peer if there are
// maxHalfOpen.
func (p *Peer) limitHalfOpenV1() {
	var oldest *v1SA
	n := 0
	for _, s := range p.v1 {
		if s.state == establishedV1 || s.initiator {
			continue
		}
		n++
		if oldest == nil || s.state < oldest.state {
			oldest = s
		}
	}
	if n >= maxHalfOpen {
		p.dropV1(oldest)
	}
}

// choosePhase1 returns the first of our proposals that the initiator offers, as the proposal to
// answer with: the transform must be returned unchanged (RFC 2408 section 4.2).
func (s *v1SA) choosePhase1(sas []saProposalV1) (saProposalV1, bool) {
	for _, want := range s.p.cfg.Phase1 {
		for _, sa := range sas {
			if sa.protocol != protoISAKMP {
				continue
			}
			for _, t := range sa.transforms {
				if got, life, ok := decodePhase1(t); ok && got == want {
					s.proposal, s.lifetime = got, life
					return saProposalV1{number: sa.number, protocol: sa.protocol, spi: sa.spi, transforms: []transformV1{t}}, true
				}
			}
		}
	}
	return saProposalV1{}, false
}

func formatOfferPhase1(sas []saProposalV1) string {
	var words []string
	for _, sa := range sas {
		for _, t := range sa.transforms {
			if p, _, ok := decodePhase1(t); ok {
				words = append(words, p.String())
			}
		}
	}
	if words == nil {
		return "no known algorithms"
	}
	return strings.Join(words, ",")
}

func (s *v1SA) receiveMain(h header, b []byte, via udpPath) {
	if h.id != 0 || (h.flags&flagEncrypted != 0) != (s.state == sent4 || s.state == sent5) {
		return
	}
	if s.state == sent4 || s.state == sent5 {
		s.receiveAuth(h, b, via)
		return
	}
	ps, _, err := parsePayloads(b[headerLen:], h.next)
	if err != nil {
		return
	}
	switch s.state {
	case sent1:
		s.receive2(h, ps)
	case sent2:
		s.receive3(b, ps, via)
	case sent3:
		s.receive4(ps, via)
	}
}

func (s *v1SA) receive2(h header, ps []payload) {
	sas, err := parseSAV1(find(ps, v1SecurityAssociation))
	if err != nil || len(sas) != 1 || len(sas[0].transforms) != 1 || h.responder == (ikeSPI{}) {
		return
	}
	got, life, ok := decodePhase1(sas[0].transforms[0])
	if !ok || !offered(s.p.cfg.Phase1, got) {
		return
	}
	dh, err := newDHKey(got.Group, s.p.cfg.Rand)
	if err != nil {
		return
	}
	s.proposal, s.lifetime, s.dh, s.ckyR = got, life, dh, h.responder
	s.readVendorIDs(ps)
	s.ni = make([]byte, nonceLen)
	s.p.random(s.ni)
	s.state = sent3
	s.request(message(s.header(exchangeMain, 0), s.keyPayloads(s.ni)))
}

func offered(ps []Proposal, p Proposal) bool {
	for _, x := range ps {
		if x == p {
			return true
		}
	}
	return false
}

func (s *v1SA) keyPayloads(nonce []byte) []payload {
	ps := []payload{{kind: v1KeyExchange, body: s.dh.public}, {kind: v1Nonce, body: nonce}}
	if s.natT {
		ps = append(ps, s.natPayloads()...)
	}
	return ps
}

// validNonceV1 checks a nonce's length: 8 to 256 bytes (RFC 2409 section 5).
func validNonceV1(b []byte) bool { return len(b) >= 8 && len(b) <= 256 }

func (s *v1SA) receive3(b []byte, ps []payload, via udpPath) {
	ke, ni := find(ps, v1KeyExchange), find(ps, v1Nonce)
	if ke == nil || !validNonceV1(ni) {
		return
	}
	p := s.p
	if s.dh == nil { // one private key per SA, however many invalid public values arrive
		if !p.allowVerifiedDH() {
			return
		}
		dh, err := newDHKey(s.proposal.Group, p.cfg.Rand)
		if err != nil {
			return
		}
		s.dh = dh
	}
	shared, err := s.dh.shared(ke)
	if err != nil {
		return
	}
	s.peerKE, s.ni, s.nr = bytes.Clone(ke), bytes.Clone(ni), make([]byte, nonceLen)
	p.random(s.nr)
	if s.keys, err = deriveV1(s.proposal, p.cfg.Secret, s.ni, s.nr, shared, ke, s.dh.public, s.ckyI, s.ckyR); err != nil {
		return
	}
	s.iv = s.keys.phase1IV
	s.discoverNAT(ps, via)
	s.state = sent4
	p.removeUnverified(s)
	p.limitHalfOpenV1()
	p.v1 = append(p.v1, s)
	// The responder cookie has shown return routability, so the negotiation may complete: give it
	// precedence over ours. The peer need not have the secret, though, so do that only once.
	if !p.holdUsed {
		p.holdUsed, p.holdUntil = true, p.now.Add(holdTime)
	}
	s.reply(b, message(s.header(exchangeMain, 0), s.keyPayloads(s.nr)))
}

func (s *v1SA) receive4(ps []payload, via udpPath) {
	ke, nr := find(ps, v1KeyExchange), find(ps, v1Nonce)
	if ke == nil || !validNonceV1(nr) {
		return
	}
	shared, err := s.dh.shared(ke)
	if err != nil {
		return
	}
	s.peerKE, s.nr = bytes.Clone(ke), bytes.Clone(nr)
	if s.keys, err = deriveV1(s.proposal, s.p.cfg.Secret, s.ni, s.nr, shared, s.dh.public, ke, s.ckyI, s.ckyR); err != nil {
		return
	}
	s.discoverNAT(ps, via)
	if s.nat.udp() && s.path.local == 500 { // RFC 3947 section 4
		s.path.local = 4500
		if s.path.remote.Port() == 500 {
			s.path = udpPath{4500, addrPort(s.p.cfg.Remote, 4500)}
		}
	}
	id := s.p.ourID()
	auth := []payload{{kind: v1Identification, body: id}, {kind: v1Hash, body: s.hash(true, id)}}
	if s.p.noChildren() && s.p.newestV1() == nil {
		auth = append(auth, payload{kind: v1Notification, body: s.notifyBody(notifyInitialContact, s.spi(), nil)})
	}
	s.state = sent5
	msg, iv := s.keys.encryptV1(s.header(exchangeMain, 0), auth, s.keys.phase1IV)
	s.iv = iv
	s.request(msg)
}

// hash returns HASH_I or HASH_R (RFC 2409 section 5).
func (s *v1SA) hash(initiators bool, id []byte) []byte {
	publicI, publicR := s.dh.public, s.peerKE
	if !s.initiator {
		publicI, publicR = publicR, publicI
	}
	if initiators {
		return prf(s.keys.hash, s.keys.skeyid, publicI, publicR, s.ckyI[:], s.ckyR[:], s.saI, id)
	}
	return prf(s.keys.hash, s.keys.skeyid, publicR, publicI, s.ckyR[:], s.ckyI[:], s.saI, id)
}

// maxAuthFailures is how many messages 5 may fail to authenticate before the SA is dropped. Each
// is a guess at the secret; a peer retransmits its own fewer times.
const maxAuthFailures = 8

// receiveAuth processes message 5 or 6. With different secrets it decrypts to garbage. So does a
// forged message, which is why our own attempts are not dropped for it.
func (s *v1SA) receiveAuth(h header, b []byte, via udpPath) {
	ps, _, iv, err := s.keys.decryptV1(h, b, s.iv)
	id, hash := find(ps, v1Identification), find(ps, v1Hash)
	if err != nil || len(id) < 4 || subtle.ConstantTimeCompare(hash, s.hash(!s.initiator, id)) != 1 {
		if s.authFailures++; !s.initiator && s.authFailures >= maxAuthFailures {
			s.p.dropV1(s)
		}
		s.p.noteHint(Problem{Kind: SecretMismatch, Detail: ", it seems: its authentication does not verify"})
		return
	}
	if problem, ok := s.p.checkIdentity(id, s.nat); !ok {
		s.p.dropV1(s)
		s.p.noteFailure(problem)
		return
	}
	s.iv = iv
	if !s.initiator {
		s.path = via // the peer may have moved to port 4500
		own := s.p.ourID()
		msg, next := s.keys.encryptV1(s.header(exchangeMain, 0), []payload{
			{kind: v1Identification, body: own}, {kind: v1Hash, body: s.hash(false, own)},
		}, s.iv)
		s.iv = next
		s.reply(b, msg)
	}
	s.establish()
	for _, p := range ps {
		if p.kind == v1Notification {
			s.receiveNotification(p.body)
		}
	}
	s.noteAuthentic(via)
}

func (s *v1SA) establish() {
	p := s.p
	s.retransmission.stop()
	s.state, s.established, s.quickModes = establishedV1, p.now, map[uint32]*quickMode{}
	p.changed = true
	life := p.cfg.Lifetime1
	if s.lifetime > 0 && s.lifetime < life {
		life = s.lifetime
	}
	s.rekeyAt, s.expireAt = p.now.Add(p.softLifetime(life)), p.now.Add(life)
	if s.nat.local {
		s.keepaliveAt = p.now.Add(keepaliveTime)
	}
	p.lastReceived = p.now
	p.holdUntil, p.holdUsed = time.Time{}, false
	if p.problem.Kind == SecretMismatch || p.problem.Phase == 1 || p.problem.Kind == NoAnswer {
		p.problem = Problem{}
	}
	// Replace older SAs, our own included, after time for the peer to switch. One negotiated
	// simultaneously by the peer stays.
	for _, old := range p.v1 {
		if old != s && old.state == establishedV1 && old.established.Before(s.startedAt) && old.replacedAt.IsZero() {
			old.replacedAt = p.now.Add(overlapTime)
			old.rekeyAt = old.expireAt
			// Some peers then delete the ESP SAs negotiated under it.
			p.renegotiate = p.renegotiate || s.initiator && p.current != nil && p.current.v1 == old
		}
	}
	p.limitEstablishedV1()
	p.rerun = true
}

// limitEstablishedV1 is limitEstablishedV2 for IKEv1. A replaced SA lives on while a quick mode
// under it waits for the peer.
func (p *Peer) limitEstablishedV1() {
	var oldest *v1SA
	n := 0
	for _, s := range p.v1 {
		if s.state != establishedV1 {
			continue
		}
		if n++; oldest == nil || !s.replacedAt.IsZero() && oldest.replacedAt.IsZero() {
			oldest = s
		}
	}
	if n > maxEstablished {
		p.dropV1(oldest)
	}
}
