package tunnel

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/test/memory"
)

// toRemotes starts a tunnel with two remotes, outerB and the next address: gateways if named, else inner destinations.
func toRemotes(t *testing.T, named bool, set func(*Config)) (a *endpoint, b, c netip.Addr) {
	t.Helper()
	sa, _ := memory.NewSocketPair()
	a = start(t, sa, outerA, outerB, func(cfg *Config) {
		cfg.RemoteAddress, cfg.LocalAddress = AnyRemote, outerA
		if set != nil {
			set(cfg)
		}
	})
	b, c = outerB, outerB.Next()
	var changes []netstate.RouteChange
	for _, r := range []netip.Addr{b, c} {
		hop := fib.Hop{}
		if named {
			hop.Gateway = r.As4()
		}
		changes = append(changes, netstate.RouteChange{Prefix: netip.PrefixFrom(r, 32), Routes: []fib.Route{{Hops: []fib.Hop{hop}}}})
	}
	a.network.followRoutes(changes)
	eventually(t, "the routes are followed", func() bool { return len(a.many.routes.Load().all) == map[bool]int{true: 2}[named] })
	return a, b, c
}

// told returns type, code and MTU of the ICMP error that a sender to an inner destination gets; 0 if none.
func (s *endpoint) told(t *testing.T, destination netip.Addr, length int) (kind [2]byte, mtu int) {
	t.Helper()
	p := datagram(length, func(h *ipv4.Header) { h.DF, h.Destination = true, destination.As4() })
	if err := s.device.Inject(p); err != nil {
		t.Fatal(err)
	}
	// An ICMP error comes before the next packet, which has a TTL of 0, is counted.
	before := s.Status().Drops[drop.InnerTTLZero.String()]
	if err := s.device.Inject(datagram(100, func(h *ipv4.Header) { h.TTL, h.Destination = 0, destination.As4() })); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is carried", func() bool { return s.Status().Drops[drop.InnerTTLZero.String()] > before })
	b := s.device.ReceiveWithin(time.Millisecond)
	if b == nil {
		return kind, 0
	}
	icmp := b.Bytes()[ipv4.HeaderLen:]
	return [2]byte(icmp), int(binary.BigEndian.Uint16(icmp[6:]))
}

// An ICMP error affects the remote that it is about, a gateway or an inner destination alike, and no other remote.
func TestControlErrorOf(t *testing.T) {
	for name, named := range map[string]bool{"gateway": true, "no gateway": false} {
		t.Run(name, func(t *testing.T) {
			a, b, c := toRemotes(t, named, func(cfg *Config) { cfg.DontFragment = true })
			p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
			injectErrors(t, a, outerError(outerA, b, p, 4, 1400))
			eventually(t, "the path MTU of one is learnt", func() bool { kind, mtu := a.told(t, b, 1480); return kind == [2]byte{3, 4} && mtu == 1380 })
			if kind, _ := a.told(t, c, 1480); kind != [2]byte{} {
				t.Errorf("that of the other is too: %v", kind)
			}
			if kind, _ := a.told(t, b, 1380); kind != [2]byte{} {
				t.Errorf("what fits is told %v", kind)
			}
			injectErrors(t, a, outerError(outerA, c, p, 1, 0))
			eventually(t, "the other is unreachable", func() bool { kind, _ := a.told(t, c, 100); return kind == [2]byte{3, 1} })
			if kind, _ := a.told(t, b, 100); kind != [2]byte{} {
				t.Errorf("the one is too: %v", kind)
			}

			// A packet of the remote ends that, and for a while further errors are not believed.
			in := datagram(100, func(h *ipv4.Header) { h.Source, h.Destination = c.As4(), [4]byte{10, 255, 0, 1} })
			outer := make([]byte, ipv4.HeaderLen+len(in))
			h := ipv4.Header{TotalLen: len(outer), TTL: 60, Protocol: ipv4.ProtocolIPIP, Source: c.As4(), Destination: outerA.As4()}
			h.Put(outer)
			copy(outer[ipv4.HeaderLen:], in)
			a.socket.Inject(outer, packet.Offload{})
			if got := a.device.ReceiveWithin(patience); got == nil {
				t.Fatal("it is not received")
			}
			eventually(t, "it is reachable", func() bool { kind, _ := a.told(t, c, 100); return kind == [2]byte{} })
			before := a.Status().Drops[drop.OuterErrorNotBelieved.String()]
			injectErrors(t, a, outerError(outerA, c, p, 1, 0))
			eventually(t, "it is alive", func() bool { return a.Status().Drops[drop.OuterErrorNotBelieved.String()] > before })

			// All that was learnt expires.
			a.do(t, func(c *control) {
				later := time.Now().Add(time.Hour)
				c.updateRemotes(map[[4]byte]bool{}, later)
				if len(c.learnt) > 0 || !named && len(c.many.routes.Load().all) > 0 {
					t.Errorf("%d learnt, %d routes", len(c.learnt), len(c.many.routes.Load().all))
				}
			})
			if kind, _ := a.told(t, b, 1480); kind != [2]byte{} {
				t.Errorf("the path MTU does not expire: %v", kind)
			}
		})
	}
}

// Forged errors about addresses that no packet can have gone to are ignored. Of those about other addresses the
// last maxLearnt are kept.
func TestControlLearn_bounded(t *testing.T) {
	a, _, _ := toRemotes(t, false, func(cfg *Config) { cfg.DontFragment = true })
	e := encap.OuterError{Type: ipv4.ICMPUnreachable, Code: 1, Protocol: ipv4.ProtocolIPIP, Source: outerA.As4(), Destination: [4]byte{203, 0, 113, 9}}
	if d := a.outerErrorOf(&e, time.Now()); d != drop.OuterErrorIgnored {
		t.Errorf("an address without a route: %v", d)
	}
	a.network.followRoutes([]netstate.RouteChange{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Routes: []fib.Route{{Hops: []fib.Hop{{}}}}}})
	now := time.Now()
	a.do(t, func(c *control) {
		for i := range 3 * maxLearnt {
			e.Destination = [4]byte{10, 1, byte(i >> 8), byte(i)}
			c.errorOf(&e, now.Add(time.Duration(i)*time.Millisecond))
		}
		if len(c.learnt) != maxLearnt || c.learnt[e.Destination] == nil {
			t.Errorf("%d are kept, of %d, and the last one is %v", len(c.learnt), 3*maxLearnt, c.learnt[e.Destination])
		}
	})
	// An error that is not believed takes no memory.
	e = encap.OuterError{Type: ipv4.ICMPUnreachable, Code: ipv4.CodeTooBig, NextHopMTU: 1400, TotalLen: 1000, DF: true, Protocol: ipv4.ProtocolIPIP, Source: outerA.As4(), Destination: [4]byte{10, 9, 9, 9}}
	a.do(t, func(c *control) {
		if c.errorOf(&e, now); c.learnt[e.Destination] != nil {
			t.Error("what is not believed is kept")
		}
	})
}
