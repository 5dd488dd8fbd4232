package ike

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// firstMessage returns the first message that a Peer with that configuration sends.
func firstMessage(t *testing.T, cfg Config, now time.Time) []byte {
	t.Helper()
	cfg.Local, cfg.Remote = addressA, addressB
	cfg.Rand = rand.NewChaCha8([32]byte{9})
	p, err := NewPeer(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	return p.Tick(now)[0].(Send).Payload
}

// flood delivers that many first messages a second to e, each with a random initiator SPI and
// with the peer's address as source. Replies to them reach nobody.
func (s *sim) flood(e *end, perSecond int, messages ...[]byte) {
	b := bytes.Clone(messages[s.rng.IntN(len(messages))])
	for i := range 8 {
		b[i] = byte(1 + s.rng.IntN(255))
	}
	s.at(time.Second/time.Duration(perSecond), func() {
		if e.Peer != nil {
			s.do(e, e.Receive(s.now, 500, netip.AddrPortFrom(e.cfg.Remote, 500), b))
		}
		s.flood(e, perSecond, messages...)
	})
}

// An off-path attacker that spoofs the peer's address does not keep a tunnel from coming up. The
// flood hits both ends, from before they start, with the cheapest and the most expensive message.
func TestPeerReceive_flood(t *testing.T) {
	for _, mode := range modes {
		for _, perSecond := range []int{1000, 5000} {
			n := uint64(20)
			if testing.Short() {
				n = 4
			}
			for seed := range n {
				t.Run(fmt.Sprintf("%v/%d/%d", mode, perSecond, seed), func(t *testing.T) {
					cfg := testConfig(t, fastPhase1, fastPhase2)
					cfg.Mode = mode
					s := newSim(t, seed, cfg, cfg)
					whole := firstMessage(t, cfg, s.now)
					least := message(header{version: version2, exchange: exchangeInit, flags: flagInitiator}, nil)
					if mode == Main {
						sa := []payload{{kind: v1SecurityAssociation, body: append(be32(doiIPsec), be32(1)...)}}
						least = message(header{version: version1, exchange: exchangeMain}, sa)
					}
					for _, e := range s.ends {
						s.flood(e, perSecond, whole, least)
					}
					s.run(2 * time.Second)
					s.start(s.ends[0])
					s.at(time.Duration(s.rng.Int64N(int64(3*time.Second))), func() { s.start(s.ends[1]) })
					began := s.now
					for s.ends[0].outbound == nil || s.ends[1].Peer == nil || s.ends[1].outbound == nil {
						if s.run(time.Second); s.now.Sub(began) > 3*time.Minute {
							s.fatalf("not up after %v", s.now.Sub(began))
						}
					}
					t.Logf("up after %v", s.now.Sub(began))
				})
			}
		}
	}
}

// floodTarget starts a passive end, and returns it with a valid first message for its configuration.
func floodTarget(t *testing.T, mode Mode) (cfg Config, s *sim, e *end, first []byte) {
	t.Helper()
	cfg = testConfig(t, fastPhase1, fastPhase2)
	cfg.Mode = mode
	passive := cfg
	passive.Passive = true
	s = newSim(t, 1, cfg, passive)
	e = s.ends[1]
	s.start(e)
	return cfg, s, e, firstMessage(t, cfg, s.now)
}

// A flood leaves bounded state, and gets a bounded number of replies.
func TestPeerReceive_floodBounded(t *testing.T) {
	for _, mode := range modes {
		cfg, s, e, b := floodTarget(t, mode)
		const seconds, perSecond = 10, 20000
		answers := 0
		for i := range seconds * perSecond {
			copy(b, be32(uint32(1+i)))
			answers += len(e.Receive(s.now.Add(time.Duration(i)*time.Second/perSecond), 500, netip.AddrPortFrom(addressA, 500), b))
		}
		if answers > (seconds+1)*(cheapRepliesPerSecond+dhPerSecond) {
			t.Errorf("%v: %d answers", mode, answers)
		}
		if n := len(e.v1) + len(e.v2); n > maxHalfOpen {
			t.Errorf("%v: %d states", mode, n)
		}
		if n := len(e.Peer.cfg.Limits.unverifiedV1.queue); n > maxUnverified || len(e.Peer.cfg.Limits.unverifiedV1.bySPI) != n {
			t.Errorf("%v: %d answers to message 1 are kept, %d can be found", mode, n, len(e.Peer.cfg.Limits.unverifiedV1.bySPI))
		}
		if next := e.Next(); mode == Main && !next.IsZero() {
			t.Errorf("a timer runs for message 1: %v", next)
		}
		big := append(appendSAV1(encodePhase1(cfg.Phase1, time.Hour)), make([]byte, maxSAPayload)...)
		if got := e.Receive(s.now.Add(time.Hour), 500, netip.AddrPortFrom(addressA, 500), message(header{initiator: ikeSPI{1}, version: version1, exchange: exchangeMain}, []payload{{kind: v1SecurityAssociation, body: big}})); len(got) != 0 {
			t.Errorf("an SA payload of %d bytes was answered", len(big))
		}
	}
}

// A first message that is repeated gets no more answers than different ones do, but at least one a second, for
// retransmissions of its sender.
func TestPeerReceive_floodRepeated(t *testing.T) {
	for _, mode := range modes {
		_, s, e, b := floodTarget(t, mode)
		const seconds, perSecond = 5, 20000
		answers := 0
		for i := range seconds * perSecond {
			answers += len(e.Receive(s.now.Add(time.Duration(i)*time.Second/perSecond), 500, netip.AddrPortFrom(addressA, 500), b))
		}
		if answers < seconds || answers > (seconds+1)*(cheapRepliesPerSecond+dhPerSecond) {
			t.Errorf("%v: %d answers", mode, answers)
		}
	}
}

// countingReader counts the bytes read from r.
type countingReader struct {
	r io.Reader
	n int
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}

// A cookie is valid for its initiator only, and for one rotation of the secret.
func TestCookieSecretsVerify(t *testing.T) {
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Local, cfg.Remote = addressA, addressB
	now := time.Unix(1_700_000_000, 0)
	p, err := NewPeer(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	ni, spi := bytes.Repeat([]byte{7}, nonceLen), ikeSPI{1}
	given := []payload{notifyV2(n2Cookie, p.cookieSecrets.generate(p, ni, spi))}
	if !p.cookieSecrets.verify(p, given, ni, spi) {
		t.Error("not good")
	}
	if p.cookieSecrets.verify(p, given, ni, ikeSPI{2}) || p.cookieSecrets.verify(p, given, ni[1:], spi) || p.cookieSecrets.verify(p, nil, ni, spi) {
		t.Error("good for another")
	}
	p.now = now.Add(cookieLifetime)
	if !p.cookieSecrets.verify(p, given, ni, spi) || bytes.Equal(given[0].body[4:], p.cookieSecrets.generate(p, ni, spi)) {
		t.Error("not good, or not replaced, with the next secret")
	}
	for _, after := range []time.Duration{2 * cookieLifetime, 10 * cookieLifetime} {
		p.now = now.Add(after)
		if p.cookieSecrets.verify(p, given, ni, spi) {
			t.Errorf("good after %v", after)
		}
	}
}

// An initiator that returns a cookie is served however many first messages others send.
func TestCookieSecretsVerify_beforeRateLimit(t *testing.T) {
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Mode = IKE2
	passive := cfg
	passive.Passive = true
	s := newSim(t, 1, cfg, passive)
	s.start(s.ends[1])
	e, from := s.ends[1], netip.AddrPortFrom(addressA, 500)
	b := firstMessage(t, cfg, s.now)
	for i := range 10000 {
		copy(b, be32(uint32(1+i)))
		e.Receive(s.now, 500, from, b)
	}
	s.now = s.now.Add(time.Second / cheapRepliesPerSecond)
	h, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	h.initiator = ikeSPI{0xaa}
	ps, _, err := parsePayloads(b[headerLen:], h.next)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(ps []payload) []payload {
		t.Helper()
		got := e.Receive(s.now, 500, from, message(h, ps))
		if len(got) != 1 {
			t.Fatalf("%d answers", len(got))
		}
		reply := got[0].(Send).Payload
		ps, _, err := parsePayloads(reply[headerLen:], payloadType(reply[16]))
		if err != nil {
			t.Fatal(err)
		}
		return ps
	}
	given := answer(ps)
	if !hasNotify(given, n2Cookie) {
		t.Fatal("no cookie")
	}
	if find(answer(append(given, ps...)), v2SecurityAssociation) == nil {
		t.Error("with a cookie the exchange does not go on")
	}
}

// Invalid public values cost one private key per SA, however many arrive.
func TestV1SAReceive3_invalidPublicValue(t *testing.T) {
	cfg := testConfig(t, "aes128-sha1-modp1024", fastPhase2)
	cfg.Passive = true
	s := newSim(t, 1, cfg, cfg)
	s.start(s.ends[1])
	e, from := s.ends[1], netip.AddrPortFrom(addressA, 500)
	first := cfg
	first.Passive = false
	reply := e.Receive(s.now, 500, from, firstMessage(t, first, s.now))[0].(Send).Payload
	h, err := parseHeader(reply)
	if err != nil {
		t.Fatal(err)
	}
	random := &countingReader{r: rand.NewChaCha8([32]byte{1})}
	e.Peer.cfg.Rand = random
	for i := range 1000 {
		ni := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 8)
		e.Receive(s.now, 500, from, message(h, []payload{{kind: v1KeyExchange, body: make([]byte, 128)}, {kind: v1Nonce, body: ni}}))
	}
	if random.n > exponentLen {
		t.Errorf("%d random bytes for private keys of %d", random.n, exponentLen)
	}
}

// A half-open SA as responder ends after a few messages 5 that do not verify: each is a guess of
// the secret.
func TestMaxAuthFailures(t *testing.T) {
	s := withPassivePeer(t, 1, testConfig(t, fastPhase1, fastPhase2))
	e := s.ends[1]
	for len(e.v1) == 0 || e.v1[0].state != sent4 {
		s.run(time.Millisecond)
	}
	s.ends[0].down = true
	sa := e.v1[0]
	h := sa.header(exchangeMain, 0)
	h.flags = flagEncrypted
	h.next = v1Identification
	for i := range 8 {
		if len(e.v1) == 0 {
			t.Fatalf("given up after %d", i)
		}
		b := append(make([]byte, headerLen), bytes.Repeat([]byte{byte(i)}, 64)...)
		h.put(b)
		e.Receive(s.now, 500, netip.AddrPortFrom(addressA, 500), b)
	}
	if len(e.v1) != 0 {
		t.Errorf("after 8 the attempt is still there")
	}
}

// An attacker that receives at the peer's address, but has not the secret, does not hold back our
// own attempts by initiating again and again, when the real peer only responds.
func TestHoldTime(t *testing.T) {
	for _, mode := range []Mode{Main, Auto} {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, 1, cfg)
		s.ends[0].down = true
		other := cfg
		other.Secret, other.Mode, other.Local, other.Remote = Secret("another"), Main, addressB, addressA
		var attack func()
		e := s.ends[0]
		attack = func() {
			s.at(2500*time.Millisecond, attack)
			other.Rand = rand.NewChaCha8([32]byte{byte(s.order), byte(s.order >> 8)})
			p, err := NewPeer(other, s.now)
			if err != nil {
				t.Fatal(err)
			}
			todo := p.Tick(s.now)
			for range 2 { // messages 1 and 3
				var next []Action
				for _, a := range todo {
					for _, back := range e.Receive(s.now, 500, netip.AddrPortFrom(addressB, 777), a.(Send).Payload) {
						if m, ok := back.(Send); ok && m.To.Port() == 777 {
							next = append(next, p.Receive(s.now, 500, netip.AddrPortFrom(addressA, 500), m.Payload)...)
							continue
						}
						s.do(e, []Action{back})
					}
				}
				todo = next
			}
		}
		s.start(e)
		e.down = false
		if mode == Main {
			// The attack starts before our first attempt, which is lost.
			s.ends[1].down = true
		}
		attack()
		s.run(33 * time.Second)
		s.ends[1].down = false
		began := s.now
		for e.outbound == nil {
			if s.run(time.Second); s.now.Sub(began) > 40*time.Second {
				s.fatalf("%v: not up after %v", mode, s.now.Sub(began))
			}
		}
		t.Logf("%v: up after %v", mode, s.now.Sub(began))
	}
}
