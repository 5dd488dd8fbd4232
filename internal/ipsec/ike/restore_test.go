package ike

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"ipipd/internal/ipsec/esp"
)

var bootOfSim = time.Unix(1_690_000_000, 0)

// save saves the state of an end after a step, before its Actions are carried out, and checks that Changed reported
// any change of it.
func (s *sim) save(e *end) {
	if !s.saving {
		return
	}
	changed := e.Changed()
	now := e.Save(bootOfSim)
	if !changed && !bytes.Equal(now, e.saved) {
		s.fatalf("end %d has changed, and does not say so", e.index)
	}
	e.saved = now
}

// handOver replaces the Peer of an end by one restored from the state that was saved last.
func (s *sim) handOver(e *end) {
	p, err := RestorePeer(s.config(e), s.now, bootOfSim, e.saved)
	if err != nil {
		s.fatalf("end %d: %v", e.index, err)
	}
	if again := p.Save(bootOfSim); !bytes.Equal(again, e.saved) {
		s.fatalf("end %d is not what it was: %d bytes of state, were %d", e.index, len(again), len(e.saved))
	}
	s.logf("%d is handed over", e.index)
	e.Peer, e.inbound, e.outbound = p, map[uint32]esp.Config{}, nil
	for _, c := range p.Children() {
		e.inbound[c.Inbound.SPI] = c.Inbound
	}
	if c := p.Current(); c != nil {
		out := c.Outbound
		e.outbound = &out
	}
	s.do(e, p.Tick(s.now))
}

// established reports whether the end has an SA and a saved state.
func (e *end) established() bool { return e.Peer != nil && e.saved != nil && e.Current() != nil }

// eachFewSeeds is eachSeed with a tenth of the seeds: a simulation in which each step is saved takes longer.
func eachFewSeeds(t *testing.T, f func(t *testing.T, seed uint64, mode Mode)) {
	n := uint64(max(8, *seeds/10))
	if testing.Short() {
		n = 4
	}
	for _, mode := range modes {
		for seed := range n {
			t.Run(fmt.Sprintf("%v/%d", mode, seed), func(t *testing.T) { f(t, seed, mode) })
		}
	}
}

// No packet is lost when processes take over from one another at any time, also during a rekey.
func TestRestorePeer_rekey(t *testing.T) {
	eachFewSeeds(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		switch seed % 4 {
		case 1:
			cfg = testConfig(t, "aes128-sha256-modp1024", "aes128gcm16")
			cfg.PFS = MODP1024
		case 2:
			cfg.PFS = 0
		case 3:
			if mode == IKE2 {
				cfg = testConfig(t, "aes256gcm16-sha256-curve25519", "aes256gcm16")
				cfg.PFS = Curve25519
			}
		}
		cfg.Mode = mode
		other := cfg
		other.Passive = seed%3 == 0
		s := newSim(t, seed, cfg, other)
		s.nat, s.saving, s.reportEvery = seed%2 == 0 && other.Passive, true, time.Second
		s.start(s.ends[1])
		s.start(s.ends[0])
		for _, e := range s.ends {
			s.traffic(e)
			s.reportESP(e)
		}
		s.run(10 * time.Second)
		s.check("before")
		handed := 0
		var next func()
		next = func() {
			// Most often in the middle of an exchange, else at any time.
			wait := time.Duration(s.rng.Int64N(int64(3 * time.Second)))
			if s.rng.IntN(2) == 0 {
				wait = time.Duration(s.rng.Int64N(int64(30 * time.Millisecond)))
			}
			s.at(wait, func() {
				if e := s.ends[s.rng.IntN(2)]; e.established() {
					s.handOver(e)
					handed++
				}
				next()
			})
		}
		next()
		s.run(250 * time.Second)
		s.check("after rekeys")
		if s.lost != 0 || s.blocked != 0 || handed < 50 {
			s.fatalf("%d packets of %d lost, %d without an SA, %d times handed over", s.lost, s.sent, s.blocked, handed)
		}
	})
}

