package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/resolve"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/tun"
)

var (
	outerC = netip.MustParseAddr("198.51.100.8")
	outerD = netip.MustParseAddr("198.51.100.9")
)

// names is a name server with one name. say sets its answer.
type names struct {
	mu        sync.Mutex
	addresses []netip.Addr // the answer; an error if there are none
	ttl       time.Duration
	asked     int
}

func (n *names) say(addresses ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = addresses
}

func (n *names) lookUp(context.Context, string) (resolve.Answer, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	if len(n.addresses) == 0 {
		return resolve.Answer{}, errors.New("no such host")
	}
	return resolve.Answer{Addresses: n.addresses, TTL: n.ttl}, nil
}

// count returns how often the server was asked.
func (n *names) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked
}

// startNamed starts a tunnel with a DNS name as remote, and the test's resolver, and waits for an answer.
func startNamed(t *testing.T, socket *memory.Socket, c keepalive.Config, lookUp func(context.Context, string) (resolve.Answer, error)) *endpoint {
	t.Helper()
	a := startOn(t, EngineOptions{LookupName: lookUp}, socket, outerA, outerB, func(cfg *Config) {
		cfg.RemoteAddress, cfg.Keepalive = "far.example", c
	})
	eventually(t, "the name is resolved", func() bool { return a.Status().CurrentRemoteAddress != "" })
	return a
}

// age sets the age of the last look-up, and starts a round.
func (s *endpoint) age(t *testing.T, by time.Duration) {
	t.Helper()
	s.do(t, func(c *control) { c.resolvedAt = time.Now().Add(-by) })
}

// lookUpAgain waits for another look-up, and a round with its answer.
func (s *endpoint) lookUpAgain(t *testing.T, n *names) {
	t.Helper()
	before := n.count()
	s.age(t, 2*maxTTL)
	eventually(t, "the name server is asked", func() bool { return n.count() > before })
	eventually(t, "the answer comes", func() (done bool) {
		s.do(t, func(c *control) { done = !c.resolving })
		return done
	})
	s.awaitRound(t)
}

func (s *endpoint) hasRemote(want netip.Addr) func() bool {
	return func() bool { return s.Status().CurrentRemoteAddress == want.String() }
}

func TestControl_noteAnswer(t *testing.T) {
	t.Run("again-after-the-ttl", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{ttl: 5 * time.Minute, addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say(outerD)
		a.age(t, n.ttl-time.Second)
		a.awaitRound(t)
		if asked := n.count(); asked != 1 {
			t.Errorf("the name server was asked %d times", asked)
		}
		a.age(t, 2*n.ttl)
		eventually(t, "the new address is used", a.hasRemote(outerD))
	})
	t.Run("last-answer-stays", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say()
		a.lookUpAgain(t, n)
		eventually(t, "it says so", func() bool { return a.warned(warning.NameNotRefreshed) })
		first := a.warns(warning.NameNotRefreshed)
		if !a.hasRemote(outerB)() {
			t.Errorf("the remote is %s", a.Status().CurrentRemoteAddress)
		}
		a.lookUpAgain(t, n)
		a.awaitRound(t)
		if now := a.warns(warning.NameNotRefreshed); now != first {
			t.Errorf("it warned of %+v, and then of %+v", first, now)
		}
		n.say(outerB)
		a.lookUpAgain(t, n)
		eventually(t, "it resolves", func() bool { return !a.warned(warning.NameNotRefreshed) })
	})
	t.Run("present-one-stays", func(t *testing.T) {
		socket, _ := memory.NewSocketPair()
		n := &names{addresses: []netip.Addr{outerB}}
		a := startNamed(t, socket, keepalive.Config{}, n.lookUp)
		n.say(netip.MustParseAddr("192.0.2.1"), outerB, outerD)
		a.lookUpAgain(t, n)
		if !a.hasRemote(outerB)() {
			t.Errorf("the remote is %s", a.Status().CurrentRemoteAddress)
		}
	})
	// A resolver that hangs delays no probe.
	t.Run("resolver-hangs", func(t *testing.T) {
		var asked atomic.Int32
		hangs := make(chan struct{})
		sa, sb := memory.NewSocketPair()
		a := startNamed(t, sa, keepalive.Config{Interval: time.Second, Retries: 10}, func(ctx context.Context, _ string) (resolve.Answer, error) {
			if asked.Add(1) == 1 {
				return resolve.Answer{Addresses: []netip.Addr{outerB}}, nil
			}
			close(hangs) // and is not called again meanwhile
			<-ctx.Done()
			return resolve.Answer{}, ctx.Err()
		})
		start(t, sb, outerB, outerA, nil)
		eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
		a.age(t, 2*minTTL)
		<-hangs
		last := a.Status().LastHeard
		for range 3 {
			eventually(t, "probes go on", func() bool { return a.Status().LastHeard.After(last) })
			last = a.Status().LastHeard
		}
	})
}

