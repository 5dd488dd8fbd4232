package ike

import (
	"net/netip"
	"testing"
	"time"
)

// Without Demand nothing is sent. After it an SA is negotiated, and rekeyed without another Demand; once one
// end has deleted it the other does not begin again.
func TestPeerDemand(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode, cfg.OnDemand = mode, true
		s := newSim(t, 1, cfg, cfg)
		messages := 0
		s.tap = func(*end, []byte) { messages++ }
		a, b := s.ends[0], s.ends[1]
		s.start(a)
		s.start(b)
		if s.run(time.Minute); messages != 0 {
			t.Fatalf("%v: %d messages without a demand", mode, messages)
		}
		s.do(a, a.Demand(s.now))
		s.traffic(a)
		s.traffic(b)
		s.run(10 * time.Second)
		s.check("on demand")
		s.run(20 * cfg.Lifetime2)
		s.check("rekeyed")
		for _, e := range s.ends {
			e.idle = func() bool { return true }
		}
		s.do(a, a.Close(s.now))
		a.down = true
		s.run(2 * time.Minute)
		before := messages
		if s.run(5 * time.Minute); b.outbound != nil || messages != before {
			t.Errorf("%v: after a Delete: outbound %v, %d messages", mode, b.outbound, messages-before)
		}
		s.do(b, b.Demand(s.now))
		if messages == before {
			t.Errorf("%v: nothing is sent on demand", mode)
		}
		s.run(5 * time.Minute)
		before = messages
		if s.run(5 * time.Minute); messages != before {
			t.Errorf("%v: a peer that is not there is asked on and on", mode)
		}
	}
}

// However many peers' addresses an attacker forges, state and answers are bounded as for one.
func TestLimits_flood(t *testing.T) {
	for _, mode := range modes {
		limits := new(Limits)
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		now := time.Unix(1_700_000_000, 0)
		b := firstMessage(t, cfg, now)
		cfg.Limits, cfg.OnDemand, cfg.Local = limits, true, addressB
		peers := make([]*Peer, 200)
		for i := range peers {
			cfg.Remote = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
			var err error
			if peers[i], err = NewPeer(cfg, now); err != nil {
				t.Fatal(err)
			}
		}
		const seconds, perSecond = 10, 20000
		answers, halfOpen := 0, 0
		for i := range seconds * perSecond {
			copy(b, be32(uint32(1+i)))
			p := peers[i%len(peers)]
			answers += len(p.Receive(now.Add(time.Duration(i)*time.Second/perSecond), 500, netip.AddrPortFrom(p.cfg.Remote, 500), b))
		}
		for _, p := range peers {
			halfOpen += len(p.v1) + len(p.v2)
		}
		if answers > (seconds+1)*(cheapRepliesPerSecond+dhPerSecond) {
			t.Errorf("%v: %d answers", mode, answers)
		}
		if halfOpen > (seconds+1)*dhPerSecond {
			t.Errorf("%v: %d half-open", mode, halfOpen)
		}
		if n := len(limits.unverifiedV1.queue); n > maxUnverified || len(limits.unverifiedV1.bySPI) != n {
			t.Errorf("%v: %d wait for message 3, %d can be found", mode, n, len(limits.unverifiedV1.bySPI))
		}
		for _, p := range peers {
			p.Close(now.Add(seconds * time.Second))
		}
		if n := len(limits.unverifiedV1.queue) + len(limits.unverifiedV1.bySPI); n != 0 {
			t.Errorf("%v: %d are left", mode, n)
		}
	}
}

func TestIsFirstMessage(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		b := firstMessage(t, cfg, time.Unix(1_700_000_000, 0))
		if !IsFirstMessage(b) {
			t.Errorf("%v: message 1 is none", mode)
		}
		b[8] = 1 // the responder's SPI
		if IsFirstMessage(b) || IsFirstMessage(b[:20]) || IsFirstMessage(nil) {
			t.Errorf("%v: another is one", mode)
		}
	}
}
