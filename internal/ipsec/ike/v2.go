package ike

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"time"
)

// stateV2 is the state of an IKE SA (RFC 7296 section 1.2):
//
//	initiator                                        responder
//	HDR, SAi1, KEi, Ni                       →
//	                                         ←       HDR, SAr1, KEr, Nr
//	HDR, SK{IDi, AUTH, SAi2, TSi, TSr}       →
//	                                         ←       HDR, SK{IDr, AUTH, SAr2, TSi, TSr}
type stateV2 uint8

const (
	sentInit stateV2 = iota + 1
	answeredInit
	sentAuth
	establishedV2
)

// v2SA is an IKE SA, half-open or established.
type v2SA struct {
	p          *Peer
	initiator  bool // we are the original initiator: our messages carry the Initiator flag
	state      stateV2
	spiI, spiR ikeSPI
	path       udpPath
	startedAt  time.Time
	expireAt   time.Time

	proposal                  Proposal
	group                     Group // of our KE payload
	dh                        *dhKey
	ni, nr                    []byte
	initRequest, initResponse []byte // of IKE_SA_INIT, covered by AUTH
	cookie                    []byte
	initRetries               int
	keys                      *v2Keys
	nat                       nat
	canFragment               bool // the peer supports fragmentation (RFC 7383)

	spi               uint32    // inbound, of the first Child SA
	requestedAt       time.Time // when IKE_AUTH was sent
	firstChild        *Child    // responder only: awaits confirmation
	confirmAt         time.Time // when to probe whether the peer got our IKE_AUTH response
	sendID            uint32    // message ID of our next request
	recvID            uint32    // message ID of the peer's next request
	lastRequestID     uint32
	lastResponse      [][]byte // to request lastRequestID, as datagrams
	pending           *requestV2
	queue             []*requestV2
	requestFragments  reassembly // of the peer's next request
	responseFragments reassembly // of the response to pending

	retransmission
	established time.Time
	rekeyAt     time.Time
	replaced    bool
	rekeying    bool
	keepaliveAt time.Time
	probing     bool
	deadAt      time.Time // when the peer is dead unless the probe is answered
}

func (p *Peer) receiveV2(h header, b []byte, via udpPath) {
	if p.cfg.Mode == Main {
		return
	}
	for _, s := range p.v2 {
		if s.spiI != h.initiator {
			continue
		}
		known := s.spiR == h.responder
		switch {
		case s.initiator && s.state == sentInit && h.flags&flagResponse != 0: // the responder's SPI arrives now, or a COOKIE without one
		case !s.initiator && s.state == answeredInit && h.responder == ikeSPI{} && h.exchange == exchangeInit:
		case !known:
			continue
		}
		if s.initiator == (h.flags&flagInitiator != 0) {
			return // our own message, reflected
		}
		s.receive(h, b, via)
		return
	}
	if h.isFirst() {
		p.respondInit(h, b, via)
	}
}

func (s *v2SA) receive(h header, b []byte, via udpPath) {
	if h.exchange == exchangeInit {
		switch {
		case s.state == sentInit && h.id == 0 && h.flags&flagResponse != 0:
			s.receiveInit(h, b, via)
		case s.state == answeredInit && bytes.Equal(b, s.initRequest) && s.p.cfg.Limits.allowCheapReply(s.p.now): // anybody can repeat it
			s.p.sendUnverified(via, s.initResponse)
		}
		return
	}
	response := h.flags&flagResponse != 0
	if s.keys == nil || response && (s.pending == nil || h.id != s.sendID-1) {
		return
	}
	if !response && s.state == sentAuth {
		return // the IKE_AUTH response is missing
	}
	if !response && h.id != s.recvID && (s.lastResponse == nil || h.id != s.lastRequestID) {
		return
	}
	fresh := response || h.id == s.recvID
	ps, incomplete, err := s.open(h, b, fresh)
	if err != nil {
		if s.state == answeredInit || s.state == sentAuth {
			s.p.noteHint(Problem{Kind: Refused, Phase: 1, Detail: "its messages cannot be decrypted"})
		}
		return
	}
	if incomplete {
		return // more fragments to come
	}
	if !fresh {
		s.resendResponse(via)
		return
	}
	if s.state == establishedV2 {
		s.noteAuthentic(via)
	}
	if response {
		r := s.pending
		s.pending, s.p.changed = nil, true
		s.retransmission.stop()
		s.receiveResponse(r, ps)
		s.p.rerun = true
		return
	}
	s.recvID++
	s.lastRequestID, s.lastResponse = h.id, nil
	s.confirmChildren()
	s.handleRequest(h, ps, via)
	s.p.rerun = true
}

