package ike

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"slices"
	"time"

	"ipipd/internal/ipsec/esp"
)

// RestorePeer makes a Peer of what Save has returned in another process, for the same Config. boot is the time at
// which CLOCK_BOOTTIME was 0. The caller installs the SAs: Children and Current.
func RestorePeer(cfg Config, now, boot time.Time, saved []byte) (*Peer, error) {
	p, err := NewPeer(cfg, now)
	if err != nil {
		return nil, err
	}
	var state peerState
	if err := gob.NewDecoder(bytes.NewReader(saved)).Decode(&state); err != nil {
		return nil, err
	}
	e := restorer{p, boot}
	if err := e.peer(&state); err != nil {
		return nil, err
	}
	return p, nil
}

// Children returns the SAs, the newest last.
func (p *Peer) Children() []*Child { return slices.Clone(p.children) }

type restorer struct {
	p    *Peer
	boot time.Time
}

var errState = errors.New("ike: the state is damaged")

func (e restorer) peer(state *peerState) error {
	p := e.p
	if p.cfg.Remembered.id == nil {
		p.cfg.Remembered.id = state.Identity
	}
	p.renegotiate = state.Renegotiate
	for i := range state.Children {
		p.children = append(p.children, e.child(&state.Children[i]))
	}
	for i := range state.V1 {
		s, err := e.v1(&state.V1[i])
		if err != nil {
			return err
		}
		p.v1 = append(p.v1, s)
	}
	for i := range state.V2 {
		s, err := e.v2(&state.V2[i])
		if err != nil {
			return err
		}
		p.v2 = append(p.v2, s)
	}
	gone := &v2SA{p: p} // for Child SAs whose IKE SA has ended: it sends nothing
	for i, c := range p.children {
		of := &state.Children[i]
		c.replaces = e.at(of.Replaces)
		if n := of.V1; n > 0 && n <= len(p.v1) {
			c.v1 = p.v1[n-1]
		}
		if n := of.V2; n > 0 && n <= len(p.v2) {
			c.v2 = p.v2[n-1]
		} else if c.Version == 2 {
			c.v2 = gone
		}
	}
	p.current = e.at(state.Current)
	return nil
}

func (e restorer) time(at int64) time.Time {
	if at == 0 {
		return time.Time{}
	}
	return e.boot.Add(time.Duration(at))
}

func (e restorer) at(index int) *Child {
	if index < 1 || index > len(e.p.children) {
		return nil
	}
	return e.p.children[index-1]
}

func (e restorer) keepalive(wanted bool) (at time.Time) {
	if wanted {
		at = e.p.now // the NAT's mapping may be about to end
	}
	return at
}

func restorePath(at pathState) udpPath { return udpPath{at.Local, at.Remote} }
func restoreNAT(n natState) nat        { return nat{n.Local, n.Remote, n.Forced} }
func restoreESP(c espState) esp.Config {
	return esp.Config{
		SPI: c.SPI, Suite: c.Suite, Keys: esp.Keys{Encryption: c.Encryption, Integrity: c.Integrity}, ESN: c.ESN, Protocol: protocolIPIP,
		SourcePort: c.Source, DestinationPort: c.Destination,
	}
}

func (e restorer) retransmission(r retransmissionState) retransmission {
	return retransmission{r.Messages, r.Tries, e.time(r.NextAt)}
}

func restoreDH(state dhState) (*dhKey, error) {
	if state.Group == 0 {
		return nil, nil
	}
	r := state.Group.rank()
	if r == 0 {
		return nil, errState
	}
	k := &dhKey{group: state.Group}
	if curve := groups[r-1].curve; curve != nil {
		var err error
		if k.private, err = curve().NewPrivateKey(state.Private); err != nil {
			return nil, errState
		}
		k.public = publicOf(k.private, state.Group)
		return k, nil
	}
	k.exponent = state.Private
	k.public = powerOfTwo(k.exponent, state.Group)
	return k, nil
}

func (e restorer) child(state *childState) *Child {
	return &Child{
		Inbound: restoreESP(state.Inbound), Outbound: restoreESP(state.Outbound), Version: state.Version, IKE: state.IKE, Group: state.Group,
		Established: e.time(state.Established), RekeyAt: e.time(state.RekeyAt), ExpireAt: e.time(state.ExpireAt),
		active: state.Active, activateAt: e.time(state.ActivateAt), peerSends: state.PeerSends, rekeying: state.Rekeying,
		receiveUntil: e.time(state.ReceiveUntil), removeAt: e.time(state.RemoveAt), deleting: state.Deleting, deleteAt: e.time(state.DeleteAt),
	}
}

