package ike

import (
	"bytes"
	"container/heap"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ipipd/internal/ipsec/esp"
)

var seeds = flag.Int("ike.seeds", 60, "how many seeds each simulation runs with")

// sim simulates two Peers and their network. It is deterministic for a seed.
type sim struct {
	t     *testing.T
	rng   *rand.Rand
	now   time.Time
	queue events
	order int
	ends  [2]*end

	loss, duplicate float64
	jitter          time.Duration
	nat             bool                      // in front of end 0, which then has a private address
	relayed         bool                      // an attacker relays: sources are rewritten to the receiver's peer
	tap             func(from *end, b []byte) // gets all messages sent
	maxDelay        time.Duration             // of ESP packets; 0: 3 ms
	reportEvery     time.Duration             // period of NoteReceived; 0: at once
	saving          bool                      // the states of the ends are saved after each step

	sent, received, lost int
	blocked              int // packets without an outbound SA, after the first one
	trace                []string
}

// end is a Peer with its installed SAs.
type end struct {
	*Peer
	index        int
	cfg          Config
	inbound      map[uint32]esp.Config
	outbound     *esp.Config
	lastReceived time.Time
	down         bool
	idle         func() bool         // whether it has no traffic to send
	reported     map[uint32]struct{} // inbound SPIs of ESP received, not reported yet
	everUp       bool                // there has been an outbound SA
	saved        []byte              // the last state, with sim.saving
}

type event struct {
	at    time.Time
	order int
	do    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	x := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return x
}

var (
	addressA = netip.MustParseAddr("192.0.2.1")
	addressB = netip.MustParseAddr("198.51.100.1")
	inside   = netip.MustParseAddr("10.0.0.7")
)

func testConfig(t testing.TB, phase1, phase2 string) Config {
	t.Helper()
	p1, err := ParsePhase1(phase1)
	if err != nil {
		t.Fatal(err)
	}
	p2, err := ParsePhase2(phase2)
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Secret: Secret("correct horse"), Phase1: p1, Phase2: p2, PFS: ECP256,
		Lifetime1: 200 * time.Second, Lifetime2: 60 * time.Second, DPDInterval: 8 * time.Second, DPDRetries: 4,
	}
}

func newSim(t *testing.T, seed uint64, a, b Config) *sim {
	s := &sim{t: t, rng: rand.New(rand.NewPCG(seed, 1)), now: time.Unix(1_700_000_000, 0), jitter: 30 * time.Millisecond}
	a.Local, a.Remote, b.Local, b.Remote = addressA, addressB, addressB, addressA
	for i, cfg := range []Config{a, b} {
		s.ends[i] = &end{index: i, cfg: cfg}
	}
	return s
}

// withPassivePeer returns a sim that has started, in which only end 0 initiates.
func withPassivePeer(t *testing.T, seed uint64, cfg Config) *sim {
	passive := cfg
	passive.Passive = true
	s := newSim(t, seed, cfg, passive)
	s.start(s.ends[1])
	s.start(s.ends[0])
	return s
}

func (s *sim) logf(format string, args ...any) {
	if len(s.trace) < 4000 {
		s.trace = append(s.trace, fmt.Sprintf("%8.3f ", float64(s.now.UnixMilli()-1_700_000_000_000)/1000)+fmt.Sprintf(format, args...))
	}
}

func (s *sim) fatalf(format string, args ...any) {
	s.t.Helper()
	for _, line := range s.trace[max(0, len(s.trace)-120):] {
		s.t.Log(line)
	}
	s.t.Fatalf(format, args...)
}

func (s *sim) at(d time.Duration, do func()) {
	s.order++
	heap.Push(&s.queue, event{s.now.Add(d), s.order, do})
}

func (s *sim) config(e *end) Config {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(s.rng.Uint32())
	}
	cfg := e.cfg
	cfg.Rand = rand.NewChaCha8(seed)
	if s.nat && e.index == 0 && cfg.Local == addressA {
		cfg.Local = inside
	}
	return cfg
}

// start starts a Peer, or restarts it without state.
func (s *sim) start(e *end) {
	p, err := NewPeer(s.config(e), s.now)
	if err != nil {
		s.t.Fatal(err)
	}
	s.logf("%d starts", e.index)
	e.Peer, e.inbound, e.outbound, e.down = p, map[uint32]esp.Config{}, nil, false
	e.reported, e.everUp = map[uint32]struct{}{}, false
	s.do(e, p.Tick(s.now))
}