func TestControl_lookupDue(t *testing.T) {
	at := time.Unix(1000, 0)
	for _, test := range []struct {
		name     string
		remote   string
		ttl      time.Duration
		failures int
		state    keepalive.State
		want     time.Duration // from the last look-up to the next; negative is never
	}{
		{"ttl", "far.example", 5 * time.Minute, 0, keepalive.Up, 5 * time.Minute},
		{"ttl-without-keepalive", "far.example", 5 * time.Minute, 0, keepalive.Off, 5 * time.Minute},
		{"ttl-before-it-is-heard", "far.example", 5 * time.Minute, 0, keepalive.Waiting, 5 * time.Minute},
		{"least", "far.example", 0, 0, keepalive.Up, 30 * time.Second},
		{"most", "far.example", 24 * time.Hour, 0, keepalive.Up, time.Hour},
		{"lost", "far.example", time.Hour, 0, keepalive.Lost, 30 * time.Second},
		{"never-heard", "far.example", time.Hour, 0, keepalive.NeverHeard, 30 * time.Second},
		{"failed", "far.example", time.Hour, 1, keepalive.Up, time.Second},
		{"failed-again", "far.example", time.Hour, 4, keepalive.Up, 8 * time.Second},
		{"failed-long", "far.example", time.Hour, 1 << 40, keepalive.Lost, 30 * time.Second},
		{"address", "198.51.100.8", 0, 0, keepalive.Lost, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &control{Tunnel: &Tunnel{}, cfg: &Config{RemoteAddress: test.remote}}
			c.resolvedAt, c.ttl, c.failures = at, test.ttl, test.failures
			c.state.Store(uint32(test.state))
			due := c.lookupDue()
			if test.want < 0 {
				if !due.IsZero() {
					t.Errorf("due at %v", due)
				}
				return
			}
			if got := due.Sub(at); got != test.want {
				t.Errorf("due after %v, want %v", got, test.want)
			}
			c.jitter = maxJitter
			if got := c.lookupDue().Sub(at); got != test.want+test.want/10 {
				t.Errorf("with jitter, due after %v, want %v", got, test.want+test.want/10)
			}
			c.resolving = true
			if due := c.lookupDue(); !due.IsZero() {
				t.Errorf("under way, due at %v", due)
			}
		})
	}
}