// confirmChildren activates the Child SAs that the peer requested: its next request shows that
// our responses to the earlier ones arrived (RFC 7296 sections 2.3 and 2.8).
func (s *v2SA) confirmChildren() {
	for _, c := range append([]*Child(nil), s.p.children...) {
		if c.v2 == s {
			s.p.activate(c)
		}
	}
}

func (s *v2SA) resendResponse(via udpPath) {
	for _, m := range s.lastResponse {
		s.p.send(via, m)
	}
}

func (s *v2SA) header(exchangeType uint8, id uint32, response bool) header {
	h := header{initiator: s.spiI, responder: s.spiR, version: version2, exchange: exchangeType, id: id}
	if s.initiator {
		h.flags |= flagInitiator
	}
	if response {
		h.flags |= flagResponse
	}
	return h
}

// respond sends the response to request h, and keeps it for retransmissions.
func (s *v2SA) respond(h header, ps []payload) {
	s.lastResponse = s.seal(s.header(h.exchange, h.id, true), ps)
	s.resendResponse(s.path)
}

// enqueue sends a request once those before it have been answered.
func (s *v2SA) enqueue(r *requestV2) {
	s.queue = append(s.queue, r)
	s.p.rerun, s.p.changed = true, true
}

// noteAuthentic records that the peer is alive and, behind a NAT, its present port (RFC 7296
// section 2.23). Call it for fresh messages only: anyone can replay an old one, from any port.
func (s *v2SA) noteAuthentic(via udpPath) {
	s.p.lastReceived, s.probing, s.deadAt = s.p.now, false, time.Time{}
	s.p.changed = true
	if s.nat.tracksPeerPort() && via != s.path && via.local == s.path.local {
		s.path = via
		for _, c := range s.p.children {
			if c.v2 == s && c.Outbound.DestinationPort != 0 {
				s.p.setPorts(c, via)
			}
		}
	}
}

func notifyV2(kind uint16, data []byte) payload {
	return payload{kind: v2Notify, body: append([]byte{0, 0, byte(kind >> 8), byte(kind)}, data...)}
}

// eachNotify calls f for each well-formed Notify payload.
func eachNotify(ps []payload, f func(kind uint16, spi, data []byte)) {
	for _, p := range ps {
		if p.kind != v2Notify || len(p.body) < 4 || len(p.body) < 4+int(p.body[1]) {
			continue
		}
		n := 4 + int(p.body[1])
		f(binary.BigEndian.Uint16(p.body[2:]), p.body[4:n], p.body[n:])
	}
}

// errorNotify returns the type of the first error notification, or 0.
func errorNotify(ps []payload) (found uint16) {
	eachNotify(ps, func(kind uint16, _, _ []byte) {
		if found == 0 && kind < 16384 {
			found = kind
		}
	})
	return found
}

func hasNotify(ps []payload, want uint16) (ok bool) {
	eachNotify(ps, func(kind uint16, _, _ []byte) { ok = ok || kind == want })
	return ok
}

// unsupportedCritical reports whether there is an unknown payload with the critical flag (RFC
// 7296 section 2.5).
func unsupportedCritical(ps []payload) (payloadType, bool) {
	for _, p := range ps {
		if p.critical && (p.kind < v2SecurityAssociation || p.kind > 48) && p.kind != v2Fragment {
			return p.kind, true
		}
	}
	return 0, false
}

func (p *Peer) newestV2() *v2SA {
	var newest *v2SA
	for _, s := range p.v2 {
		if s.state == establishedV2 && !s.replaced && (newest == nil || s.established.After(newest.established)) {
			newest = s
		}
	}
	return newest
}

func (p *Peer) initiatingV2() bool {
	for _, s := range p.v2 {
		if s.initiator && (s.state == sentInit || s.state == sentAuth) {
			return true
		}
	}
	return false
}

// dropV2 drops an IKE SA, and calls retire with its Child SAs.
func (p *Peer) dropV2(s *v2SA, retire func(...*Child)) {
	for i, x := range p.v2 {
		if x == s {
			p.v2 = append(p.v2[:i:i], p.v2[i+1:]...)
			p.rerun, p.changed = true, true
			break
		}
	}
	var all []*Child
	for _, c := range p.children {
		if c.v2 == s {
			all = append(all, c)
		}
	}
	retire(all...)
	s.retransmission.stop()
	s.pending, s.queue = nil, nil
}

func (p *Peer) closeV2() {
	for _, s := range p.v2 {
		if s.state == establishedV2 {
			ps := []payload{{kind: v2Delete, body: []byte{v2ProtocolIKE, 0, 0, 0}}}
			for _, m := range s.seal(s.header(exchangeInformational, s.sendID, false), ps) {
				p.send(s.path, m)
			}
		}
	}
}

