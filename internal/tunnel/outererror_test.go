package tunnel

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// outerError returns an ICMP 3/code from a router that quotes the outer packet of p, with DF=1.
func outerError(local, remote netip.Addr, p []byte, code byte, mtu int) []byte {
	return outerErrorDF(local, remote, p, code, mtu, true)
}

func outerErrorDF(local, remote netip.Addr, p []byte, code byte, mtu int, df bool) []byte {
	outer := make([]byte, ipv4.HeaderLen+len(p))
	h := ipv4.Header{TotalLen: len(outer), DF: df, TTL: 60, Protocol: ipv4.ProtocolIPIP, Source: local.As4(), Destination: remote.As4()}
	h.Put(outer)
	copy(outer[ipv4.HeaderLen:], p)
	outer = outer[:min(len(outer), 128)]
	icmp := append([]byte{3, code, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, outer...)
	binary.BigEndian.PutUint16(icmp[2:], ipv4.Checksum(icmp, 0))
	b := make([]byte, ipv4.HeaderLen+len(icmp))
	h = ipv4.Header{TotalLen: len(b), TTL: 60, Protocol: ipv4.ProtocolICMP, Source: [4]byte{203, 0, 113, 1}, Destination: local.As4()}
	h.Put(b)
	copy(b[ipv4.HeaderLen:], icmp)
	return b
}

func injectErrors(t *testing.T, s *endpoint, errors ...[]byte) {
	t.Helper()
	for _, b := range errors {
		if err := s.socket.InjectError(b); err != nil {
			t.Fatal(err)
		}
	}
}

// Destination unreachable of any code is not believed of a peer that is alive.
func TestControlUnreachableError_activePeer(t *testing.T) {
	for _, code := range []byte{0, 1, 2, 13} {
		a, b := pair(t, nil)
		p := datagram(100, nil)
		b.send(t, a, p)
		injectErrors(t, a, outerError(outerA, outerB, p, code, 0))
		eventually(t, "it is counted", func() bool { return a.Status().Drops["outer-error-not-believed"] == 1 })
		if a.unreachable.Load() || len(a.Status().Warnings) > 0 {
			t.Errorf("3/%d was believed", code)
		}
	}
}

// An idle peer sends one packet per keepalive interval. Destination unreachable is believed only after
// that interval and recentlyReceived.
func TestControlUnreachableError_idlePeer(t *testing.T) {
	a, b := pair(t, func(c *Config) {
		if c.RemoteAddress == outerB.String() {
			c.Keepalive, c.KeepaliveProbe = keepalive.Config{Interval: time.Hour, Retries: 10}, keepalive.FormEmpty // not answered
		}
	})
	p := datagram(100, nil)
	b.send(t, a, p)
	e, d := encap.ParseError(outerError(outerA, outerB, p, 1, 0))
	if d != drop.None {
		t.Fatal(d)
	}
	last := time.Now()
	a.outerError(&e, last.Add(time.Hour))
	if a.unreachable.Load() || a.Status().Drops["outer-error-not-believed"] != 1 {
		t.Error("it is believed of a peer that has missed no probe")
	}
	a.outerError(&e, last.Add(time.Hour+2*recentlyReceived))
	a.do(t, func(*control) {})
	if !a.unreachable.Load() {
		t.Error("it is not believed of a peer that has missed one")
	}
}

// With ttl inherit, time exceeded tells that an inner TTL ran out on the way, as by a traceroute
// through the tunnel: not that the peer is unreachable.
func TestTunnelOuterError_timeExceeded(t *testing.T) {
	for _, test := range []struct {
		name                 string
		ttl                  int
		protocol             uint8
		alive                bool
		ignored, notBelieved uint64
		unreachable          bool
	}{
		{"inherit-and-alive", 0, ipv4.ProtocolIPIP, true, 1, 0, false},
		{"inherit-and-silent", 0, ipv4.ProtocolIPIP, false, 1, 0, false},
		{"not-our-protocol", 0, ipv4.ProtocolESP, false, 0, 1, false},
		{"255-and-alive", 255, ipv4.ProtocolIPIP, true, 0, 1, false},
		{"255-and-silent", 255, ipv4.ProtocolIPIP, false, 0, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := pair(t, func(c *Config) { c.TTL = test.ttl })
			if test.alive {
				b.send(t, a, datagram(100, nil))
			}
			a.outerError(&encap.OuterError{Type: ipv4.ICMPTimeExceeded, Protocol: test.protocol}, time.Now())
			a.do(t, func(*control) {})
			drops := a.Status().Drops
			if drops["outer-error-ignored"] != test.ignored || drops["outer-error-not-believed"] != test.notBelieved || a.unreachable.Load() != test.unreachable {
				t.Errorf("dropped %v, unreachable %v", drops, a.unreachable.Load())
			}
		})
	}
}

