package ike

import (
	"net/netip"
	"testing"
	"time"
)

// A peer that has the secret, and initiates again and again without INITIAL_CONTACT or DELETE,
// does not exhaust memory, and its latest SA stays.
func TestMaxEstablished(t *testing.T) {
	for _, mode := range []Mode{IKE2, Main} {
		cfg := testConfig(t, fastPhase1, fastPhase2)
		cfg.Mode, cfg.Lifetime1, cfg.Lifetime2, cfg.DPDInterval = mode, 24*time.Hour, time.Hour, 0
		passive := cfg
		passive.Passive = true
		s := newSim(t, 1, cfg, passive)
		e := s.ends[1]
		s.start(e)
		bound := maxEstablished + maxHalfOpen
		var p *Peer
		for range 10 * dhPerSecond {
			c := cfg
			c.Local, c.Remote = addressA, addressB
			var err error
			if p, err = NewPeer(c, s.now); err != nil {
				t.Fatal(err)
			}
			todo := p.Tick(s.now)
			p.children = append(p.children, &Child{}) // so that it sends no INITIAL_CONTACT
			for len(todo) > 0 && p.Current() == nil {
				var next []Action
				for _, a := range todo {
					m, ok := a.(Send)
					if !ok {
						continue
					}
					for _, back := range e.Receive(s.now, m.To.Port(), netip.AddrPortFrom(addressA, m.LocalPort), m.Payload) {
						if m, ok := back.(Send); ok {
							next = append(next, p.Receive(s.now, m.To.Port(), netip.AddrPortFrom(addressB, m.LocalPort), m.Payload)...)
						}
					}
				}
				todo = next
			}
			s.now = s.now.Add(time.Second / dhPerSecond)
			e.Tick(s.now)
			if n := len(e.v1) + len(e.v2); n > bound {
				t.Fatalf("%v: %d states", mode, n)
			}
		}
		if len(e.children) > maxChildren || !p.Established() || !e.Established() {
			t.Errorf("%v: %d pairs of SAs, the last established: %v, %v", mode, len(e.children), p.Established(), e.Established())
		}
	}
}