func (p *Peer) stepV2() {
	for _, s := range append([]*v2SA(nil), p.v2...) {
		s.step()
	}
}

func (s *v2SA) step() {
	p := s.p
	if !s.retransmission.step(p, s.path) {
		switch s.state {
		case sentInit:
			p.tryMain = p.cfg.Mode == Auto
			p.noteFailure(Problem{Kind: NoAnswer})
		case sentAuth:
			p.noteFailure(Problem{Kind: NoAnswer, Detail: " to our authentication"})
		default:
			p.noteFailure(Problem{Kind: NoAnswer, Detail: " any more"})
		}
		p.dropV2(s, p.retireUnanswered)
		return
	}
	if p.due(s.expireAt) {
		p.dropV2(s, p.retireUnanswered)
		return
	}
	if s.state != establishedV2 {
		return
	}
	if p.due(s.keepaliveAt) {
		s.keepaliveAt = p.now.Add(keepaliveTime)
		p.actions = append(p.actions, Send{LocalPort: s.path.local, To: s.path.remote, Payload: []byte{0xff}, Keepalive: true})
	}
	if p.cfg.DPDInterval > 0 && !s.probing {
		lastReceived := p.lastReceived
		if lastReceived.Before(s.established) {
			lastReceived = s.established
		}
		if p.due(lastReceived.Add(p.cfg.DPDInterval)) {
			p.changed = true
			s.probing, s.deadAt = true, p.now.Add(time.Duration(max(1, p.cfg.DPDRetries))*p.cfg.DPDInterval)
			if s.pending == nil && len(s.queue) == 0 { // the pending request is a probe too
				s.ping()
			}
		}
	}
	if p.due(s.confirmAt) {
		// A peer that has not got our IKE_AUTH response answers nothing.
		s.confirmAt, p.changed = time.Time{}, true
		if c := s.firstChild; !c.active {
			s.enqueue(&requestV2{kind: requestPing, spi: c.Inbound.SPI})
		}
	}
	if s.probing && p.due(s.deadAt) {
		p.changed = true
		if s.deadAt.Sub(p.lastReceived) < p.cfg.DPDInterval { // ESP has arrived meanwhile
			s.deadAt = p.lastReceived.Add(time.Duration(1+max(1, p.cfg.DPDRetries)) * p.cfg.DPDInterval)
		} else {
			p.dropV2(s, p.retireUnanswered)
			p.noteFailure(Problem{Kind: NoAnswer, Detail: " any more"})
			return
		}
	}
	if s.pending == nil && len(s.queue) > 0 {
		r := s.queue[0]
		s.queue, p.changed = s.queue[1:], true
		if ps, ok := s.buildRequest(r); ok {
			s.transmit(r, ps)
		}
		p.rerun = true
	}
}

func (s *v2SA) transmit(r *requestV2, ps []payload) {
	s.pending = r
	s.p.transmit(&s.retransmission, s.path, s.seal(s.header(r.exchange(), s.sendID, false), ps)...)
	s.sendID++
}

func (s *v2SA) natPayloads(spiR ikeSPI) []payload {
	local := netip.AddrPortFrom(s.p.cfg.Local, s.path.local)
	if s.p.cfg.ForceUDP {
		local = netip.AddrPortFrom(netip.AddrFrom4([4]byte{}), 0) // never matches, so that both ends use UDP encapsulation
	}
	return []payload{
		notifyV2(n2NATSource, natHashV2(s.spiI, spiR, local)),
		notifyV2(n2NATDestination, natHashV2(s.spiI, spiR, s.path.remote)),
	}
}

// discoverNAT compares the peer's NAT_DETECTION hashes with the addresses we see. spiR is the
// responder's SPI in these hashes: zero in the IKE_SA_INIT request.
func (s *v2SA) discoverNAT(ps []payload, spiR ikeSPI, via udpPath) {
	source, destination, any := false, false, false
	eachNotify(ps, func(kind uint16, _, data []byte) {
		switch kind {
		case n2NATSource:
			any = true
			source = source || bytes.Equal(data, natHashV2(s.spiI, spiR, via.remote))
		case n2NATDestination:
			destination = destination || bytes.Equal(data, natHashV2(s.spiI, spiR, netip.AddrPortFrom(s.p.cfg.Local, via.local)))
		}
	})
	if !any {
		return
	}
	s.nat = nat{local: !destination, remote: !source, forced: s.p.cfg.ForceUDP}
}
