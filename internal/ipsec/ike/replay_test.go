package ike

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

// recordLast records the last message that e sends: a request (IKEv2), or one of an informational
// exchange (IKEv1).
func (s *sim) recordLast(e *end) *[]byte {
	var last []byte
	s.tap = func(from *end, b []byte) {
		if h, err := parseHeader(b); err == nil && from == e &&
			(h.version == version2 && h.flags&flagResponse == 0 || h.version == version1 && h.exchange == exchangeInfo) {
			last = bytes.Clone(b)
		}
	}
	return &last
}

// A replayed message is no sign of life.
func TestDPD(t *testing.T) {
	for _, mode := range modes {
		t.Run("replayed-message/"+mode.String(), func(t *testing.T) {
			a := testConfig(t, fastPhase1, fastPhase2)
			a.Mode, a.Lifetime1, a.Lifetime2 = mode, 24*time.Hour, time.Hour
			b := a
			b.Passive, b.DPDInterval = true, 3*time.Second // so that it is the one that probes
			s := newSim(t, 1, a, b)
			last := s.recordLast(s.ends[1])
			s.start(s.ends[1])
			s.start(s.ends[0])
			s.run(20 * time.Second)
			e := s.ends[0]
			if e.outbound == nil || *last == nil {
				s.fatalf("not up, or nothing was asked")
			}
			s.ends[1].down = true
			died := s.now
			for e.outbound != nil {
				s.do(e, e.Receive(s.now, 500, netip.AddrPortFrom(addressB, 500), *last))
				if s.run(5 * time.Second); s.now.Sub(died) > 5*time.Minute {
					break
				}
			}
			if took := s.now.Sub(died); took > 45*time.Second {
				s.fatalf("noticed after %v", took)
			}
		})
	}
}

// A replayed message from another port does not change the peer's port.
func TestNAT(t *testing.T) {
	for _, mode := range modes {
		t.Run("replayed-message/"+mode.String(), func(t *testing.T) {
			a := testConfig(t, fastPhase1, fastPhase2)
			a.Mode, a.Lifetime1, a.Lifetime2 = mode, 24*time.Hour, time.Hour
			b := a
			a.DPDInterval, b.Passive = 3*time.Second, true
			s := newSim(t, 1, a, b)
			s.nat = true
			last := s.recordLast(s.ends[0])
			s.start(s.ends[1])
			s.start(s.ends[0])
			s.run(20 * time.Second)
			e := s.ends[1]
			if e.outbound == nil || *last == nil {
				s.fatalf("not up, or nothing was asked")
			}
			for range 3 {
				s.run(100 * time.Millisecond)
				for _, action := range e.Receive(s.now, 4500, netip.AddrPortFrom(addressA, 6666), bytes.Clone(*last)) {
					if x, ok := action.(SetPorts); ok {
						t.Errorf("ESP goes to port %d", x.Remote)
					}
				}
			}
			at := udpPath{}
			for _, x := range e.v1 {
				at = x.path
			}
			for _, x := range e.v2 {
				at = x.path
			}
			if esp := e.Current().Outbound.DestinationPort; esp != 14500 || at.remote.Port() != 14500 {
				t.Errorf("ESP to port %d, IKE to %v", esp, at.remote)
			}
		})
	}
}

// The SA remembers all message IDs that it has seen, and no longer accepts any once there are too
// many.
func TestV1SAIDUsed(t *testing.T) {
	a := testConfig(t, fastPhase1, fastPhase2)
	a.Lifetime1, a.Lifetime2 = 24*time.Hour, 24*time.Hour
	b := a
	b.Passive, b.DPDInterval = true, 3*time.Second
	t.Run("replayed-message", func(t *testing.T) {
		s := newSim(t, 1, a, b)
		last := s.recordLast(s.ends[1])
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.run(20 * time.Second)
		e, old := s.ends[0], *last
		s.tap = nil
		s.run(8 * time.Hour)
		received := e.Peer.lastReceived
		now := s.now.Add(time.Millisecond)
		if got := e.Receive(now, 500, netip.AddrPortFrom(addressB, 500), old); len(got) != 0 || !e.Peer.lastReceived.Equal(received) {
			s.fatalf("answered after %d message IDs", len(e.v1[0].usedIDs))
		}
	})
	t.Run("limit", func(t *testing.T) {
		s := newSim(t, 1, a, b)
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.run(5 * time.Second)
		first := s.ends[0].v1[0]
		for id := uint32(1); len(first.usedIDs) < maxMessageIDs-1; id++ {
			first.usedIDs[id] = struct{}{}
		}
		s.run(30 * time.Second)
		if newest := s.ends[0].newestV1(); newest == first || newest == nil || !first.rekeyAt.Before(s.now) && first.replacedAt.IsZero() {
			s.fatalf("not rekeyed")
		}
		for id := uint32(1); len(first.usedIDs) < 2*maxMessageIDs; id++ {
			first.usedIDs[id] = struct{}{}
		}
		if !first.idUsed(0xffff_fff0) {
			t.Error("an ID is taken that cannot be remembered")
		}
	})
}

// Fragments of a retransmitted request have the response resent once, and do not disturb the
// reassembly of the next request.
func TestReassembly(t *testing.T) {
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Mode, cfg.DPDInterval = IKE2, 0
	s := withPassivePeer(t, 1, cfg)
	s.run(5 * time.Second)
	from, e := s.ends[0].v2[0], s.ends[1]
	from.canFragment = true
	ask := func() [][]byte {
		from.sendID++
		return from.seal(from.header(exchangeInformational, from.sendID-1, false), []payload{notifyV2(40000, make([]byte, 3*fragmentSize))})
	}
	receive := func(b []byte) int {
		return len(e.Receive(s.now, 500, netip.AddrPortFrom(addressA, 500), b))
	}
	old, present := ask(), ask()
	for i, b := range old {
		if n := receive(b); n != i/(len(old)-1) {
			t.Fatalf("%d answers to fragment %d of %d", n, i+1, len(old))
		}
	}
	if receive(present[0]) != 0 {
		t.Error("an answer to the first fragment")
	}
	for i, b := range old {
		if n := receive(b); n != 1-min(i, 1) {
			t.Errorf("%d answers to fragment %d of what has been answered", n, i+1)
		}
	}
	for i, b := range present[1:] {
		if n := receive(b); n != i/(len(present)-2) {
			t.Errorf("%d answers to fragment %d of %d", n, i+2, len(present))
		}
	}
}