// A lossy network does not lead to a state that another process cannot continue from.
func TestRestorePeer_lossyNetwork(t *testing.T) {
	eachFewSeeds(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(t, seed, cfg, cfg)
		s.saving, s.loss, s.duplicate, s.jitter = true, 0.3, 0.2, 800*time.Millisecond
		s.start(s.ends[0])
		s.start(s.ends[1])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		for range 40 {
			s.run(time.Duration(s.rng.Int64N(int64(8 * time.Second))))
			if e := s.ends[s.rng.IntN(2)]; e.established() {
				s.handOver(e)
			}
		}
		s.loss = 0
		s.run(100 * time.Second)
		s.check("after the network got well")
	})
}

// The next process sends nothing at once, and rekeys when the process before would have.
func TestRestorePeer_quiet(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, 1, cfg)
		s.saving = true
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(20 * time.Second)
		e := s.ends[0]
		s.save(e)
		before := e.Current()
		messages := 0
		s.tap = func(*end, []byte) { messages++ }
		s.handOver(e)
		s.run(3 * time.Second)
		if messages != 0 {
			t.Errorf("%v: %d messages", mode, messages)
		}
		now := e.Current()
		if now == before || now.Inbound.SPI != before.Inbound.SPI || !now.RekeyAt.Equal(before.RekeyAt) || !now.ExpireAt.Equal(before.ExpireAt) {
			t.Errorf("%v: another SA, or other deadlines", mode)
		}
		s.run(earlier(before.RekeyAt, s.ends[1].Current().RekeyAt).Sub(s.now) - 100*time.Millisecond)
		if e.Current() != now {
			t.Errorf("%v: rekeyed too early", mode)
		}
		s.run(10 * time.Second)
		if e.Current() == now {
			t.Errorf("%v: not rekeyed", mode)
		}
		// The peer accepts the Delete of the restored end.
		s.handOver(e)
		s.do(e, e.Close(s.now))
		e.down = true
		s.run(time.Second)
		if s.ends[1].outbound != nil {
			t.Errorf("%v: the peer still sends", mode)
		}
	}
}

// In the next process, too, IKEv1 forgets no message ID, and IKEv2 accepts no request twice.
func TestRestorePeer_replay(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, 1, cfg)
		s.saving = true
		var messages [][]byte
		s.tap = func(from *end, b []byte) {
			if from.index == 0 {
				messages = append(messages, bytes.Clone(b))
			}
		}
		s.run(30 * time.Second) // DPD
		e := s.ends[1]
		s.save(e)
		s.handOver(e)
		messages = slices.Clip(messages)
		for _, b := range messages {
			before := e.lastReceived
			e.Peer.lastReceived = time.Time{}
			e.Receive(s.now, 500, addrPort(addressA, 500), b)
			if !e.Peer.lastReceived.IsZero() {
				t.Errorf("%v: a message of the process before is a sign of life", mode)
			}
			e.lastReceived = before
		}
		if len(messages) < 5 {
			t.Errorf("%v: %d messages", mode, len(messages))
		}
	}
}

// A truncated state is an error, and a damaged one does not make a Peer panic.
func TestRestorePeer_damaged(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, 1, cfg)
		s.saving = true
		s.run(20 * time.Second)
		saved := s.ends[0].saved
		for n := range saved {
			if _, err := RestorePeer(s.config(s.ends[0]), s.now, bootOfSim, saved[:n]); err == nil {
				t.Errorf("%v: %d of %d bytes are taken", mode, n, len(saved))
			}
			flipped := bytes.Clone(saved)
			flipped[n] ^= 1 << (n % 8)
			if p, err := RestorePeer(s.config(s.ends[0]), s.now, bootOfSim, flipped); err == nil {
				p.Tick(s.now)
				p.Close(s.now)
			}
		}
	}
}