func TestControl_chooseRemote(t *testing.T) {
	b, c, d := outerB, outerC, outerD // ascending
	unusable, own := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("192.0.2.1")
	for _, test := range []struct {
		name      string
		answer    []netip.Addr
		state     keepalive.State
		encrypted bool
		candidate netip.Addr // before
		heard     bool       // the peer was heard from the candidate
		again     bool       // the candidate was tried for minTTL
		since     time.Duration
		remote    netip.Addr // afterwards; before it is b
		then      netip.Addr // the candidate afterwards
	}{
		{name: "named", answer: []netip.Addr{b}, state: keepalive.Up, remote: b},
		{name: "among-others", answer: []netip.Addr{b, c}, state: keepalive.Up, again: true, remote: b},
		{name: "off", answer: []netip.Addr{c, d}, state: keepalive.Off, remote: c},
		{name: "off-named", answer: []netip.Addr{b, c}, state: keepalive.Off, remote: b},
		{name: "not-heard-yet", answer: []netip.Addr{c}, state: keepalive.Waiting, remote: c},
		{name: "not-heard-yet-named", answer: []netip.Addr{b}, state: keepalive.Waiting, again: true, remote: b},
		{name: "not-heard-yet-of-several", answer: []netip.Addr{b, c}, state: keepalive.Waiting, remote: b, then: c},
		{name: "not-heard-yet-encrypted", answer: []netip.Addr{b, c}, state: keepalive.Waiting, encrypted: true, remote: b},
		{name: "unusable-lowest", answer: []netip.Addr{own, d}, state: keepalive.Waiting, remote: d},
		{name: "heard", answer: []netip.Addr{c}, state: keepalive.Up, remote: b, then: c},
		{name: "candidate-silent", answer: []netip.Addr{c}, state: keepalive.Up, candidate: c, again: true, remote: b, then: c},
		{name: "candidate-silent-next", answer: []netip.Addr{c, d}, state: keepalive.Up, candidate: c, again: true, remote: b, then: d},
		{name: "candidate-stays", answer: []netip.Addr{c, d}, state: keepalive.Up, candidate: c, remote: b, then: c},
		{name: "candidate-heard", answer: []netip.Addr{c, d}, state: keepalive.Up, candidate: d, heard: true, remote: d},
		{name: "named-again", answer: []netip.Addr{b}, state: keepalive.Up, candidate: c, again: true, remote: b},
		{name: "lost", answer: []netip.Addr{c}, state: keepalive.Lost, candidate: c, remote: c},
		{name: "lost-named", answer: []netip.Addr{b}, state: keepalive.Lost, again: true, remote: b},
		{name: "lost-of-several", answer: []netip.Addr{b, c, d}, state: keepalive.Lost, remote: b, then: c},
		{name: "lost-of-several-next", answer: []netip.Addr{b, c, d}, state: keepalive.Lost, candidate: d, again: true, remote: b, then: c},
		{name: "never-heard-of-several", answer: []netip.Addr{b, d}, state: keepalive.NeverHeard, remote: b, then: d},
		{name: "lost-heard", answer: []netip.Addr{b, d}, state: keepalive.Lost, candidate: d, heard: true, remote: d},
		{name: "unusable", answer: []netip.Addr{unusable}, state: keepalive.Up, remote: b},
		{name: "unusable-next", answer: []netip.Addr{d, unusable}, state: keepalive.Up, candidate: d, again: true, remote: b},
		{name: "after-unusable", answer: []netip.Addr{d, unusable}, state: keepalive.Up, candidate: unusable, again: true, remote: b, then: d},
		{name: "candidate-not-named", answer: []netip.Addr{d}, state: keepalive.Up, candidate: c, remote: b, then: d},
		{name: "off-lowest", answer: []netip.Addr{netip.MustParseAddr("192.0.2.2"), c}, state: keepalive.Off, remote: netip.MustParseAddr("192.0.2.2")},
		{name: "encrypted-named-again", answer: []netip.Addr{b, d}, state: keepalive.Lost, encrypted: true, candidate: c, remote: b},
		{name: "encrypted-heard", answer: []netip.Addr{c}, state: keepalive.Up, encrypted: true, remote: b, then: c},
		{name: "encrypted-lost", answer: []netip.Addr{c}, state: keepalive.Lost, encrypted: true, candidate: c, remote: c},
		{name: "encrypted-tried", answer: []netip.Addr{b, c}, state: keepalive.Lost, encrypted: true, since: 101 * time.Second, remote: c},
		{name: "encrypted-being-tried", answer: []netip.Addr{b, c}, state: keepalive.Lost, encrypted: true, since: 99 * time.Second, remote: b},
		{name: "encrypted-one", answer: []netip.Addr{b}, state: keepalive.Lost, encrypted: true, since: time.Hour, remote: b},
		{name: "no-answer-yet", state: keepalive.Lost, remote: b},
	} {
		t.Run(test.name, func(t *testing.T) {
			network := &fakeNetwork{route: netstate.Route{Source: outerA.As4(), MTU: 1500}, routes: map[[4]byte]netstate.Route{unusable.As4(): {Local: true}, own.As4(): {Local: true}}}
			log := slog.New(slog.NewTextHandler(network, nil))
			cfg := Default()
			cfg.RemoteAddress = "far.example"
			c := &control{Tunnel: &Tunnel{engine: &Engine{network: network}, log: log}, cfg: &cfg, remote: b}
			c.iface.Store(&tun.State{})
			c.ifindex = 7
			c.follower = network.Follow(c.query(), func() {})
			c.route.Store(&route{path: underlay.Path{Local: outerA.As4(), Remote: b.As4(), Link: new(underlay.Link)}})
			c.state.Store(uint32(test.state))
			if test.encrypted {
				c.ipsecPolicy = new(ipsecPolicy)
			}
			now := time.Now()
			c.addresses, c.remoteSince = test.answer, now.Add(-test.since)
			if test.candidate.IsValid() {
				if c.tried, c.triedAt = test.candidate, now.Add(-minTTL+1); test.again {
					c.triedAt = now.Add(-minTTL)
				}
				path := underlay.Path{Local: outerA.As4(), Remote: test.candidate.As4()}
				c.candidate.Store(newOtherRemote(&path, false))
				c.candidate.Load().heard.Store(test.heard)
			}
			for range 3 { // the first call decides, further ones change nothing
				c.chooseRemote(now)
				if test.heard { // as tick does
					c.state.Store(uint32(keepalive.Up))
				}
				if c.remote != test.remote {
					t.Errorf("the remote is %v, want %v", c.remote, test.remote)
				}
				var got netip.Addr
				if o := c.candidate.Load(); o != nil {
					got = address(o.path.Remote)
					if o.path.Local != outerA.As4() || o.path.Link != nil || o.previous {
						t.Errorf("the candidate is %+v", o)
					}
				}
				if got != test.then {
					t.Errorf("the candidate is %v, want %v", got, test.then)
				}
				if test.remote != b && c.previous == nil {
					t.Error("there is no previous remote")
				}
				if len(network.followers) != 1 {
					t.Errorf("%d followers are left", len(network.followers))
				}
			}
		})
	}
}

