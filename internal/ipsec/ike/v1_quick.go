package ike

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ipipd/internal/ipsec/esp"
)

// quickMode is a quick mode exchange (RFC 2409 section 5.5):
//
//	initiator                                     responder
//	HDR*, HASH(1), SA, Ni, KE, IDci, IDcr   → 1
//	                                        2 ←   HDR*, HASH(2), SA, Nr, KE, IDci, IDcr
//	HDR*, HASH(3)                           → 3
//
// The responder receives on the new SA from message 2 on, and sends from message 3 on, so that
// neither end gets a packet that it has no key for. If message 3 is lost, the responder sends
// once it has received a packet, and it goes on receiving after giving up on message 3.
type quickMode struct {
	s         *v1SA
	id        uint32
	initiator bool
	iv        []byte
	ni, nr    []byte
	dh        *dhKey
	group     Group
	spi       uint32 // inbound
	replaces  *Child // initiator only
	child     *Child
	done      bool
	expireAt  time.Time
	startedAt time.Time

	retransmission
	lastRequestHash [32]byte
	lastReply       []byte
}

func sortedIDs(m map[uint32]*quickMode) []uint32 {
	ids := make([]uint32, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func addrPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// clientID returns the body of IDci or IDcr: an address and protocol 4.
func clientID(a netip.Addr) []byte {
	ip := a.As4()
	return append([]byte{idIPv4, protocolIPIP, 0, 0}, ip[:]...)
}

const protocolIPIP = 4

func (s *v1SA) startQuick(replaces *Child) {
	p := s.p
	q := &quickMode{s: s, id: s.newMessageID(), initiator: true, replaces: replaces, group: p.cfg.PFS, spi: p.newSPI(), startedAt: p.now}
	q.ni = make([]byte, nonceLen)
	p.random(q.ni)
	if replaces != nil {
		replaces.rekeying = true
	}
	q.iv = s.keys.phase2IV(s.iv, q.id)
	body := []payload{
		{kind: v1SecurityAssociation, body: appendSAV1(encodePhase2(p.cfg.Phase2, q.spi, q.group, s.nat.udp(), p.cfg.Lifetime2))},
		{kind: v1Nonce, body: q.ni},
	}
	if q.group != 0 {
		var err error
		if q.dh, err = newDHKey(q.group, p.cfg.Rand); err != nil {
			p.noteFailure(Problem{Kind: Refused, Phase: 2, Detail: err.Error()})
			return
		}
		body = append(body, payload{kind: v1KeyExchange, body: q.dh.public})
	}
	body = append(body, payload{kind: v1Identification, body: clientID(p.cfg.Local)}, payload{kind: v1Identification, body: clientID(p.cfg.Remote)})
	s.quickModes[q.id] = q
	q.transmit(q.seal(be32(q.id), body))
}

// seal returns an encrypted message of body with HASH(1) or HASH(2) in front. prefix is what the
// hash covers before body.
func (q *quickMode) seal(prefix []byte, body []payload) []byte {
	hash := prf(q.s.keys.hash, q.s.keys.skeyidA, prefix, appendPayloads(nil, body))
	msg, iv := q.s.keys.encryptV1(q.s.header(exchangeQuick, q.id), append([]payload{{kind: v1Hash, body: hash}}, body...), q.iv)
	q.iv = iv
	return msg
}

func (q *quickMode) transmit(b []byte) { q.s.p.transmit(&q.retransmission, q.s.path, b) }

// cancel stops the exchange.
func (q *quickMode) cancel() {
	q.retransmission.stop()
	if q.replaces != nil {
		q.replaces.rekeying = false
	}
	q.done, q.s.p.changed = true, true
}

func (q *quickMode) remove() {
	q.cancel()
	delete(q.s.quickModes, q.id)
	q.s.p.rerun = true
}

func (q *quickMode) step() {
	p := q.s.p
	if !q.retransmission.step(p, q.s.path) {
		q.remove()
		if q.initiator {
			p.noteFailure(Problem{Kind: NoAnswer, Phase: 2, Detail: " to quick mode"})
			p.nextChild = p.nextStart
			// The peer may have lost the ISAKMP SA: negotiate a new one.
			p.dropV1(q.s)
		}
		return
	}
	if p.due(q.expireAt) {
		q.remove()
	}
}

func (s *v1SA) receiveQuick(h header, b []byte, via udpPath) {
	q := s.quickModes[h.id]
	if q != nil && q.lastReply != nil && sha256.Sum256(b) == q.lastRequestHash {
		s.p.send(s.path, q.lastReply)
		if q.initiator && !q.child.activateAt.IsZero() && s.p.current != nil {
			s.p.activateLater(q.child) // message 3 was lost, so the peer has not installed it
		}
		return
	}
	if h.flags&flagEncrypted == 0 || q != nil && q.done {
		return
	}
	var iv []byte
	if q != nil {
		iv = q.iv
	} else {
		if s.idUsed(h.id) {
			return
		}
		iv = s.keys.phase2IV(s.iv, h.id)
	}
	ps, plain, next, err := s.keys.decryptV1(h, b, iv)
	if err != nil || len(ps) == 0 || ps[0].kind != v1Hash {
		return
	}
	hash, rest := ps[0].body, plain[4+len(ps[0].body):]
	switch {
	case q == nil:
		s.respondQuick(h.id, b, hash, rest, ps[1:], next, via)
	case q.initiator:
		q.receive2(b, hash, rest, ps[1:], next, via)
	default:
		q.receive3(hash, via)
	}
}

// respondQuick processes message 1.
func (s *v1SA) respondQuick(id uint32, b, hash, rest []byte, ps []payload, iv []byte, via udpPath) {
	p := s.p
	if subtle.ConstantTimeCompare(hash, prf(s.keys.hash, s.keys.skeyidA, be32(id), rest)) != 1 {
		return
	}
	s.markIDUsed(id)
	s.noteAuthentic(via)
	q := &quickMode{s: s, id: id, iv: iv, spi: p.newSPI(), startedAt: p.now, expireAt: p.now.Add(halfOpenTime)}
	sas, err := parseSAV1(find(ps, v1SecurityAssociation))
	q.ni = bytes.Clone(find(ps, v1Nonce))
	if err != nil || !validNonceV1(q.ni) || len(s.quickModes) > maxChildren {
		return
	}
	var ids []payload
	for _, x := range ps {
		if x.kind == v1Identification {
			ids = append(ids, x)
		}
	}
	if !s.validSelectors(ids) {
		p.noteHint(Problem{Kind: Refused, Phase: 2, Detail: "it wants an SA for other traffic than protocol 4 between our addresses"})
		s.sendNotification(notifyInvalidID)
		return
	}
	chosen, proposal, life, ok := s.choosePhase2(sas)
	ke := find(ps, v1KeyExchange)
	if !ok || (ke != nil) != (proposal.Group != 0) {
		p.noteHint(Problem{Kind: NoCommonProposal, Phase: 2, Ours: s.formatOwnPhase2(), Theirs: formatOfferPhase2(sas, s.nat.udp())})
		s.sendNotification(notifyNoProposal)
		return
	}
	peerSPI := chosen.spi
	chosen.spi = be32(q.spi)
	q.group = proposal.Group
	q.nr = make([]byte, nonceLen)
	p.random(q.nr)
	answer := []payload{{kind: v1SecurityAssociation, body: appendSAV1(chosen)}, {kind: v1Nonce, body: q.nr}}
	var shared []byte
	if ke != nil {
		if q.dh, err = newDHKey(q.group, p.cfg.Rand); err != nil {
			return
		}
		if shared, err = q.dh.shared(ke); err != nil {
			return
		}
		answer = append(answer, payload{kind: v1KeyExchange, body: q.dh.public})
	}
	q.child = q.newChild(proposal, life, binary.BigEndian.Uint32(peerSPI), shared)
	p.add(q.child)
	s.quickModes[id] = q
	q.lastRequestHash = sha256.Sum256(b)
	q.lastReply = q.seal(append(be32(id), q.ni...), append(answer, ids...))
	q.transmit(q.lastReply)
}

// validSelectors reports whether IDci and IDcr are for protocol 4, or any, between the two
// addresses. Behind a NAT any address will do.
func (s *v1SA) validSelectors(ids []payload) bool {
	if len(ids) == 0 {
		return true // they default to the addresses of the ISAKMP SA (RFC 2409 section 5.5)
	}
	if len(ids) != 2 {
		return false
	}
	for i, end := range []struct {
		address netip.Addr
		nat     bool
	}{{s.p.cfg.Remote, s.nat.remote}, {s.p.cfg.Local, s.nat.local}} {
		b := ids[i].body
		ip := end.address.As4()
		if len(b) == 12 && b[0] == idIPv4Subnet && bytes.Equal(b[8:], []byte{255, 255, 255, 255}) {
			b = append([]byte{idIPv4}, b[1:8]...) // a /32
		}
		if len(b) != 8 || b[0] != idIPv4 || b[1] != 0 && b[1] != protocolIPIP || !end.nat && !bytes.Equal(b[4:], ip[:]) {
			return false
		}
	}
	return true
}

// groupAllowed reports whether g is as strong as the configured PFS group. With none configured,
// all are.
func (p *Peer) groupAllowed(g Group) bool {
	return p.cfg.PFS == 0 || g.rank() >= p.cfg.PFS.rank()
}

func (s *v1SA) choosePhase2(sas []saProposalV1) (chosen saProposalV1, proposal Proposal, life time.Duration, ok bool) {
	for _, want := range s.p.cfg.Phase2 {
		for _, sa := range sas {
			if sa.protocol != protoESP || len(sa.spi) != 4 || binary.BigEndian.Uint32(sa.spi) < 256 || protocolsOf(sas, sa.number) != 1 {
				continue
			}
			for _, t := range sa.transforms {
				got, life, ok := decodePhase2(t, s.nat.udp())
				if ok && s.p.groupAllowed(got.Group) && sameAlgorithms(got, want) {
					return saProposalV1{number: sa.number, protocol: protoESP, spi: sa.spi, transforms: []transformV1{t}}, got, life, true
				}
			}
		}
	}
	return saProposalV1{}, Proposal{}, 0, false
}

// protocolsOf counts the proposals with that number: several are one offer of several protocols,
// such as ESP with IPComp (RFC 2408 section 4.2).
func protocolsOf(sas []saProposalV1, number uint8) int {
	n := 0
	for _, sa := range sas {
		if sa.number == number {
			n++
		}
	}
	return n
}

func sameAlgorithms(a, b Proposal) bool {
	return a.Cipher == b.Cipher && a.KeyBits == b.KeyBits && a.Hash == b.Hash
}

func (s *v1SA) formatOwnPhase2() string {
	return proposalList(s.p.cfg.Phase2) + " with " + s.p.cfg.PFS.String()
}

func formatOfferPhase2(sas []saProposalV1, udp bool) string {
	var words []string
	for _, sa := range sas {
		for _, t := range sa.transforms {
			if p, _, ok := decodePhase2(t, udp); ok && sa.protocol == protoESP {
				words = append(words, p.String())
			}
		}
	}
	if words == nil {
		return "no known algorithms"
	}
	return strings.Join(words, ",")
}

// newChild derives the keys of both SAs.
func (q *quickMode) newChild(proposal Proposal, life time.Duration, peerSPI uint32, shared []byte) *Child {
	s := q.s
	suite := proposal.suite()
	c := &Child{
		Inbound:  esp.Config{SPI: q.spi, Suite: suite, Protocol: protocolIPIP, Keys: s.keys.keymat(suite, shared, q.spi, q.ni, q.nr)},
		Outbound: esp.Config{SPI: peerSPI, Suite: suite, Protocol: protocolIPIP, Keys: s.keys.keymat(suite, shared, peerSPI, q.ni, q.nr)},
		Version:  1, IKE: s.proposal, Group: proposal.Group, v1: s,
	}
	if s.nat.udp() {
		c.Outbound.SourcePort, c.Outbound.DestinationPort = s.path.local, s.path.remote.Port()
	}
	requestedAt := s.p.now
	if q.initiator {
		requestedAt = q.startedAt
	}
	s.p.setLifetimes(c, requestedAt, life)
	return c
}

// receive2 processes message 2.
func (q *quickMode) receive2(b, hash, rest []byte, ps []payload, iv []byte, via udpPath) {
	s, p := q.s, q.s.p
	if subtle.ConstantTimeCompare(hash, prf(s.keys.hash, s.keys.skeyidA, be32(q.id), q.ni, rest)) != 1 {
		return
	}
	s.noteAuthentic(via)
	if !q.accept(b, ps, iv) { // drop the exchange: a replay of this message must not count as a sign of life
		p.noteFailure(Problem{Kind: Refused, Phase: 2, Detail: "its answer to quick mode is not one to what was asked"})
		p.nextChild = p.nextStart
		q.remove()
	}
}

// accept installs the SA of an authentic message 2, and sends message 3.
func (q *quickMode) accept(b []byte, ps []payload, iv []byte) bool {
	s, p := q.s, q.s.p
	sas, err := parseSAV1(find(ps, v1SecurityAssociation))
	nr, ke := find(ps, v1Nonce), find(ps, v1KeyExchange)
	if err != nil || len(sas) != 1 || len(sas[0].transforms) != 1 || len(sas[0].spi) != 4 || !validNonceV1(nr) || (ke != nil) != (q.dh != nil) {
		return false
	}
	proposal, life, ok := decodePhase2(sas[0].transforms[0], s.nat.udp())
	known := slices.ContainsFunc(p.cfg.Phase2, func(x Proposal) bool { return sameAlgorithms(x, proposal) })
	peerSPI := binary.BigEndian.Uint32(sas[0].spi)
	if !ok || !known || proposal.Group != q.group || peerSPI < 256 || sas[0].protocol != protoESP {
		return false
	}
	var shared []byte
	if q.dh != nil {
		if shared, err = q.dh.shared(ke); err != nil {
			return false
		}
	}
	q.iv, q.nr = iv, bytes.Clone(nr)
	q.child = q.newChild(proposal, life, peerSPI, shared)
	p.add(q.child)

	hash3 := prf(s.keys.hash, s.keys.skeyidA, []byte{0}, be32(q.id), q.ni, q.nr)
	msg, _ := s.keys.encryptV1(s.header(exchangeQuick, q.id), []payload{{kind: v1Hash, body: hash3}}, q.iv)
	q.lastRequestHash, q.lastReply = sha256.Sum256(b), msg
	p.send(s.path, msg)
	q.child.replaces = q.replaces
	q.finish()
	return true
}

// receive3 processes message 3.
func (q *quickMode) receive3(hash []byte, via udpPath) {
	s := q.s
	if subtle.ConstantTimeCompare(hash, prf(s.keys.hash, s.keys.skeyidA, []byte{0}, be32(q.id), q.ni, q.nr)) != 1 {
		return
	}
	s.noteAuthentic(via)
	q.lastReply = nil
	q.finish()
}

// finish completes the exchange. It is kept for lingerTime, to answer retransmissions.
func (q *quickMode) finish() {
	q.retransmission.stop()
	q.done, q.s.p.changed = true, true
	q.expireAt = q.s.p.now.Add(lingerTime)
	q.dh = nil
	if q.s == q.s.p.newestV1() {
		q.s.p.renegotiate = false
	}
	if q.initiator && q.s.p.current != nil {
		q.s.p.activateLater(q.child)
	} else {
		q.s.p.activate(q.child)
	}
	q.s.p.rerun = true
}