func (s *sim) do(e *end, actions []Action) {
	s.save(e)
	for _, a := range actions {
		switch a := a.(type) {
		case Send:
			s.send(e, a)
		case AddInbound:
			s.logf("%d + in  %08x out %08x", e.index, a.Inbound.SPI, a.Outbound.SPI)
			e.inbound[a.Inbound.SPI] = a.Inbound
		case UseOutbound:
			if a.Child == nil {
				s.logf("%d = none", e.index)
				e.outbound = nil
				continue
			}
			s.logf("%d = out %08x", e.index, a.Outbound.SPI)
			c := a.Outbound
			e.outbound, e.everUp = &c, true
		case Remove:
			s.logf("%d - in  %08x", e.index, a.Inbound.SPI)
			delete(e.inbound, a.Inbound.SPI)
		}
	}
}

func (s *sim) send(e *end, a Send) {
	if a.Keepalive {
		return
	}
	h, err := parseHeader(a.Payload)
	if err != nil {
		s.fatalf("%d sends what is no message: %v", e.index, err)
	}
	s.logf("%d > %d %d id %08x len %d to %v", e.index, h.version>>4, h.exchange, h.id, h.length, a.To)
	if s.tap != nil {
		s.tap(e, a.Payload)
	}
	to := s.ends[1-e.index]
	from := netip.AddrPortFrom(e.cfg.Local, a.LocalPort)
	local := a.To.Port()
	if s.nat {
		if e.index == 0 {
			from = netip.AddrPortFrom(addressA, a.LocalPort+10000) // the NAT's mapping
		} else {
			local -= 10000
		}
	}
	if s.relayed {
		from = netip.AddrPortFrom(to.cfg.Remote, a.LocalPort)
	}
	copies := 1
	if s.rng.Float64() < s.loss {
		copies--
		s.logf("  lost")
	}
	if s.rng.Float64() < s.duplicate {
		copies++
	}
	for range copies {
		delay := time.Millisecond + time.Duration(s.rng.Int64N(int64(s.jitter)+1))
		b := bytes.Clone(a.Payload)
		s.at(delay, func() {
			if !to.down && to.Peer != nil {
				s.do(to, to.Receive(s.now, local, from, b))
			}
		})
	}
}

// traffic makes e send an ESP packet every 50 ms.
func (s *sim) traffic(e *end) {
	s.at(50*time.Millisecond, func() { s.traffic(e) })
	if e.down || e.Peer == nil || e.idle != nil && e.idle() {
		return
	}
	if e.outbound == nil {
		if e.everUp {
			s.blocked++
		}
		return
	}
	out, to := *e.outbound, s.ends[1-e.index]
	s.sent++
	delay := time.Millisecond * time.Duration(1+s.rng.IntN(3))
	if s.maxDelay != 0 {
		delay = time.Duration(1 + s.rng.Int64N(int64(s.maxDelay)))
	}
	s.at(delay, func() {
		in, ok := to.inbound[out.SPI]
		if to.down || to.Peer == nil || !ok || in.Suite != out.Suite ||
			!bytes.Equal(in.Keys.Encryption, out.Keys.Encryption) || !bytes.Equal(in.Keys.Integrity, out.Keys.Integrity) {
			s.lost++
			if s.lost <= 3 {
				s.logf("%d lost a packet by %08x", e.index, out.SPI)
			}
			return
		}
		if len(in.Keys.Encryption) == 0 {
			s.fatalf("empty keys")
		}
		s.received++
		to.lastReceived = s.now
		if s.reportEvery != 0 {
			to.reported[out.SPI] = struct{}{}
			return
		}
		s.do(to, to.NoteReceived(s.now, out.SPI))
	})
}

// reportESP calls NoteReceived once per reportEvery, like ipsec's negotiator.
func (s *sim) reportESP(e *end) {
	s.at(s.reportEvery, func() { s.reportESP(e) })
	if e.down || e.Peer == nil {
		return
	}
	spis := slices.Sorted(maps.Keys(e.reported))
	clear(e.reported)
	for _, spi := range spis {
		s.do(e, e.NoteReceived(s.now, spi))
	}
}

// run advances the time by d.
func (s *sim) run(d time.Duration) {
	until := s.now.Add(d)
	steps := 0
	for {
		next := until
		if len(s.queue) > 0 {
			next = earlier(next, s.queue[0].at)
		}
		var who *end
		for _, e := range s.ends {
			if e.Peer != nil && !e.down && !e.Next().IsZero() && e.Next().Before(next) {
				next, who = e.Next(), e
			}
		}
		if next.After(s.now) {
			s.now, steps = next, 0
		}
		if steps++; steps > 1000 {
			s.fatalf("time stands still")
		}
		switch {
		case who != nil:
			s.do(who, who.Tick(s.now))
		case len(s.queue) > 0 && !s.queue[0].at.After(until):
			heap.Pop(&s.queue).(event).do()
		default:
			return
		}
	}
}