// dataFrom returns an outer packet from a remote with an inner packet.
func dataFrom(remote netip.Addr, inner []byte) []byte {
	outer := make([]byte, ipv4.HeaderLen, ipv4.HeaderLen+len(inner))
	h := ipv4.Header{TotalLen: cap(outer), TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: remote.As4(), Destination: outerA.As4()}
	h.Put(outer)
	return append(outer, inner...)
}

// delivers injects an outer packet from a remote, and reports whether its inner packet is delivered.
func (s *endpoint) delivers(t *testing.T, remote netip.Addr) bool {
	t.Helper()
	rx, drops := s.Status().RxPacket, s.Status().ProcessDrops["unknown-peer"]
	if err := s.socket.Inject(dataFrom(remote, datagram(100, nil)), packet.Offload{Checksum: packet.ChecksumValid}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is delivered or dropped", func() bool {
		now := s.Status()
		return now.RxPacket > rx || now.ProcessDrops["unknown-peer"] > drops
	})
	if s.Status().RxPacket == rx {
		return false
	}
	s.device.ReceiveWithin(patience)
	return true
}

// A name has another address: the old one stays in use until the peer is heard from the new one, and no
// packet of either is lost.
func TestControl_candidate(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	n := &names{addresses: []netip.Addr{outerB}}
	a := startNamed(t, sa, keepalive.Config{Interval: time.Second, Retries: 60}, n.lookUp)
	b := start(t, sb, outerB, outerA, nil)
	eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
	if got := sa.Reception().Remote; got != outerB.As4() {
		t.Errorf("packets of %v only are received", address(got))
	}
	if a.delivers(t, outerD) {
		t.Error("what DNS has not named is accepted")
	}

	n.say(outerD)
	a.lookUpAgain(t, n)
	eventually(t, "it says so", func() bool { return a.warns(warning.OtherAddress).Detail == outerD.String() })
	first := a.warns(warning.OtherAddress)
	a.lookUpAgain(t, n)
	if s := a.Status(); s.CurrentRemoteAddress != outerB.String() || s.CandidateRemoteAddress != outerD.String() {
		t.Errorf("%s is used, and %q the candidate", s.CurrentRemoteAddress, s.CandidateRemoteAddress)
	}
	if now := a.warns(warning.OtherAddress); now != first {
		t.Errorf("it warned of %+v, and then of %+v", first, now)
	}
	if got := sa.Reception().Remote; got != [4]byte{} {
		t.Errorf("packets of %v only are received", address(got))
	}
	a.send(t, b, datagram(100, nil))
	if !a.delivers(t, outerB) || a.delivers(t, outerC) {
		t.Error("one of the present remote is not delivered, or one of another address is")
	}
	if !a.hasRemote(outerB)() {
		t.Error("another address has an effect")
	}

	cfg := Default()
	cfg.Name, cfg.LocalAddress, cfg.RemoteAddress, cfg.Keepalive = "second", outerD, outerA.String(), keepalive.Config{}
	if _, err := b.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new address answers a probe, and is used", a.hasRemote(outerD))
	if s := a.Status(); s.CandidateRemoteAddress != "" || s.KeepaliveState != "up" {
		t.Errorf("the candidate is %q, and the keepalive %s", s.CandidateRemoteAddress, s.KeepaliveState)
	}
	if !a.delivers(t, outerB) || !a.delivers(t, outerD) {
		t.Error("one of the previous remote is not delivered, or one of the new")
	}
	var last time.Time
	a.do(t, func(c *control) { last, c.previousUntil = c.previousUntil, time.Now() })
	if time.Until(last) > previousHolds {
		t.Errorf("the previous remote is accepted until %v", last)
	}
	eventually(t, "the previous remote is none any more", func() bool { return len(*a.engine.others.Load()) == 0 })
	if a.delivers(t, outerB) || !a.delivers(t, outerD) {
		t.Error("the previous remote is accepted, or the present one is not")
	}
	eventually(t, "only packets of the new one are received", func() bool { return sa.Reception().Remote == outerD.As4() })
}

