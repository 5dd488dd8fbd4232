package ike

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// relayed returns a network in which an attacker on the path relays between two ends that have
// the same secret, but are configured for other peers.
func relayed(t *testing.T, mode Mode, a, b [2]netip.Addr) *sim {
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Mode = mode
	s := newSim(t, 1, cfg, cfg)
	s.relayed = true
	for i, addresses := range [][2]netip.Addr{a, b} {
		s.ends[i].cfg.Local, s.ends[i].cfg.Remote = addresses[0], addresses[1]
	}
	return s
}

// Where several hosts share a secret, an attacker on the path cannot connect two that are not
// configured for each other.
func TestIdentity(t *testing.T) {
	addressC := netip.MustParseAddr("203.0.113.1")
	toB := [2]netip.Addr{addressA, addressB}
	for _, mode := range modes {
		for name, c := range map[string]struct {
			other  [2]netip.Addr
			change func(*Config)
		}{
			"our-own-tunnel-to-another":       {[2]netip.Addr{addressA, addressC}, func(*Config) {}},
			"another-host/remote-id":          {[2]netip.Addr{addressC, addressA}, func(c *Config) { c.RemoteID = addressB.String() }},
			"another-host/known-from-earlier": {[2]netip.Addr{addressC, addressA}, func(c *Config) { c.Remembered = &Identity{[]byte("\x01\xc6\x33\x64\x01")} }},
		} {
			t.Run(fmt.Sprintf("%s/%v", name, mode), func(t *testing.T) {
				s := relayed(t, mode, toB, c.other)
				c.change(&s.ends[0].cfg)
				s.start(s.ends[0])
				s.start(s.ends[1])
				named := false
				for range 120 {
					s.run(500 * time.Millisecond)
					if s.ends[0].outbound != nil || s.ends[0].Established() {
						s.fatalf("the tunnel to %v is up and ends at %v", addressB, c.other[0])
					}
					// The initiator may know only that it was refused.
					named = named || s.ends[0].Problem().Kind == WrongIdentity || name == "our-own-tunnel-to-another" && s.ends[1].Problem().Kind == WrongIdentity
				}
				if !named {
					s.fatalf("problems %q, %q", s.ends[0].Problem(), s.ends[1].Problem())
				}
			})
		}
		// The identity of a peer behind a NAT is pinned across restarts of both ends.
		t.Run(fmt.Sprintf("behind-nat/%v", mode), func(t *testing.T) {
			cfg := testConfig(t, fastPhase1, fastPhase2)
			cfg.Mode = mode
			passive := cfg
			passive.Passive, passive.Remembered = true, new(Identity)
			s := newSim(t, 1, cfg, passive)
			s.nat = true
			for i, local := range []string{"10.0.0.7", "10.0.0.8", "10.0.0.7"} {
				s.ends[0].cfg.Local = netip.MustParseAddr(local)
				s.start(s.ends[1])
				s.start(s.ends[0])
				s.run(10 * time.Second)
				up, problem := s.ends[1].outbound != nil, s.ends[1].Problem()
				if up != (i != 1) || !up && (problem.Kind != WrongIdentity || !strings.Contains(problem.String(), "10.0.0.8, and was 10.0.0.7 before")) {
					s.fatalf("%s: up %v, %q", local, up, problem)
				}
			}
		})
	}
}

func TestPeerCheckIdentity(t *testing.T) {
	address := func(a string) string {
		ip := netip.MustParseAddr(a).As4()
		return string([]byte{idIPv4, 0, 0, 0}) + string(ip[:])
	}
	text := func(kind byte, s string) string { return string([]byte{kind, 0, 0, 0}) + s }
	us, them, inside, other := address("192.0.2.1"), address("198.51.100.1"), address("10.0.0.7"), address("10.0.0.8")
	behind, weAre, forced := nat{remote: true}, nat{local: true}, nat{forced: true}
	for name, c := range map[string]struct {
		id       string
		nat      nat
		remoteID string
		before   string
		want     bool
	}{
		"its address":                        {them, nat{}, "", "", true},
		"its address, behind a NAT":          {them, behind, "", inside, true},
		"our address":                        {us, behind, "", "", false},
		"our address, as before":             {us, behind, "", us, false},
		"another address":                    {inside, nat{}, "", "", false},
		"another address, we behind a NAT":   {inside, weAre, "", "", false},
		"another address, with ForceUDP":     {inside, forced, "", "", false},
		"another address, behind a NAT":      {inside, behind, "", "", true},
		"as before, behind a NAT":            {inside, behind, "", inside, true},
		"as before, without the NAT":         {inside, nat{}, "", inside, false},
		"not as before":                      {other, behind, "", inside, false},
		"not as before the NAT":              {inside, behind, "", them, false},
		"a name":                             {text(idFQDN, "b.example"), nat{}, "", "", false},
		"a name, behind a NAT":               {text(idFQDN, "b.example"), behind, "", "", true},
		"the name":                           {text(idFQDN, "b.example"), nat{}, "b.example", "", true},
		"the name, as a key ID":              {text(idKeyID, "b.example"), nat{}, "b.example", "", true},
		"the name, as a user's":              {text(idUserFQDN, "b@b.example"), nat{}, "b@b.example", "", true},
		"another name, behind a NAT":         {text(idFQDN, "c.example"), behind, "b.example", "", false},
		"its address, but a name is wanted":  {them, nat{}, "b.example", "", false},
		"the address that is wanted":         {inside, nat{}, "10.0.0.7", "", true},
		"the same, as text":                  {text(idFQDN, "10.0.0.7"), nat{}, "10.0.0.7", "", false},
		"its address, but another is wanted": {them, behind, "10.0.0.7", "", false},
		"cut short":                          {them[:6], nat{}, "", "", false},
		"a name of control characters":       {text(idKeyID, "a\nb\x00"), nat{}, "", "", false},
		"a network":                          {text(idIPv4Subnet, "\x0a\x00\x00\x00\xff\x00\x00\x00"), nat{}, "", "", false},
	} {
		p, err := NewPeer(Config{Local: addressA, Remote: addressB, Secret: Secret("x"), RemoteID: c.remoteID, Remembered: new(Identity)}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		if c.before != "" {
			p.cfg.Remembered.id = []byte(c.before[:1] + c.before[4:])
		}
		problem, ok := p.checkIdentity([]byte(c.id), c.nat)
		if ok != c.want {
			t.Errorf("%s: %v, %v", name, ok, problem)
		}
		if s := problem.String(); !ok && (problem.Kind != WrongIdentity || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })) {
			t.Errorf("%s: %q", name, s)
		}
	}
	if _, err := NewPeer(Config{Local: addressA, Remote: addressB, Secret: Secret("x"), RemoteID: "192.0.2.1"}, time.Time{}); err == nil {
		t.Error("our own address is taken for the peer's identity")
	}
}
