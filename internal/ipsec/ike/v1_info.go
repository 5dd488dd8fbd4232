package ike

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"time"
)

// Notify message types of IKEv1 (RFC 2408 section 3.14.1, RFC 2407 section 4.6.3, RFC 3706
// section 5.3).
const (
	notifyInvalidPayload = 1
	notifyNoProposal     = 14
	notifyMalformed      = 16
	notifyInvalidID      = 18
	notifyAuthFailed     = 24
	notifyInitialContact = 24578
	notifyAreYouThere    = 36136
	notifyYesIAm         = 36137
)

// notifyBody returns the body of a Notification payload about the ISAKMP SA.
func (s *v1SA) notifyBody(kind uint16, spi, data []byte) []byte {
	b := append(be32(doiIPsec), protoISAKMP, byte(len(spi)))
	b = binary.BigEndian.AppendUint16(b, kind)
	b = append(b, spi...)
	return append(b, data...)
}

// sendInfo sends an encrypted informational exchange with HASH(1) in front of body (RFC 2409
// section 5.7).
func (s *v1SA) sendInfo(body ...payload) {
	id := s.newMessageID()
	hash := prf(s.keys.hash, s.keys.skeyidA, be32(id), appendPayloads(nil, body))
	msg, _ := s.keys.encryptV1(s.header(exchangeInfo, id), append([]payload{{kind: v1Hash, body: hash}}, body...), s.keys.phase2IV(s.iv, id))
	s.p.send(s.path, msg)
}

func (s *v1SA) sendNotification(kind uint16) {
	s.sendInfo(payload{kind: v1Notification, body: s.notifyBody(kind, s.spi(), nil)})
}

func (s *v1SA) sendDelete(protocol byte, spi []byte) { s.sendInfo(deletePayload(protocol, spi)) }

// deletePayload returns a Delete payload for one SPI (RFC 2408 section 3.15).
func deletePayload(protocol byte, spi []byte) payload {
	b := append(be32(doiIPsec), protocol, byte(len(spi)), 0, 1)
	return payload{kind: v1Delete, body: append(b, spi...)}
}

// sendRUThere sends R-U-THERE (RFC 3706 section 5.4).
func (s *v1SA) sendRUThere() {
	if s.dpdSequence == 0 {
		s.dpdSequence = s.p.random32() >> 1
	}
	s.dpdSequence++
	s.sendInfo(payload{kind: v1Notification, body: s.notifyBody(notifyAreYouThere, s.spi(), be32(s.dpdSequence))})
}

func (s *v1SA) receiveInfo(h header, b []byte, via udpPath) {
	if h.flags&flagEncrypted == 0 || s.state != establishedV1 {
		s.handleUnprotectedNotify(h, b)
		return
	}
	if h.id == 0 || s.idUsed(h.id) {
		return
	}
	ps, plain, _, err := s.keys.decryptV1(h, b, s.keys.phase2IV(s.iv, h.id))
	if err != nil || len(ps) < 2 || ps[0].kind != v1Hash {
		return
	}
	rest := plain[4+len(ps[0].body):]
	if subtle.ConstantTimeCompare(ps[0].body, prf(s.keys.hash, s.keys.skeyidA, be32(h.id), rest)) != 1 {
		return
	}
	s.markIDUsed(h.id)
	s.noteAuthentic(via)
	for _, p := range ps[1:] {
		switch p.kind {
		case v1Notification:
			s.receiveNotification(p.body)
		case v1Delete:
			s.receiveDelete(p.body)
		}
	}
}

// handleUnprotectedNotify processes an unauthenticated notification. It only sets the Problem.
func (s *v1SA) handleUnprotectedNotify(h header, b []byte) {
	if !s.initiator || s.state == establishedV1 {
		return
	}
	kind := -1
	if h.flags&flagEncrypted == 0 {
		ps, _, err := parsePayloads(b[headerLen:], h.next)
		if n := find(ps, v1Notification); err == nil && len(n) >= 8 {
			kind = int(binary.BigEndian.Uint16(n[6:]))
		}
	}
	switch {
	case s.state == sent1 && kind == notifyNoProposal:
		s.p.noteHint(Problem{Kind: NoCommonProposal, Phase: 1, Ours: proposalList(s.p.cfg.Phase1)})
	case s.state == sent5 && (kind < 0 || kind == notifyAuthFailed || kind == notifyMalformed || kind == notifyInvalidPayload || kind == notifyInvalidID || kind == 23):
		s.p.noteHint(Problem{Kind: SecretMismatch, Detail: ", it seems: it cannot decrypt our authentication"})
	case kind >= 0 && kind < 16384:
		s.p.noteHint(Problem{Kind: Refused, Phase: 1, Detail: fmt.Sprintf("notification %d", kind)})
	}
}

func (s *v1SA) receiveNotification(b []byte) {
	if len(b) < 8 {
		return
	}
	p := s.p
	n := int(b[5])
	if len(b) < 8+n {
		return
	}
	kind, spi, data := binary.BigEndian.Uint16(b[6:]), b[8:8+n], b[8+n:]
	switch kind {
	case notifyInitialContact:
		s.initialContact()
	case notifyAreYouThere:
		if bytes.Equal(spi, s.spi()) && len(data) == 4 {
			s.sendInfo(payload{kind: v1Notification, body: s.notifyBody(notifyYesIAm, s.spi(), data)})
		}
	case notifyYesIAm: // already counted as a sign of life
	default:
		if kind >= 16384 { // status types
			return
		}
		for _, id := range sortedIDs(s.quickModes) {
			q := s.quickModes[id]
			if q.done || !q.initiator {
				continue
			}
			problem := Problem{Kind: Refused, Phase: 2, Detail: fmt.Sprintf("notification %d", kind)}
			if kind == notifyNoProposal {
				problem = Problem{Kind: NoCommonProposal, Phase: 2, Ours: s.formatOwnPhase2()}
			}
			p.noteFailure(problem)
			p.nextChild = p.nextStart
			q.remove()
		}
	}
}

// initialContact handles INITIAL-CONTACT: the peer has restarted and has no other SAs. SAs
// established after this one began are kept, since they may be newer than the restart.
func (s *v1SA) initialContact() {
	p := s.p
	p.deletedByPeer(p.childrenBefore(s.startedAt)...)
	for _, old := range append([]*v1SA(nil), p.v1...) {
		if old != s && old.state == establishedV1 && old.established.Before(s.startedAt) {
			p.dropV1(old)
		}
	}
}

func (s *v1SA) receiveDelete(b []byte) {
	if len(b) < 8 {
		return
	}
	p := s.p
	protocol, size, n := b[4], int(b[5]), int(binary.BigEndian.Uint16(b[6:]))
	spis := b[8:]
	if size == 0 || n > maxTransforms || len(spis) < n*size {
		return
	}
	for ; n > 0; n, spis = n-1, spis[size:] {
		spi := spis[:size]
		switch protocol {
		case protoESP:
			if c := p.byOutboundSPI(spi); c != nil && c.v2 == nil {
				p.deletedByPeer(c)
			}
		case protoISAKMP:
			for _, x := range append([]*v1SA(nil), p.v1...) {
				if x.state == establishedV1 && bytes.Equal(spi, x.spi()) {
					p.dropV1(x)
				}
			}
			if p.newestV1() == nil {
				// Peers differ on whether they delete the ESP SAs too.
				p.renegotiate = true
				p.nextStart = later(p.nextStart, p.now.Add(backoffFirst))
			}
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