// A reflect probe from the candidate is answered to the candidate.
func TestControl_candidateProbes(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	n := &names{addresses: []netip.Addr{outerB}}
	a := startNamed(t, sa, keepalive.Config{Interval: time.Hour, Retries: 60}, n.lookUp)
	if !a.delivers(t, outerB) {
		t.Fatal("it is not delivered")
	}
	n.say(outerD)
	a.lookUpAgain(t, n)
	eventually(t, "there is a candidate", func() bool { return a.Status().CandidateRemoteAddress == outerD.String() })
	if err := sa.Inject(dataFrom(outerD, keepalive.ReflectProbe(outerD.As4(), outerA.As4())), packet.Offload{Checksum: packet.ChecksumValid}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is answered to the candidate", func() bool {
		b := sb.ReceiveWithin(patience)
		if b == nil {
			t.Fatal("no packet comes")
		}
		p, err := ipv4.Parse(b.Bytes())
		return err == nil && p.Destination() == outerD.As4() && p.TotalLen() == ipv4.HeaderLen
	})
	eventually(t, "it is used", a.hasRemote(outerD))
}

// A packet from the previous remote does not make the keepalive up: it says nothing of the present remote.
func TestControl_previousIsNotHeard(t *testing.T) {
	sa, _ := memory.NewSocketPair()
	n := &names{addresses: []netip.Addr{outerB}}
	a := startNamed(t, sa, keepalive.Config{Interval: time.Hour, Retries: 60}, n.lookUp)
	n.say(outerD)
	a.lookUpAgain(t, n)
	eventually(t, "the new one is used: the old one was not heard", a.hasRemote(outerD))
	if !a.delivers(t, outerB) {
		t.Error("one of the previous remote is not delivered")
	}
	a.awaitRound(t)
	if s := a.Status(); s.KeepaliveState != "waiting" || !s.LastHeard.IsZero() {
		t.Errorf("the keepalive is %s, last heard %v", s.KeepaliveState, s.LastHeard)
	}
}

