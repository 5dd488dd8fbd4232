package ike

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"time"
)

// stateV1 is the state of main mode, named after the messages sent. Each end sends three:
//
//	initiator                               responder
//	HDR, SA                     → 1
//	                            2 ←         HDR, SA
//	HDR, KE, Ni, NAT-D          → 3
//	                            4 ←         HDR, KE, Nr, NAT-D
//	HDR*, IDii, HASH_I          → 5
//	                            6 ←         HDR*, IDir, HASH_R
type stateV1 uint8

const (
	sent1 stateV1 = iota + 1
	sent2
	sent3
	sent4
	sent5
	establishedV1
)

// v1SA is an ISAKMP SA, half-open or established.
type v1SA struct {
	p          *Peer
	initiator  bool
	state      stateV1
	ckyI, ckyR ikeSPI
	path       udpPath
	startedAt  time.Time
	expireAt   time.Time // end of the half-open state, then of the SA

	saI          []byte // body of the initiator's SA payload, covered by HASH_I and HASH_R
	proposal     Proposal
	lifetime     time.Duration
	dh           *dhKey
	peerKE       []byte
	ni, nr       []byte
	natT         bool // the peer supports NAT traversal (RFC 3947)
	nat          nat
	peerDPD      bool
	keys         *v1Keys
	iv           []byte // of the next phase 1 message; in the end, input to phase2IV
	authFailures int

	retransmission
	lastRequestHash [32]byte // SHA-256 of the message that lastReply answered
	lastReply       []byte

	established time.Time
	rekeyAt     time.Time
	replacedAt  time.Time
	keepaliveAt time.Time
	quickModes  map[uint32]*quickMode
	usedIDs     map[uint32]struct{} // by either end
	dpd         dpd
	dpdSequence uint32
}

// Vendor IDs: MD5 of "RFC 3947", and that of RFC 3706 section 5.1.
var (
	vendorNATT = []byte{0x4a, 0x13, 0x1c, 0x81, 0x07, 0x03, 0x58, 0x45, 0x5c, 0x57, 0x28, 0xf2, 0x0e, 0x95, 0x45, 0x2f}
	vendorDPD  = []byte{0xaf, 0xca, 0xd7, 0x13, 0x68, 0xa1, 0xf1, 0xc9, 0x6b, 0x86, 0x96, 0xfc, 0x77, 0x57, 0x01, 0x00}
)

func (p *Peer) receiveV1(h header, b []byte, via udpPath) {
	if p.cfg.Mode == IKE2 {
		return
	}
	for _, s := range p.v1 {
		if s.ckyI != h.initiator {
			continue
		}
		if h.responder == (ikeSPI{}) && (!s.initiator || h.exchange == exchangeMain) {
			return // our own message 1, reflected; or the peer's, delayed
		}
		// Before message 2 an initiator does not know the responder's cookie.
		if s.ckyR != h.responder && !(s.initiator && s.state == sent1) {
			continue
		}
		s.receive(h, b, via)
		return
	}
	if s := p.findUnverified(h); s != nil {
		s.receive(h, b, via)
		return
	}
	if h.isFirst() {
		p.respondV1(h, b, via)
	}
}

func (s *v1SA) receive(h header, b []byte, via udpPath) {
	if sha := sha256.Sum256(b); s.lastReply != nil && sha == s.lastRequestHash {
		// A retransmission: our reply was lost. Message 1 can be repeated by anybody.
		if s.state != sent2 || s.p.cfg.Limits.allowCheapReply(s.p.now) {
			s.sendReply(via)
		}
		return
	}
	switch {
	case h.exchange == exchangeMain && s.state != establishedV1:
		s.receiveMain(h, b, via)
	case h.exchange == exchangeQuick && s.state == establishedV1 && h.id != 0:
		s.receiveQuick(h, b, via)
	case h.exchange == exchangeInfo:
		s.receiveInfo(h, b, via)
	}
}

func (s *v1SA) header(exchangeType uint8, id uint32) header {
	return header{initiator: s.ckyI, responder: s.ckyR, version: version1, exchange: exchangeType, id: id}
}

// request sends a message, with retransmission until there is a reply.
func (s *v1SA) request(b []byte) { s.p.transmit(&s.retransmission, s.path, b) }