func (e restorer) v1(state *v1State) (*v1SA, error) {
	k := state.Keys
	block, err := newBlock(state.Proposal, k.Key)
	if err != nil || len(k.Phase1IV) != block.BlockSize() || len(state.UsedIDs)%4 != 0 || !state.Path.Remote.IsValid() {
		return nil, errState
	}
	s := &v1SA{
		p: e.p, state: establishedV1, initiator: state.Initiator, ckyI: state.CkyI, ckyR: state.CkyR, path: restorePath(state.Path),
		startedAt: e.time(state.StartedAt), expireAt: e.time(state.ExpireAt), proposal: state.Proposal, nat: restoreNAT(state.Nat), peerDPD: state.PeerDPD,
		keys: &v1Keys{hash: state.Proposal.Hash, skeyid: k.SKEYID, skeyidD: k.SKEYIDd, skeyidA: k.SKEYIDa, key: k.Key, block: block, phase1IV: k.Phase1IV},
		iv:   state.IV, lastRequestHash: state.LastRequestHash, lastReply: state.LastReply,
		established: e.time(state.Established), rekeyAt: e.time(state.RekeyAt), replacedAt: e.time(state.ReplacedAt), keepaliveAt: e.keepalive(state.Keepalive),
		quickModes: map[uint32]*quickMode{}, usedIDs: make(map[uint32]struct{}, len(state.UsedIDs)/4), dpdSequence: state.DPDSequence,
	}
	for b := state.UsedIDs; len(b) > 0; b = b[4:] {
		s.usedIDs[binary.BigEndian.Uint32(b)] = struct{}{}
	}
	for i := range state.QuickModes {
		of := &state.QuickModes[i]
		q := &quickMode{
			s: s, id: of.ID, initiator: of.Initiator, iv: of.IV, ni: of.Ni, nr: of.Nr, group: of.Group, spi: of.SPI,
			replaces: e.at(of.Replaces), child: e.at(of.Child), done: of.Done, expireAt: e.time(of.ExpireAt), startedAt: e.time(of.StartedAt),
			retransmission: e.retransmission(of.Retransmission), lastRequestHash: of.LastRequestHash, lastReply: of.LastReply,
		}
		if q.dh, err = restoreDH(of.DH); err != nil || len(q.iv) != block.BlockSize() || q.child == nil && (q.done || !q.initiator) {
			return nil, errState
		}
		s.quickModes[q.id] = q
	}
	return s, nil
}

func (e restorer) v2(state *v2State) (s *v2SA, err error) {
	s = &v2SA{
		p: e.p, state: establishedV2, initiator: state.Initiator, spiI: state.SPII, spiR: state.SPIR, path: restorePath(state.Path),
		startedAt: e.time(state.StartedAt), expireAt: e.time(state.ExpireAt), proposal: state.Proposal, group: state.Group, nat: restoreNAT(state.Nat),
		canFragment: state.CanFragment, firstChild: e.at(state.FirstChild), confirmAt: e.time(state.ConfirmAt),
		sendID: state.SendID, recvID: state.RecvID, lastRequestID: state.LastRequestID, lastResponse: state.LastResponse,
		retransmission: e.retransmission(state.Retransmission), established: e.time(state.Established), rekeyAt: e.time(state.RekeyAt),
		replaced: state.Replaced, rekeying: state.Rekeying, keepaliveAt: e.keepalive(state.Keepalive), probing: state.Probing, deadAt: e.time(state.DeadAt),
	}
	if len(state.Material) != materialLenV2(state.Proposal) || !state.Path.Remote.IsValid() || s.firstChild == nil && !s.confirmAt.IsZero() {
		return nil, errState
	}
	if s.keys, err = splitV2(state.Proposal, state.Material, state.Initiator); err != nil {
		return nil, errState
	}
	s.keys.send.counter = state.Counter
	if state.Pending != nil {
		if s.pending, err = e.request(s, state.Pending); err != nil {
			return nil, err
		}
	}
	for i := range state.Queue {
		r, err := e.request(s, &state.Queue[i])
		if err != nil {
			return nil, err
		}
		s.queue = append(s.queue, r)
	}
	return s, nil
}

func (e restorer) request(s *v2SA, state *requestState) (r *requestV2, err error) {
	r = &requestV2{kind: state.Kind, spi: state.SPI}
	switch state.Kind {
	case requestPing, requestDelete, requestDeleteIKE:
	case requestNewChild:
		of := state.Child
		if of == nil {
			return nil, errState
		}
		r.child = &childRequest{old: e.at(of.Old), groups: of.Groups, retries: of.Retries, spi: of.SPI, ni: of.Ni, requestedAt: e.time(of.RequestedAt)}
		r.child.dh, err = restoreDH(of.DH)
	case requestRekey:
		of := state.Rekey
		if of == nil {
			return nil, errState
		}
		n := &v2SA{
			p: e.p, initiator: true, path: s.path, startedAt: e.time(of.StartedAt), group: of.Group, nat: s.nat, canFragment: s.canFragment,
			spiI: of.SPI, ni: of.Ni,
		}
		n.dh, err = restoreDH(of.DH)
		r.rekey = &rekeyRequest{old: s, next: n, offer: s.rekeyOffer()}
	default:
		return nil, errState
	}
	return r, err
}
