package ike

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"slices"
	"time"

	"ipipd/internal/ipsec/esp"
)

// Changed reports whether Save would return something else than the last time, or than what the Peer was made of.
func (p *Peer) Changed() bool { return p.changed }

// Save returns the state, keys included, from which RestorePeer makes a Peer that continues this one; nil if there is
// no SA. boot is the time at which CLOCK_BOOTTIME was 0. The caller saves before it carries out the Actions, so that
// the saved state is never older than what the peer has seen.
func (p *Peer) Save(boot time.Time) []byte {
	p.changed = false
	e := saver{p, boot}
	state := peerState{Identity: p.cfg.Remembered.id, Current: e.index(p.current), Renegotiate: p.renegotiate}
	for _, s := range p.v1 {
		if s.state == establishedV1 {
			state.V1 = append(state.V1, e.v1(s))
		}
	}
	for _, s := range p.v2 {
		if s.state == establishedV2 {
			state.V2 = append(state.V2, e.v2(s))
		}
	}
	for _, c := range p.children {
		state.Children = append(state.Children, e.child(c))
	}
	if state.V1 == nil && state.V2 == nil && state.Children == nil {
		return nil
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(&state); err != nil {
		panic("ike: " + err.Error()) // the types are ours
	}
	return b.Bytes()
}

type saver struct {
	p    *Peer
	boot time.Time
}

func (e saver) time(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(1, int64(t.Sub(e.boot)))
}

func (e saver) index(c *Child) int {
	if c == nil {
		return 0
	}
	return slices.Index(e.p.children, c) + 1
}

func (e saver) established1() (all []*v1SA) {
	for _, s := range e.p.v1 {
		if s.state == establishedV1 {
			all = append(all, s)
		}
	}
	return all
}

func (e saver) established2() (all []*v2SA) {
	for _, s := range e.p.v2 {
		if s.state == establishedV2 {
			all = append(all, s)
		}
	}
	return all
}

func savePath(at udpPath) pathState { return pathState{at.local, at.remote} }
func saveNAT(n nat) natState        { return natState{n.local, n.remote, n.forced} }
func saveESP(c esp.Config) espState {
	return espState{c.SPI, c.Suite, c.Keys.Encryption, c.Keys.Integrity, c.ESN, c.SourcePort, c.DestinationPort}
}

func (e saver) retransmission(r *retransmission) (state retransmissionState) {
	if !r.nextAt.IsZero() {
		state = retransmissionState{r.messages, r.tries, e.time(r.nextAt)}
	}
	return state
}

func saveDH(k *dhKey) (state dhState) {
	switch {
	case k == nil:
	case k.private != nil:
		state = dhState{k.group, k.private.Bytes()}
	default:
		state = dhState{k.group, k.exponent}
	}
	return state
}

func (e saver) child(c *Child) childState {
	state := childState{
		Inbound: saveESP(c.Inbound), Outbound: saveESP(c.Outbound), Version: c.Version, IKE: c.IKE, Group: c.Group,
		Established: e.time(c.Established), RekeyAt: e.time(c.RekeyAt), ExpireAt: e.time(c.ExpireAt),
		Active: c.active, ActivateAt: e.time(c.activateAt), PeerSends: c.peerSends, Replaces: e.index(c.replaces),
		Rekeying: c.rekeying, ReceiveUntil: e.time(c.receiveUntil), RemoveAt: e.time(c.removeAt),
		Deleting: c.deleting, DeleteAt: e.time(c.deleteAt),
	}
	if c.v1 != nil {
		state.V1 = slices.Index(e.established1(), c.v1) + 1
	}
	if c.v2 != nil {
		state.V2 = slices.Index(e.established2(), c.v2) + 1
	}
	return state
}

func (e saver) v1(s *v1SA) v1State {
	k := s.keys
	state := v1State{
		Initiator: s.initiator, CkyI: s.ckyI, CkyR: s.ckyR, Path: savePath(s.path), StartedAt: e.time(s.startedAt), ExpireAt: e.time(s.expireAt),
		Proposal: s.proposal, Nat: saveNAT(s.nat), PeerDPD: s.peerDPD, Keys: v1KeysState{k.skeyid, k.skeyidD, k.skeyidA, k.key, k.phase1IV},
		IV: s.iv, LastRequestHash: s.lastRequestHash, LastReply: s.lastReply,
		Established: e.time(s.established), RekeyAt: e.time(s.rekeyAt), ReplacedAt: e.time(s.replacedAt), Keepalive: !s.keepaliveAt.IsZero(),
		DPDSequence: s.dpdSequence,
	}
	for _, id := range sortedIDs(s.quickModes) {
		if q := s.quickModes[id]; !q.done && q.initiator || e.index(q.child) != 0 { // else its SA has been removed
			state.QuickModes = append(state.QuickModes, e.quick(q))
		}
	}
	ids := make([]uint32, 0, len(s.usedIDs))
	for id := range s.usedIDs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	state.UsedIDs = make([]byte, 0, 4*len(ids))
	for _, id := range ids {
		state.UsedIDs = binary.BigEndian.AppendUint32(state.UsedIDs, id)
	}
	return state
}

func (e saver) quick(q *quickMode) quickState {
	return quickState{
		ID: q.id, Initiator: q.initiator, IV: q.iv, Ni: q.ni, Nr: q.nr, DH: saveDH(q.dh), Group: q.group, SPI: q.spi,
		Replaces: e.index(q.replaces), Child: e.index(q.child), Done: q.done, ExpireAt: e.time(q.expireAt), StartedAt: e.time(q.startedAt),
		Retransmission: e.retransmission(&q.retransmission), LastRequestHash: q.lastRequestHash, LastReply: q.lastReply,
	}
}

func (e saver) v2(s *v2SA) v2State {
	state := v2State{
		Initiator: s.initiator, SPII: s.spiI, SPIR: s.spiR, Path: savePath(s.path), StartedAt: e.time(s.startedAt), ExpireAt: e.time(s.expireAt),
		Proposal: s.proposal, Group: s.group, Nat: saveNAT(s.nat), CanFragment: s.canFragment, Material: s.keys.material, Counter: s.keys.send.counter,
		FirstChild: e.index(s.firstChild), ConfirmAt: e.time(s.confirmAt),
		SendID: s.sendID, RecvID: s.recvID, LastRequestID: s.lastRequestID, LastResponse: s.lastResponse,
		Retransmission: e.retransmission(&s.retransmission), Established: e.time(s.established), RekeyAt: e.time(s.rekeyAt),
		Replaced: s.replaced, Rekeying: s.rekeying, Keepalive: !s.keepaliveAt.IsZero(), Probing: s.probing, DeadAt: e.time(s.deadAt),
	}
	if state.FirstChild == 0 {
		state.ConfirmAt = 0
	}
	if s.pending != nil {
		pending := e.request(s.pending)
		state.Pending = &pending
	}
	for _, r := range s.queue {
		state.Queue = append(state.Queue, e.request(r))
	}
	return state
}

func (e saver) request(r *requestV2) requestState {
	state := requestState{Kind: r.kind, SPI: r.spi}
	if c := r.child; c != nil {
		state.Child = &childRequestState{e.index(c.old), c.groups, c.retries, c.spi, c.ni, saveDH(c.dh), e.time(c.requestedAt)}
	}
	if r.rekey != nil {
		n := r.rekey.next
		state.Rekey = &rekeyState{n.spiI, n.ni, saveDH(n.dh), n.group, e.time(n.startedAt)}
	}
	return state
}