// check fails unless both ends have received ESP lately.
func (s *sim) check(what string) {
	s.t.Helper()
	for _, e := range s.ends {
		if e.outbound == nil || s.now.Sub(e.lastReceived) > 200*time.Millisecond {
			s.fatalf("%s: end %d: has outbound %v, last received a packet %v ago; problem %q", what, e.index, e.outbound != nil, s.now.Sub(e.lastReceived), e.Problem())
		}
		if n := len(e.children); n > 8 {
			s.fatalf("%s: end %d has %d SAs", what, e.index, n)
		}
		if n := len(e.v1) + len(e.v2); n > 8 {
			s.fatalf("%s: end %d has %d IKE SAs", what, e.index, n)
		}
	}
}

var modes = []Mode{Main, IKE2}

func eachSeed(t *testing.T, f func(t *testing.T, seed uint64, mode Mode)) {
	n := uint64(*seeds)
	if testing.Short() { // for the race detector, which finds little in a simulation: it is one goroutine
		n = (n + 4) / 5
	}
	for _, mode := range modes {
		for seed := range n {
			t.Run(fmt.Sprintf("%v/%d", mode, seed), func(t *testing.T) { f(t, seed, mode) })
		}
	}
}

const fastPhase1, fastPhase2 = "aes128-sha1-ecp256", "aes128-sha1"

func TestPeer_simultaneousStart(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(t, seed, cfg, cfg)
		s.start(s.ends[0])
		s.at(time.Duration(s.rng.Int64N(int64(60*time.Millisecond))), func() { s.start(s.ends[1]) })
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(10 * time.Second)
		s.check("after ten seconds")
		s.run(500 * time.Second)
		s.check("after rekeys")
		if s.lost != 0 {
			s.fatalf("%d packets of %d lost", s.lost, s.sent)
		}
	})
}

func TestPeer_rekeyWithoutLoss(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		passive := cfg
		passive.Passive = true
		s := newSim(t, seed, cfg, passive)
		s.nat = seed%2 == 0
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(500 * time.Second)
		s.check("after rekeys")
		if s.lost != 0 {
			s.fatalf("%d packets of %d lost", s.lost, s.sent)
		}
		if s.nat && s.ends[0].outbound.DestinationPort != 4500 || s.nat && s.ends[1].outbound.DestinationPort != 14500 || !s.nat && s.ends[0].outbound.DestinationPort != 0 {
			s.fatalf("NAT %v, ports %d and %d", s.nat, s.ends[0].outbound.DestinationPort, s.ends[1].outbound.DestinationPort)
		}
	})
}

func TestPeer_lossyNetwork(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := newSim(t, seed, cfg, cfg)
		s.loss, s.duplicate, s.jitter = 0.3, 0.2, 800*time.Millisecond
		s.start(s.ends[0])
		s.at(time.Duration(s.rng.Int64N(int64(3*time.Second))), func() { s.start(s.ends[1]) })
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(400 * time.Second)
		s.loss = 0
		s.run(100 * time.Second)
		s.check("after the network got well")
	})
}

func TestPeer_peerRestart(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		other := cfg
		other.Passive = seed%3 == 0
		s := newSim(t, seed, cfg, other)
		s.start(s.ends[1])
		s.start(s.ends[0])
		s.traffic(s.ends[0])
		s.traffic(s.ends[1])
		s.run(time.Duration(20+s.rng.IntN(60)) * time.Second)
		s.check("before")
		s.ends[1].down = true
		s.run(time.Duration(s.rng.IntN(20)) * time.Second)
		s.start(s.ends[1])
		s.run(60 * time.Second)
		s.check("after the restart")
	})
}

func TestPeerClose(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64, mode Mode) {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode = mode
		s := withPassivePeer(t, seed, cfg)
		s.run(10 * time.Second)
		s.do(s.ends[0], s.ends[0].Close(s.now))
		if s.ends[0].outbound != nil || len(s.ends[0].inbound) != 0 {
			s.fatalf("SAs left after Close")
		}
		s.ends[0].down = true
		s.run(time.Second)
		if s.ends[1].outbound != nil {
			s.fatalf("the other end still sends")
		}
	})
}

// Established reports whether there is an IKE SA (IKEv1: an ISAKMP SA).
func (p *Peer) Established() bool { return p.newestV1() != nil || p.newestV2() != nil }