// reply sends the reply to request, and keeps it for retransmissions of the request.
func (s *v1SA) reply(request, b []byte) {
	s.lastRequestHash, s.lastReply = sha256.Sum256(request), b
	s.sendReply(s.path)
}

func (s *v1SA) sendReply(to udpPath) {
	if s.state == sent2 {
		s.p.sendUnverified(to, s.lastReply)
	} else {
		s.p.send(to, s.lastReply)
	}
}

// noteAuthentic records that the peer is alive and, behind a NAT, its present port. Call it only
// for message IDs not used before: anyone can replay an old message.
func (s *v1SA) noteAuthentic(via udpPath) {
	s.p.lastReceived, s.p.changed = s.p.now, true
	s.dpd.probes = 0
	s.dpd.nextProbe = time.Time{}
	if s.nat.tracksPeerPort() && via != s.path && via.local == s.path.local {
		s.path = via
		for _, c := range s.p.children {
			if c.v2 == nil && c.Outbound.DestinationPort != 0 {
				s.p.setPorts(c, via)
			}
		}
	}
}

// spi returns both cookies, which name the SA in Delete and Notification payloads.
func (s *v1SA) spi() []byte { return append(append([]byte(nil), s.ckyI[:]...), s.ckyR[:]...) }

// maxMessageIDs is how many message IDs may be used before the SA is rekeyed: two days of DPD
// every 8 s. During the rekey as many again are accepted, then none. None is forgotten, as its
// message could then be replayed.
const maxMessageIDs = 1 << 16

// idUsed reports whether a message ID must not be accepted: used before, or beyond the limit.
func (s *v1SA) idUsed(id uint32) bool {
	_, ok := s.usedIDs[id]
	return ok || len(s.usedIDs) >= 2*maxMessageIDs
}

func (s *v1SA) markIDUsed(id uint32) {
	if s.usedIDs == nil {
		s.usedIDs = make(map[uint32]struct{})
	}
	s.usedIDs[id] = struct{}{}
	s.p.changed = true
	if len(s.usedIDs) == maxMessageIDs {
		s.rekeyAt = earlier(s.rekeyAt, s.p.now)
		s.p.rerun = true
	}
}

// newMessageID returns an unused message ID for an exchange of ours, marked as used.
func (s *v1SA) newMessageID() uint32 {
	for {
		id := s.p.random32()
		if _, ok := s.usedIDs[id]; !ok {
			s.markIDUsed(id)
			return id
		}
	}
}

func (p *Peer) newestV1() *v1SA {
	var newest *v1SA
	for _, s := range p.v1 {
		if s.state == establishedV1 && (newest == nil || s.established.After(newest.established)) {
			newest = s
		}
	}
	return newest
}

func (p *Peer) initiatingV1() bool {
	for _, s := range p.v1 {
		if s.state != establishedV1 && s.initiator {
			return true
		}
	}
	return false
}

// quickInProgress reports whether a quick mode is under way. One of the peer's no longer counts
// after fallbackRekeyAt of the current SA.
func (p *Peer) quickInProgress() bool {
	for _, s := range p.v1 {
		for _, q := range s.quickModes {
			if !q.done && (q.initiator || p.current == nil || !p.past(p.current.fallbackRekeyAt())) {
				return true
			}
		}
	}
	return false
}

// finishQuickMode ends the quick mode that c was negotiated in, if that still waits for message
// 3.
func (p *Peer) finishQuickMode(c *Child) {
	for _, s := range p.v1 {
		for _, q := range s.quickModes {
			if q.child == c && !q.done {
				q.lastReply = nil
				q.finish()
			}
		}
	}
}

func (p *Peer) dropV1(s *v1SA) {
	for i, x := range p.v1 {
		if x == s {
			p.v1 = append(p.v1[:i:i], p.v1[i+1:]...)
			p.rerun, p.changed = true, true
			break
		}
	}
	for _, q := range s.quickModes {
		q.cancel()
	}
}

// closeV1 sends one message with a Delete payload for each SA: a peer that processed the ISAKMP
// SA's alone could no longer read the others.
func (p *Peer) closeV1() {
	var all []payload
	for _, c := range p.children {
		if c.v2 == nil {
			all = append(all, deletePayload(protoESP, be32(c.Inbound.SPI)))
		}
	}
	for _, s := range p.v1 {
		if s.state == establishedV1 {
			s.sendInfo(append(all, deletePayload(protoISAKMP, s.spi()))...)
			all = nil
		}
	}
}

