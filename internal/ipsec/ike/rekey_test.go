package ike

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// lifetimes range from those that suit a network with fast answers to those that leave time for
// retransmissions.
var lifetimes = []struct{ phase1, phase2, jitter time.Duration }{
	{10 * time.Second, 4 * time.Second, 20 * time.Millisecond},
	{45 * time.Second, 15 * time.Second, 300 * time.Millisecond},
	{200 * time.Second, 60 * time.Second, 800 * time.Millisecond},
}

// Whatever one end encrypts, the other end can decrypt while the packet is in flight, up to a
// second. That holds over rekeys of both phases, by either end or both at once, with IKE messages
// lost, reordered and duplicated. If IKE gets nothing through until the SAs expire, each end
// stops sending before the other stops receiving.
//
// Unless IKE messages are lost, there always is an outbound SA.
func TestPeer_decryptable(t *testing.T) {
	n := uint64(*seeds) * 20
	if testing.Short() {
		n = uint64(*seeds)
	}
	for _, mode := range modes {
		for seed := range n {
			t.Run(fmt.Sprintf("%v/%d", mode, seed), func(t *testing.T) {
				t.Parallel() // these take the longest of all packages' tests
				checkDecryptable(t, seed, mode)
			})
		}
	}
}

func checkDecryptable(t *testing.T, seed uint64, mode Mode) {
	a := testConfig(t, fastPhase1, fastPhase2)
	a.Mode = mode
	life := lifetimes[seed%3]
	a.Lifetime1, a.Lifetime2 = life.phase1, life.phase2
	b := a
	s := newSim(t, seed, a, b)
	s.jitter, s.maxDelay = life.jitter, time.Second
	a.Passive, b.Passive = s.rng.IntN(4) == 0, false
	b.Passive = !a.Passive && s.rng.IntN(3) == 0
	s.ends[0].cfg.Passive, s.ends[1].cfg.Passive = a.Passive, b.Passive
	s.nat = s.rng.IntN(4) == 0 && !a.Passive // a host behind a NAT has to initiate
	s.loss = []float64{0, 0, 0.1, 0.3, 0.5}[s.rng.IntN(5)]
	s.duplicate = []float64{0, 0.2}[s.rng.IntN(2)]
	if s.rng.IntN(2) == 0 {
		s.reportEvery = time.Second
	}
	for _, e := range s.ends {
		switch s.rng.IntN(4) {
		case 0: // always idle
			e.idle = func() bool { return true }
		case 1: // traffic and idle periods
			on, off := time.Duration(1+s.rng.IntN(20))*time.Second, time.Duration(1+s.rng.IntN(60))*time.Second
			e.idle = func() bool { return time.Duration(s.now.UnixNano())%(on+off) > on }
		}
		s.traffic(e)
		if s.reportEvery != 0 {
			s.reportESP(e)
		}
		if s.rng.IntN(3) == 0 { // sequence numbers run out
			var rekey func()
			rekey = func() {
				s.at(time.Duration(s.rng.Int64N(int64(life.phase2))), rekey)
				s.do(e, e.Rekey(s.now))
			}
			s.at(life.phase2, rekey)
		}
	}
	s.start(s.ends[1])
	s.at(time.Duration(s.rng.Int64N(int64(2*s.jitter))), func() { s.start(s.ends[0]) })
	s.run(5 * life.phase1 / 2)
	if s.lost != 0 {
		s.fatalf("of %d packets %d could not be decrypted", s.sent, s.lost)
	}
	if s.loss == 0 && s.blocked != 0 {
		s.fatalf("%d packets had no outbound SA", s.blocked)
	}
	for _, e := range s.ends {
		if n := len(e.children); n >= maxChildren {
			s.fatalf("end %d has %d SAs", e.index, n)
		}
	}
}

// Sending on an SA ends well before it expires: the other end may have installed it earlier.
func TestChild_replacedBeforeExpiry(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode, cfg.Lifetime2 = mode, 4*time.Second
		s := withPassivePeer(t, 1, cfg)
		changes := 0
		for before := s.ends[0].Current(); changes < 5; before = s.ends[0].Current() {
			s.run(10 * time.Millisecond)
			if before == nil || s.ends[0].Current() == before {
				continue
			}
			changes++
			if left := before.ExpireAt.Sub(s.now); left < 200*time.Millisecond {
				s.fatalf("%v: sent by until %v before its end", mode, left)
			}
		}
	}
}

// The responder confirms the SA without traffic.
func TestPeer_bothEndsUpWithoutTraffic(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, 1, cfg)
		s.run(400 * time.Millisecond)
		for _, e := range s.ends {
			if e.outbound == nil {
				s.fatalf("%v: end %d has no outbound SA", mode, e.index)
			}
		}
	}
}

