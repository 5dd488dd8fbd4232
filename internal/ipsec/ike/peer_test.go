package ike

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestPeerProblem_wrongSecret(t *testing.T) {
	for _, mode := range modes {
		for _, passive := range []bool{false, true} {
			cfg := testConfig(t, fastPhase1, fastPhase2)
			cfg.Mode = mode
			other := cfg
			other.Secret, other.Passive = Secret("battery staple"), passive
			s := newSim(t, 1, cfg, other)
			s.start(s.ends[1])
			s.start(s.ends[0])
			s.run(60 * time.Second)
			for _, e := range s.ends {
				if e.outbound != nil || len(e.inbound) != 0 || e.Established() {
					s.fatalf("%v: end %d has an SA", mode, e.index)
				}
				if e.Problem().Kind != SecretMismatch {
					s.fatalf("%v: end %d says %q", mode, e.index, e.Problem())
				}
			}
		}
	}
}

func TestPeerProblem_noCommonProposal(t *testing.T) {
	for _, mode := range modes {
		for phase, c := range [][4]string{
			{"aes128-sha1-ecp256", "aes256-sha256-ecp256", fastPhase2, fastPhase2},
			{fastPhase1, fastPhase1, "aes128-sha1", "aes256-sha256"},
		} {
			a, b := testConfig(t, c[0], c[2]), testConfig(t, c[1], c[3])
			a.Mode, b.Mode, b.Passive = mode, mode, true
			s := newSim(t, 1, a, b)
			s.start(s.ends[1])
			s.start(s.ends[0])
			s.run(20 * time.Second)
			for _, e := range s.ends {
				p := e.Problem()
				if e.outbound != nil || p.Kind != NoCommonProposal || p.Phase != phase+1 {
					s.fatalf("%v: end %d says %q", mode, e.index, p)
				}
			}
			if p := s.ends[1].Problem(); !strings.Contains(p.Theirs, c[2*phase]) || !strings.Contains(p.Ours, c[2*phase+1]) {
				s.fatalf("%v: %q does not say both lists", mode, p)
			}
		}
	}
}

func TestPeerProblem_noAnswer(t *testing.T) {
	for _, mode := range []Mode{Main, IKE2, Auto} {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(t, 1, cfg, cfg)
		s.start(s.ends[0])
		s.run(300 * time.Second)
		if p := s.ends[0].Problem(); p.Kind != NoAnswer {
			t.Errorf("%v: %q", mode, p)
		}
		s.start(s.ends[1])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(60 * time.Second)
		s.check("after the peer came")
	}
}

func TestMode_auto(t *testing.T) {
	for _, mode := range []Mode{Main, IKE2, Auto} {
		for _, passive := range []int{-1, 0, 1} {
			a, b := testConfig(t, fastPhase1, fastPhase2), testConfig(t, fastPhase1, fastPhase2)
			a.Mode, b.Mode = Auto, mode
			a.Passive, b.Passive = passive == 0, passive == 1
			s := newSim(t, 7, a, b)
			s.traffic(s.ends[0])
			s.traffic(s.ends[1])
			s.start(s.ends[0])
			s.start(s.ends[1])
			s.run(100 * time.Second)
			s.check(fmt.Sprintf("auto and %v, passive %d", mode, passive))
			s.run(300 * time.Second)
			s.check("after rekeys")
		}
	}
}

// INVALID_KE_PAYLOAD: the responder accepts only another of the initiator's groups, which the
// next attempt uses.
func TestPeer_invalidKEPayload(t *testing.T) {
	a := testConfig(t, "aes128-sha1-modp1024,aes128-sha1-ecp256", fastPhase2)
	b := testConfig(t, "aes128-sha1-ecp256", fastPhase2)
	a.Mode, b.Mode, a.PFS, b.PFS, b.Passive = IKE2, IKE2, MODP1024, ECP256, true
	s := newSim(t, 1, a, b)
	s.start(s.ends[1])
	s.start(s.ends[0])
	s.traffic(s.ends[0])
	s.traffic(s.ends[1])
	s.run(250 * time.Second)
	s.check("after rekeys")
	if g := s.ends[0].Current().Group; g != ECP256 {
		t.Errorf("group %v", g)
	}
	if s.lost != 0 {
		t.Errorf("%d packets lost", s.lost)
	}
}

