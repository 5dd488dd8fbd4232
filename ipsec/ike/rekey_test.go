package ike

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

// TestAnSAThatIsNotSentByYetFollowsTheNAT: between its making and its use the NAT
// can give the peer another port.
func TestAnSAThatIsNotSentByYetFollowsTheNAT(t *testing.T) {
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
		s.do(e, e.Rekey(s.now)) // which nobody uses at once, since nothing is sent
		s.run(time.Second)
		if len(e.children) < 2 {
			s.fatalf("%v: %d SAs", mode, len(e.children))
		}
		e.Moved(4711)
		for _, c := range e.children {
			if c.Outbound.DestinationPort != 4711 {
				s.fatalf("%v: after Moved port %d", mode, c.Outbound.DestinationPort)
			}
		}
		// An IKE message from yet another port.
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