// Packets from the candidate go to another tunnel whose remote has that address, and no entry is left of a
// tunnel that is closed, or whose remote is set anew.
func TestControl_candidateOfAnother(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, _ := newModel(t, socket)
	n := &names{addresses: []netip.Addr{outerB}}
	e.lookupName = n.lookUp
	named := "name=n local-address=192.0.2.1 remote-address=far.example keepalive=1h"
	apply(t, e, named)
	a := e.Tunnel("n")
	resolved := func() bool { return a.Status().CurrentRemoteAddress == outerB.String() }
	eventually(t, "the name is resolved", resolved)
	n.say(outerD)
	a.noteReceived(time.Now())
	a.events <- func(c *control) { c.resolvedAt = time.Now().Add(-2 * maxTTL) }
	eventually(t, "there is a candidate", func() bool { return len(*e.others.Load()) == 2 })
	pair := pairOf([4]byte{192, 0, 2, 1}, outerD.As4())
	if (*e.others.Load())[pair] != a {
		t.Errorf("it is not among %v", *e.others.Load())
	}
	other := "name=o local-address=192.0.2.1 remote-address=" + outerD.String()
	apply(t, e, named, other)
	if (*e.table.Load())[pair] != e.Tunnel("o") {
		t.Error("the other tunnel has not got its pair")
	}
	apply(t, e, other, strings.Replace(named, "far.example", "198.51.100.77", 1))
	eventually(t, "there is no candidate of a name that is not asked for", func() bool { return len(*e.others.Load()) == 0 })
	if s := a.Status(); s.CandidateRemoteAddress != "" {
		t.Errorf("it is %s", s.CandidateRemoteAddress)
	}
	n.say(outerB)
	apply(t, e, other, named)
	eventually(t, "the name is resolved", resolved)
	a.noteReceived(time.Now())
	n.say(outerC)
	a.events <- func(c *control) { c.resolvedAt = time.Now().Add(-2 * maxTTL) }
	eventually(t, "there is a candidate", func() bool { return len(*e.others.Load()) == 2 })
	apply(t, e)
	if left := *e.others.Load(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// When the peer is lost, another address of its name is found by probes.
func TestControl_severalAddresses(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	n := &names{ttl: time.Hour, addresses: []netip.Addr{outerB, outerC, outerD}}
	a := startNamed(t, sa, keepalive.Config{Interval: time.Second, Retries: 2}, n.lookUp)
	b := start(t, sb, outerC, outerA, nil)
	eventually(t, "the lowest is not heard, and the second is", a.hasRemote(outerC))
	eventually(t, "it is up", func() bool { return a.Status().KeepaliveState == "up" })
	a.send(t, b, datagram(100, nil))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := Default()
	cfg.LocalAddress, cfg.RemoteAddress, cfg.Keepalive = outerB, outerA.String(), keepalive.Config{}
	if _, err := b.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first is heard then", a.hasRemote(outerB))
}

// While the DNS name changes from one address to the other and back, and the peer sends from both, no packet
// is dropped as unknown-peer.
func TestControl_candidateStream(t *testing.T) {
	sa, sb := memory.NewSocketPair()
	n := &names{addresses: []netip.Addr{outerB}}
	a := startNamed(t, sa, keepalive.Config{Interval: time.Second, Retries: 60}, n.lookUp)
	b := start(t, sb, outerB, outerA, nil)
	cfg := Default()
	cfg.LocalAddress, cfg.RemoteAddress, cfg.Keepalive = outerD, outerA.String(), keepalive.Config{}
	if _, err := b.engine.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the peer answers", func() bool { return a.Status().KeepaliveState == "up" })
	remotes := []netip.Addr{outerD, outerB}
	flip := func(to netip.Addr) {
		n.say(to)
		a.lookUpAgain(t, n)
		eventually(t, "it is used", a.hasRemote(to))
	}
	flip(outerD)
	stop, sent := make(chan struct{}), make(chan uint64)
	go func() {
		for i := uint64(0); ; i++ {
			if err := sa.Inject(dataFrom(remotes[i%2], datagram(100, nil)), packet.Offload{Checksum: packet.ChecksumValid}); err != nil {
				t.Error(err)
			}
			select {
			case <-stop:
				sent <- i + 1
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	}()
	var delivered atomic.Uint64
	go func() {
		for a.device.ReceiveWithin(patience) != nil {
			delivered.Add(1)
		}
	}()
	for i := range 20 {
		flip(remotes[(i+1)%2])
	}
	close(stop)
	total := <-sent
	eventually(t, "all are delivered or dropped", func() bool {
		s := a.Status()
		return delivered.Load()+s.ProcessDrops["unknown-peer"]+s.Drops["write-failed"] == total
	})
	if dropped := a.Status().ProcessDrops; len(dropped) > 0 {
		t.Errorf("dropped: %v", dropped)
	}
}

// An address of a DNS name to which there is no path does not keep the tunnel from another one, whether that has
// a path when the name is resolved or gets it later.
func TestControl_usableAddress(t *testing.T) {
	own, noRoute := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8")
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late=%v", late), func(t *testing.T) {
			socket, _ := memory.NewSocketPair()
			n := &names{addresses: []netip.Addr{own, noRoute, outerC}}
			e, m := newModel(t, socket)
			e.lookupName = n.lookUp
			unreachable := &netstate.NoRouteError{Destination: noRoute, Remedy: "add one"}
			m.fakeNetwork.routes = map[[4]byte]netstate.Route{own.As4(): {Local: true}}
			m.fakeNetwork.errs = map[[4]byte]error{noRoute.As4(): unreachable}
			if late {
				m.fakeNetwork.errs[outerC.As4()] = unreachable
			}
			apply(t, e, "name=a remote-address=far.example keepalive=10s,10 route=10.20.0.0/16")
			a := e.Tunnel("a")
			if late {
				eventually(t, "it waits", func() bool {
					return strings.Contains(a.Status().WaitingFor, "is an address of this host") && a.warned(warning.NoPath)
				})
				m.set(func(w *fakeNetwork) { delete(w.errs, outerC.As4()) })
			}
			eventually(t, "it runs", func() bool { s := a.Status(); return s.Running && s.CurrentRemoteAddress == outerC.String() })
			if n := m.logLines(warning.NoPath); late && n != 1 || !late && n != 0 || a.warned(warning.NoPath) {
				t.Errorf("logged %d times, and it warns of %+v", n, a.Status().Warnings)
			}
		})
	}
}