func TestChildWeak(t *testing.T) {
	cfg := testConfig(t, fastPhase1, "aes128-sha256")
	cfg.PFS = MODP1024
	s := newSim(t, 1, cfg, cfg)
	s.start(s.ends[0])
	s.start(s.ends[1])
	s.run(5 * time.Second)
	if w := s.ends[0].Current().Weak(); w != "modp1024" {
		t.Errorf("weak: %q", w)
	}
	cfg.PFS = ECP256
	s = newSim(t, 1, cfg, cfg)
	s.start(s.ends[0])
	s.start(s.ends[1])
	s.run(5 * time.Second)
	if w := s.ends[0].Current().Weak(); w != "sha1" {
		t.Errorf("weak: %q", w)
	}
}

// An attacker that spoofs the peer's address, with new SPIs, modified and truncated copies of
// captured messages, neither ends an SA nor exhausts memory.
func TestPeerReceive_forgedMessages(t *testing.T) {
	for _, mode := range modes {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(t, 3, cfg, cfg)
		var seen [][]byte
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		// Capture a handshake between two other Peers, too.
		record := newSim(t, 4, cfg, cfg)
		record.start(record.ends[1])
		record.start(record.ends[0])
		victim := s.ends[0]
		rng := rand.New(rand.NewPCG(5, 6))
		tap := func(e *end, b []byte) { seen = append(seen, bytes.Clone(b)) }
		s.tap, record.tap = tap, tap
		record.run(10 * time.Second)
		var attack func()
		attack = func() {
			s.at(3*time.Millisecond, attack)
			if len(seen) == 0 {
				return
			}
			b := bytes.Clone(seen[rng.IntN(len(seen))])
			switch rng.IntN(4) {
			case 0: // a new initiator SPI
				for i := range 8 {
					b[i] = byte(rng.Uint32())
				}
			case 1:
				for range 1 + rng.IntN(4) {
					b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
				}
			case 2:
				b = b[:headerLen+rng.IntN(len(b)-headerLen+1)]
				h := header{}
				copy(h.initiator[:], b)
				copy(h.responder[:], b[8:])
				b[24], b[25], b[26], b[27] = 0, 0, byte(len(b)>>8), byte(len(b))
			}
			from := netip.AddrPortFrom(addressB, uint16(1+rng.IntN(65535)))
			s.do(victim, victim.Receive(s.now, []uint16{500, 4500}[rng.IntN(2)], from, b))
			if n := len(victim.v1) + len(victim.v2); n > 2*maxHalfOpen+4 {
				s.fatalf("%d states", n)
			}
			if n := len(victim.children); n > maxChildren {
				s.fatalf("%d SAs", n)
			}
		}
		s.run(5 * time.Second)
		s.check("before the attack")
		attack()
		s.run(100 * time.Second)
		s.check("during the attack")
		if s.lost != 0 {
			s.fatalf("%v: %d packets lost", mode, s.lost)
		}
	}
}

func TestCookieSecrets_requiredUnderLoad(t *testing.T) {
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Mode = IKE2
	passive := cfg
	passive.Passive = true
	s := newSim(t, 1, cfg, passive)
	s.start(s.ends[1])
	victim := s.ends[1]
	// Half-open SAs of initiators that do not go on.
	for i := range 10 {
		c := cfg
		c.Local, c.Remote = addressB, addressA
		c.Local, c.Remote = addressA, addressB
		c.Rand = rand.NewChaCha8([32]byte{byte(i)})
		p, err := NewPeer(c, s.now)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range p.Tick(s.now) {
			victim.Receive(s.now, 500, netip.AddrPortFrom(addressA, 500), a.(Send).Payload)
		}
	}
	if n := len(victim.v2); n > maxHalfOpen/2 {
		t.Errorf("%d half-open SAs without a cookie", n)
	}
	s.start(s.ends[0])
	s.traffic(s.ends[0])
	s.traffic(s.ends[1])
	s.run(10 * time.Second)
	s.check("with a cookie")
}