// A peer that restarts during a rekey does not answer the request. That is noticed as fast as by
// dead peer detection.
func TestDPD_restartDuringRekey(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode, cfg.Lifetime2 = mode, 20*time.Second
		cfg.DPDInterval, cfg.DPDRetries = 2*time.Second, 3
		s := withPassivePeer(t, 1, cfg)
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(5 * time.Second)
		s.check("before")
		s.run(s.ends[0].Current().RekeyAt.Sub(s.now) - 20*time.Millisecond)
		s.ends[1].down = true
		s.run(100 * time.Millisecond)
		s.start(s.ends[1])
		s.run(8*time.Second + backoffFirst + time.Second)
		s.check("after dead peer detection, " + mode.String())
	}
}

// The NAT can make a new mapping after an SA is installed and before it is used.
func TestPeerUpdateRemotePort_inactiveSA(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		passive := cfg
		passive.Passive = true
		s := newSim(t, 1, cfg, passive)
		s.nat = true
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.run(10 * time.Second)
		e := s.ends[1]
		s.do(e, e.Rekey(s.now)) // not used yet, as there is no traffic
		s.run(time.Second)
		if len(e.children) < 2 {
			s.fatalf("%v: %d SAs", mode, len(e.children))
		}
		e.UpdateRemotePort(4711)
		for _, c := range e.children {
			if c.Outbound.DestinationPort != 4711 {
				s.fatalf("%v: after Moved port %d", mode, c.Outbound.DestinationPort)
			}
		}
		// An IKE message from another port.
		tap := false
		s.tap = func(from *end, b []byte) {
			if from != s.ends[0] || tap {
				return
			}
			tap = true
			s.do(e, e.Receive(s.now, 4500, netip.AddrPortFrom(addressA, 4712), bytes.Clone(b)))
		}
		s.run(10 * time.Second)
		for _, c := range e.children {
			if c.removeAt.IsZero() && c.Outbound.DestinationPort == 4711 {
				s.fatalf("%v: after a message port %d", mode, c.Outbound.DestinationPort)
			}
		}
	}
}

// noExponents is a source of random numbers that fails to give private exponents of MODP groups.
type noExponents struct{ io.Reader }

func (r noExponents) Read(b []byte) (int, error) {
	if len(b) == exponentLen {
		return 0, errors.New("no random numbers")
	}
	return r.Reader.Read(b)
}

// A responder that cannot make its Diffie-Hellman key answers TEMPORARY_FAILURE (RFC 7296 section
// 2.25): without an answer the initiator would take the peer for dead.
func TestPeer_rekeyWithoutDHKey(t *testing.T) {
	cfg := testConfig(t, "aes128-sha256-modp1024", fastPhase2)
	cfg.Mode, cfg.PFS = IKE2, MODP1024
	s := withPassivePeer(t, 1, cfg)
	s.traffic(s.ends[0])
	s.traffic(s.ends[1])
	s.run(5 * time.Second)
	old := s.ends[0].newestV2()
	var answers []uint16
	s.tap = func(from *end, b []byte) {
		if h, _ := parseHeader(b); from == s.ends[1] && h.exchange == exchangeCreateChild {
			ps, _, err := old.open(h, b, true)
			if err != nil {
				s.fatalf("%v", err)
			}
			answers = append(answers, errorNotify(ps))
		}
	}
	random := s.ends[1].Peer.cfg.Rand
	s.ends[1].Peer.cfg.Rand = noExponents{random}
	old.rekeyAt = s.now
	s.do(s.ends[0], s.ends[0].Tick(s.now))
	s.run(2 * time.Second)
	if !slices.Equal(answers, []uint16{n2TemporaryFailure}) {
		s.fatalf("answered by %d", answers)
	}
	s.tap, s.ends[1].Peer.cfg.Rand = nil, random
	s.run(30 * time.Second)
	if s.ends[0].newestV2() == old {
		s.fatalf("not rekeyed afterwards")
	}
	s.check("after the rekey")
}

// An initiator that cannot make its Diffie-Hellman key tries again.
func TestPeer_requestWithoutDHKey(t *testing.T) {
	cfg := testConfig(t, "aes128-sha256-modp1024", fastPhase2)
	cfg.Mode, cfg.PFS = IKE2, MODP1024
	s := withPassivePeer(t, 1, cfg)
	s.run(5 * time.Second)
	e := s.ends[0]
	oldSA, oldChild := e.newestV2(), e.Current()
	random := e.Peer.cfg.Rand
	e.Peer.cfg.Rand = noExponents{random}
	oldSA.rekeyAt = s.now
	s.do(e, e.Rekey(s.now))
	s.run(2 * time.Second)
	e.Peer.cfg.Rand = random
	s.run(30 * time.Second)
	if e.newestV2() == oldSA || e.Current() == oldChild {
		s.fatalf("not rekeyed afterwards: IKE SA %v, Child SA %v", e.newestV2() != oldSA, e.Current() != oldChild)
	}
}