// With dont-fragment no (DF=0), fragmentation needed is forged, whatever DF it quotes.
func TestControlTooBig_withoutDF(t *testing.T) {
	for _, quoted := range []bool{false, true} {
		a, b := pair(t, nil)
		p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
		a.send(t, b, p)
		injectErrors(t, a, outerErrorDF(outerA, outerB, p, 4, 600, quoted))
		eventually(t, "it is counted", func() bool { return a.Status().Drops["outer-error-not-believed"] == 1 })
		if got := a.send(t, b, p); len(got) != len(p) || a.Status().PathMTU != 1500 || a.warned(warning.PathMTULowered) {
			t.Errorf("quoted with DF %v: the path MTU is %d", quoted, a.Status().PathMTU)
		}
	}
}

// No ICMP error is relayed to the inner host before it sends a packet itself.
func TestTunnelOuterError_notRelayed(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	injectErrors(t, a, outerError(outerA, outerB, p, 4, 1400), outerError(outerA, outerB, p, 1, 0))
	eventually(t, "both are believed", func() bool { return a.Status().PathMTU == 1400 && a.unreachable.Load() })
	q := datagram(60, nil)
	if got := b.send(t, a, q); string(got) != string(q) {
		t.Errorf("the host got % x", got)
	}
}

// A series of forged errors is logged once a minute at most.
func TestTunnelOuterError_logLimit(t *testing.T) {
	t.Run("falling-path-mtu", func(t *testing.T) {
		a, _ := pair(t, func(c *Config) { c.DontFragment = true })
		p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
		for mtu := 1500 - 150; mtu >= 600; mtu -= 150 {
			injectErrors(t, a, outerError(outerA, outerB, p, 4, mtu))
			eventually(t, "it is learnt", func() bool { return a.Status().PathMTU == mtu })
		}
		eventually(t, "it says where it ended", func() bool { return a.warns(warning.PathMTULowered).Detail == "path-mtu 600, says 203.0.113.1" })
		if n := a.network.logLines(warning.PathMTULowered); n != 1 {
			t.Errorf("logged %d times", n)
		}
		a.do(t, func(c *control) { c.round(time.Now().Add(time.Hour)) })
		if a.warned(warning.PathMTULowered) || a.Status().PathMTU != 1500 {
			t.Errorf("it is not forgotten: %+v", a.Status().State)
		}
	})
	t.Run("unreachable-and-heard", func(t *testing.T) {
		a, b := pair(t, nil)
		p := datagram(100, nil)
		now := time.Now()
		for range 10 {
			e, d := encap.ParseError(outerError(outerA, outerB, p, 2, 0))
			if d != drop.None {
				t.Fatal(d)
			}
			now = now.Add(2 * recentlyReceived)
			a.outerError(&e, now)
			a.do(t, func(*control) {})
			if !a.unreachable.Load() {
				t.Fatal("it is not believed")
			}
			if !a.warned(warning.PeerNotSetUp) {
				t.Error("it does not warn")
			}
			b.send(t, a, p)
			a.do(t, func(c *control) { c.updateReachability(now.Add(time.Hour)) }) // the unreachable state has expired
			if a.warned(warning.PeerNotSetUp) {
				t.Error("it warns still")
			}
		}
		if n := a.network.logLines(warning.PeerNotSetUp); n > 2 { // two minutes may have begun
			t.Errorf("logged %d times", n)
		}
	})
}

// Wakes coalesce into few rounds.
func TestControlRun_wakeBurst(t *testing.T) {
	a, _ := pair(t, nil)
	begin := time.Now()
	before := a.network.rounds()
	for range 300 {
		a.wakeControl()
		time.Sleep(time.Millisecond)
	}
	rounds, most := a.network.rounds()-before, int(time.Since(begin)/minRoundGap)+2
	if rounds > most {
		t.Errorf("%d rounds, want at most %d", rounds, most)
	}
	eventually(t, "there is a round at all", func() bool { return a.network.rounds() > before })
}

// For an encrypted tunnel an error must quote the current SPI and encapsulation (ESP or UDP).
func TestQuotesSPI(t *testing.T) {
	esp, udp := ipsec.Status{Established: true, OutboundSPI: 7}, ipsec.Status{Established: true, UDP: true, OutboundSPI: 7}
	for _, test := range []struct {
		name     string
		status   ipsec.Status
		protocol uint8
		spi      uint32
		want     bool
	}{
		{"esp", esp, ipv4.ProtocolESP, 7, true},
		{"another-spi", esp, ipv4.ProtocolESP, 8, false},
		{"no-sa", ipsec.Status{}, ipv4.ProtocolESP, 0, false},
		{"udp-though-there-is-no-nat", esp, ipv4.ProtocolUDP, 7, false},
		{"udp-without-spi", esp, ipv4.ProtocolUDP, 0, false},
		{"plain", esp, ipv4.ProtocolIPIP, 0, false},
		{"udp", udp, ipv4.ProtocolUDP, 7, true},
		{"short-quote-behind-nat", udp, ipv4.ProtocolUDP, 0, false},
		{"esp-though-there-is-a-nat", udp, ipv4.ProtocolESP, 7, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := quotesSPI(&test.status, &encap.OuterError{Protocol: test.protocol, SPI: test.spi}); got != test.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