// With a long list of proposals, IKE_AUTH does not fit into 1280 bytes.
func TestFragmentSize(t *testing.T) {
	var list []string
	for i := range 16 {
		list = append(list, []string{"aes128-sha256", "aes192-sha256", "aes256-sha256", "aes256-sha512"}[i%4])
	}
	for _, phase1 := range []string{fastPhase1, "aes256gcm16-sha256-ecp256"} {
		cfg := testConfig(t, phase1, strings.Join(list, ","))
		cfg.Mode = IKE2
		s := newSim(t, 1, cfg, cfg)
		fragments := 0
		s.tap = func(_ *end, b []byte) {
			if payloadType(b[16]) == v2Fragment {
				fragments++
			}
			if len(b) > 1280 {
				t.Errorf("a message of %d bytes", len(b))
			}
		}
		s.loss, s.duplicate = 0.2, 0.2
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(60 * time.Second)
		s.loss = 0
		s.run(60 * time.Second)
		s.check("with fragments")
		if fragments == 0 {
			t.Errorf("%s: no message was fragmented", phase1)
		}
	}
}

func FuzzPeerReceive(f *testing.F) {
	for _, mode := range modes {
		cfg := testConfig(f, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(&testing.T{}, 3, cfg, cfg)
		s.tap = func(_ *end, b []byte) { f.Add(b, uint8(mode)) }
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.run(time.Second)
	}
	f.Fuzz(func(t *testing.T, b []byte, state uint8) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = Auto
		s := newSim(t, 3, cfg, cfg)
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.run(time.Duration(state) * 4 * time.Millisecond)
		e := s.ends[0]
		before := e.outbound
		s.do(e, e.Receive(s.now, 500, netip.AddrPortFrom(addressB, 500), b))
		if before != nil && e.outbound == nil {
			t.Fatal("a forged message removed the outbound SA")
		}
		s.do(e, e.Tick(s.now.Add(time.Minute)))
	})
}

func FuzzParsePayloads(f *testing.F) {
	ps, err := ParsePhase1(DefaultPhase1)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(appendSAV1(encodePhase1(ps, time.Hour)))
	f.Add(appendSAV2(offerIKE(ps, nil)))
	f.Add(trafficSelector([4]byte{192, 0, 2, 1}))
	f.Add(message(header{version: version1, exchange: exchangeMain}, []payload{{kind: v1Nonce, body: make([]byte, 16)}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if sas, err := parseSAV1(b); err == nil {
			formatOfferPhase1(sas)
			formatOfferPhase2(sas, false)
			for _, sa := range sas {
				again, err := parseSAV1(appendSAV1(sa))
				if err != nil || len(again) != 1 || len(again[0].transforms) != len(sa.transforms) {
					t.Fatalf("%v %v", again, err)
				}
			}
		}
		if sas, err := parseSAV2(b); err == nil {
			formatOfferV2(sas)
			chooseIKE(ps, sas)
			chooseESP(ps, sas, []Group{MODP1024})
		}
		tsIncludes(b, [4]byte{192, 0, 2, 1}, true)
		if h, err := parseHeader(b); err == nil {
			if list, rest, err := parsePayloads(b[headerLen:], h.next); err == nil {
				size := len(rest)
				for _, p := range list {
					size += 4 + len(p.body)
				}
				if size != len(b)-headerLen {
					t.Fatalf("%d bytes of %d", size, len(b)-headerLen)
				}
				eachNotify(list, func(uint16, []byte, []byte) {})
			}
		}
	})
}