func (p *Peer) stepV1() {
	for _, s := range append([]*v1SA(nil), p.v1...) {
		s.step()
	}
}

func (s *v1SA) step() {
	p := s.p
	if !s.retransmission.step(p, s.path) {
		p.dropV1(s)
		problem := Problem{Kind: NoAnswer}
		if s.state == sent5 {
			problem = Problem{Kind: SecretMismatch, Detail: ", it seems: it does not answer to our authentication"}
		}
		p.tryMain = false // in Auto mode, try IKEv2 again
		p.noteFailure(problem)
		return
	}
	if p.due(s.expireAt) {
		if s.state == establishedV1 {
			s.sendDelete(protoISAKMP, s.spi())
		}
		p.dropV1(s)
		return
	}
	if s.state != establishedV1 {
		return
	}
	if p.due(s.replacedAt) {
		if s.inUse() {
			s.replacedAt, p.changed = p.now.Add(overlapTime), true
			return
		}
		s.sendDelete(protoISAKMP, s.spi())
		p.dropV1(s)
		return
	}
	if p.due(s.keepaliveAt) {
		s.keepaliveAt = p.now.Add(keepaliveTime)
		p.actions = append(p.actions, Send{LocalPort: s.path.local, To: s.path.remote, Payload: []byte{0xff}, Keepalive: true})
	}
	for _, id := range sortedIDs(s.quickModes) {
		s.quickModes[id].step()
	}
	if s.peerDPD && s == p.newestV1() && s.dpd.step(p, s.established, s.sendRUThere) {
		p.dropV1(s)
		p.retireUnanswered(p.children...)
		p.noteFailure(Problem{Kind: NoAnswer, Detail: " any more"})
	}
}

// inUse reports whether deleting this SA would lose packets, as peers may delete the ESP SAs
// negotiated under it too. If the current one is among these, it requests a new one.
func (s *v1SA) inUse() bool {
	for _, q := range s.quickModes {
		// The peer may have to retransmit, and need message 3 or our reply again.
		if !q.done || q.initiator && q.child.removeAt.IsZero() && !q.child.peerSends {
			return true
		}
	}
	for _, c := range s.p.children {
		if c.v1 != s {
			continue
		}
		if c == s.p.current {
			s.p.renegotiate = true
			return true
		}
		if !c.deleteAt.IsZero() || !c.removeAt.IsZero() || !c.activateAt.IsZero() {
			return true
		}
	}
	return false
}

// natHash returns HASH(CKY-I | CKY-R | IP | port) (RFC 3947 section 3.2).
func (s *v1SA) natHash(at netip.AddrPort) []byte {
	ip := at.Addr().As4()
	return digest(s.proposal.Hash, s.ckyI[:], s.ckyR[:], ip[:], binary.BigEndian.AppendUint16(nil, at.Port()))
}

// natPayloads returns the NAT-D payloads: the peer's address first, then ours (RFC 3947 section
// 3.2).
func (s *v1SA) natPayloads() []payload {
	local := netip.AddrPortFrom(s.p.cfg.Local, s.path.local)
	if s.p.cfg.ForceUDP {
		local = netip.AddrPortFrom(netip.AddrFrom4([4]byte{}), 0) // never matches, so that both ends use UDP encapsulation
	}
	return []payload{{kind: v1NATDiscovery, body: s.natHash(s.path.remote)}, {kind: v1NATDiscovery, body: s.natHash(local)}}
}

// discoverNAT compares the peer's NAT-D payloads with the addresses we see.
func (s *v1SA) discoverNAT(ps []payload, via udpPath) {
	var hashes [][]byte
	for _, p := range ps {
		if p.kind == v1NATDiscovery {
			hashes = append(hashes, p.body)
		}
	}
	if !s.natT || len(hashes) < 2 {
		return
	}
	s.nat = nat{local: !bytes.Equal(hashes[0], s.natHash(netip.AddrPortFrom(s.p.cfg.Local, via.local))), remote: true, forced: s.p.cfg.ForceUDP}
	for _, h := range hashes[1:] {
		if bytes.Equal(h, s.natHash(via.remote)) {
			s.nat.remote = false
		}
	}
}
