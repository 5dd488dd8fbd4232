package conformance

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// narrow is the MTU of the wire between the router and b in these tests.
const narrow = 1300

// narrowed are routed hosts with a narrow wire behind the router.
func narrowed(t *testing.T) (a, router, b *netlab.NS) {
	t.Helper()
	a, router, b = routed(t)
	router.Run("ip", "link", "set", "dev", "to-b", "mtu", fmt.Sprint(narrow))
	b.Run("ip", "link", "set", "dev", "veth0", "mtu", fmt.Sprint(narrow))
	return a, router, b
}

// nextHopMTU is what an ICMP datagram too big says.
func nextHopMTU(want uint16) netlab.Check {
	return netlab.All(netlab.ICMP(3, 4), func(p ipv4.Packet) error {
		if got := binary.BigEndian.Uint16(p.Payload()[6:]); got != want {
			return fmt.Errorf("next-hop MTU is %d, want %d", got, want)
		}
		return nil
	})
}

// quotes is that an ICMP error quotes the beginning of that packet.
func quotes(b []byte) netlab.Check {
	return func(p ipv4.Packet) error {
		quote := p.Payload()[8:]
		if len(quote) < min(28, len(b)) || len(quote) > len(b) || string(quote) != string(b[:len(quote)]) {
			return fmt.Errorf("it quotes % x", quote)
		}
		return nil
	}
}

// RFC 2003, sections 4.1, 5 and 5.1: a router's datagram too big teaches the path
// MTU, and the sender of the next inner packet that does not fit is told that less 20,
// at once. What the router quoted is told to nobody.
func TestThePathMTUIsLearntAndToldToInnerSenders(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := narrowed(t)
		deafEnd(t, b)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		d := c.upFarA(t, a, "--dont-fragment", "inherit")
		if s := d.Status(); s.PathMTU != 1500 || s.ActualMTU != 1480 {
			t.Fatalf("path-mtu %d, actual-mtu %d", s.PathMTU, s.ActualMTU)
		}
		inside := netlab.CaptureReceived(t, a, "t0")
		errors := netlab.Capture(t, router, "to-a", func(f netlab.Frame) bool { return f.Outgoing })
		into := inject(t, a, "t0", nil, "")
		sized := func(id uint16, length int, df bool) []byte {
			h := aToB(id)
			h.DF = df
			return datagram(h, length-28)
		}

		first := sized(1, 1400, true)
		into.send(first)
		wire.Await(netlab.Outer(netlab.DF(true), netlab.TotalLen(1420)))
		errors.Await(nextHopMTU(narrow))
		netlab.Eventually(t, "print shows the path MTU", func() bool { return d.Status().PathMTU == narrow })
		if mtu := d.Status().ActualMTU; mtu != 1480 {
			t.Errorf("actual-mtu is %d now: what was learnt is not the interface's MTU", mtu)
		}

		second := sized(2, narrow-20+1, true)
		into.send(second)
		inside.Await(netlab.Destination(innerA), nextHopMTU(narrow-20), quotes(second))
		if got := inside.Frames(); len(got) != 1 {
			t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
		}
		if n := d.Drops("too-big"); n != 1 {
			t.Errorf("%d packets are counted as too big, want the second", n)
		}
		third, whole := sized(3, narrow-20, true), sized(4, 1400, false)
		into.send(third, whole)
		wire.Await(netlab.Outer(netlab.DF(true), netlab.TotalLen(narrow), netlab.Payload(third)))
		wire.Await(netlab.Source(farA), netlab.Destination(farB), netlab.Protocol(4), netlab.DF(false), netlab.FragmentOffset(0),
			func(p ipv4.Packet) error {
				h, _, err := ipv4.ParseHeader(p.Payload())
				if err == nil && h.ID != 4 {
					err = fmt.Errorf("it is about packet %d", h.ID)
				}
				return err
			})
		if got := wire.Matching(netlab.TotalLen(20 + len(second))); len(got) != 0 {
			t.Errorf("the second was sent: %s", netlab.Describe(got[0].Packet))
		}
	})
}

// The inner sender is a TCP on another host, which knows nothing of the tunnel.
func TestBulkTCPSurvivesANarrowPath(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		for _, flag := range []string{"no", "inherit"} {
			a, _, b := narrowed(t)
			d := c.upFarA(t, a, "--dont-fragment", flag)
			c.upFarB(t, b, "--dont-fragment", flag, "--mtu", "1480")
			// b's link is narrow, and it knows. a has to learn.
			transfer(t, a, b, innerB, 4<<20)
			transfer(t, b, a, innerA, 4<<20)
			if flag == "inherit" {
				netlab.Eventually(t, "print shows the path MTU", func() bool { return d.Status().PathMTU == narrow })
			}
		}
	})
}

// icmpError is an ICMP error from the router to a; word is the second of its
// header, with a next-hop MTU.
func icmpError(kind, code byte, word uint32, quote []byte) []byte {
	message := append([]byte{kind, code, 0, 0, 0, 0, 0, 0}, quote...)
	binary.BigEndian.PutUint32(message[4:], word)
	binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
	return build(ipv4.Header{ID: 1, Protocol: ipv4.ProtocolICMP, Source: addr("192.0.2.254"), Destination: addr(farA)}, message)
}

// outerAToB is an outer packet as a sends it to b, with DF=1.
func outerAToB(inner []byte) []byte {
	return build(ipv4.Header{DF: true, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}, inner)
}

// forger is a tunnel end at a whose only router tells it things by hand.
func forger(t *testing.T, c variant) (a *netlab.NS, d *netlab.Daemon, from *injector, inside *netlab.Recorder) {
	t.Helper()
	var router, b *netlab.NS
	a, router, b = routed(t)
	deafEnd(t, b)
	d = c.upFarA(t, a, "--dont-fragment", "inherit")
	from = inject(t, router, "to-a", a, "veth0")
	inside = netlab.CaptureReceived(t, a, "t0")
	return a, d, from, inside
}

// RFC 2003, sections 4 and 5: what the sender of the next inner packet is told after an
// error on the outer path, and what not. It is never about what the error quotes, which
// anybody may have invented.
func TestOuterErrorsAreToldToInnerSendersAsRFC2003Says(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	outer := outerAToB(datagram(h, 1400))
	h.ID = 2
	next := datagram(h, 1390) // too big for 1400 with its outer header
	told := func(kind, code byte) netlab.Check {
		return netlab.All(netlab.Destination(innerA), netlab.ICMP(kind, code), quotes(next))
	}
	for _, test := range []struct {
		name   string
		packet []byte
		want   netlab.Check // nil: nothing is told
		drop   string
	}{
		{"datagram too big", icmpError(3, 4, 1400, outer), netlab.All(told(3, 4), nextHopMTU(1380)), ""},
		{"net unreachable", icmpError(3, 0, 0, outer), told(3, 1), ""},
		{"host unreachable", icmpError(3, 1, 0, outer), told(3, 1), ""},
		{"protocol unreachable", icmpError(3, 2, 0, outer), told(3, 1), ""},
		{"communication prohibited", icmpError(3, 13, 0, outer), told(3, 1), ""},
		{"time exceeded", icmpError(11, 0, 0, outer), told(3, 1), ""},
		{"a quote of 8 bytes", icmpError(3, 1, 0, outer[:28]), told(3, 1), ""},
		{"port unreachable", icmpError(3, 3, 0, outer), nil, "outer-error-ignored"},
		{"source route failed", icmpError(3, 5, 0, outer), nil, "outer-error-ignored"},
		{"reassembly time exceeded", icmpError(11, 1, 0, outer), nil, "outer-error-ignored"},
		{"a wrong ICMP checksum", with(icmpError(3, 1, 0, outer), 23, 0), nil, "outer-error-malformed"},
		{"datagram too big, about one with DF=0", icmpError(3, 4, 600, with(outer, 6, 0)), nil, "outer-error-not-believed"},
		{"datagram too big, about one that fits", icmpError(3, 4, 1448, outer), nil, "outer-error-not-believed"},
		{"about an encrypted packet", icmpError(3, 1, 0, with(outer, 9, 50)), nil, "outer-error-not-believed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, d, from, inside := forger(t, c)
				wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
				into := inject(t, a, "t0", nil, "")
				from.send(test.packet)
				if test.want == nil {
					netlab.Eventually(t, "it is counted", func() bool { return d.Drops(test.drop) == 1 })
					into.send(next)
					wire.Await(netlab.Outer(netlab.Payload(next)))
					if got := inside.Frames(); len(got) != 0 {
						t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
					}
					return
				}
				netlab.Eventually(t, "the sender is told", func() bool {
					into.send(next)
					return len(inside.Matching(test.want)) > 0
				})
				if got := inside.Matching(netlab.Not(test.want)); len(got) != 0 {
					t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
				}
				for reason := range d.Status().Drops {
					if reason != "too-big" {
						t.Errorf("drops are %v", d.Status().Drops)
					}
				}
			})
		})
	}
}

// A peer that is heard can be reached, whoever says otherwise, and whichever path hears
// it: no inner sender is told of it, and nothing is logged.
func TestForgedUnreachablesOfAPeerThatIsHeardAreNotBelieved(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		d := c.upFarA(t, a)
		c.upFarB(t, b)
		from := inject(t, router, "to-a", a, "veth0")
		inside := netlab.Capture(t, a, "t0", func(f netlab.Frame) bool { return !f.Outgoing })
		outer := outerAToB(datagram(aToB(1), 200))
		netlab.Eventually(t, "the tunnel carries", func() bool {
			_, err := a.Try("ping", "-c", "1", "-W", "1", innerB)
			return err == nil
		})
		codes := []byte{0, 1, 2, 13}
		for i, code := range codes {
			ping(t, a, innerB)
			from.send(icmpError(3, code, 0, outer))
			netlab.Eventually(t, "it is counted", func() bool { return d.Drops("outer-error-not-believed") == uint64(i+1) })
			ping(t, a, innerB)
		}
		if got := inside.Matching(netlab.ICMP(3, 1)); len(got) != 0 {
			t.Errorf("an inner sender was told %s", netlab.Describe(got[0].Packet))
		}
		if strings.Contains(d.Log(), "WARN") {
			t.Error("it is in the log")
		}
	})
}

// With the default, dont-fragment no, nothing that is sent teaches a path MTU, so that
// no error is believed; and the kernel, which fragments a large MTU's packets, is not
// taught by it either.
func TestAForgedTooBigIsNothingToATunnelThatClearsDF(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		deafEnd(t, b)
		d := c.upFarA(t, a, "--mtu", "4000")
		from := inject(t, router, "to-a", a, "veth0")
		outer := outerAToB(datagram(aToB(1), 1400))
		for _, mtu := range []uint32{68, 552, 1400, 0} {
			from.send(icmpError(3, 4, mtu, with(outer, 6, 0)))
		}
		netlab.Eventually(t, "they are counted", func() bool { return d.Drops("outer-error-not-believed") == 4 })
		if s := d.Status(); s.PathMTU != 1500 {
			t.Errorf("path-mtu is %d", s.PathMTU)
		}
		if route := a.Run("ip", "route", "get", farB); strings.Contains(route, "mtu") {
			t.Errorf("the kernel has learnt %s", route)
		}
	})
}

// Whoever wants to lower the path MTU has to know a packet of the tunnel at least.
func TestAForgedTooBigThatQuotesNoPacketOfTheTunnelIsIgnored(t *testing.T) {
	t.Parallel()
	inner := datagram(aToB(1), 1400)
	other := func(change func(h *ipv4.Header)) []byte {
		h := ipv4.Header{DF: true, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}
		change(&h)
		return build(h, inner)
	}
	eachVariant(t, func(t *testing.T, c variant) {
		_, d, from, inside := forger(t, c)
		for _, quote := range [][]byte{
			other(func(h *ipv4.Header) { h.Destination = addr("198.51.100.2") }),
			other(func(h *ipv4.Header) { h.Source = addr("192.0.2.7") }),
			other(func(h *ipv4.Header) { h.Source, h.Destination = h.Destination, h.Source }),
			other(func(h *ipv4.Header) { h.Protocol = ipv4.ProtocolUDP }),
			other(func(h *ipv4.Header) { h.Protocol = 47 }),
			inner,
			outerAToB(nil)[:19],
			[]byte("nothing that one would call a packet at all"),
		} {
			from.send(icmpError(3, 4, 600, quote))
		}
		// One about the tunnel, behind them, shows that they had their turn.
		from.send(icmpError(3, 4, 1400, outerAToB(inner)))
		netlab.Eventually(t, "the right one counts", func() bool { return d.Status().PathMTU == 1400 })
		if got := inside.Frames(); len(got) != 0 {
			t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
		}
		d.LogsOnce("path MTU learnt") // from no other
	})
}

// Whatever a message says, it lowers the estimate to net.ipv4.route.min_pmtu at most,
// which is 552 unless the operator says otherwise; and none raises it.
func TestThePathMTUHasAFloorAndIsNotRaisedByMessages(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	outer := outerAToB(datagram(h, 1400))
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		deafEnd(t, b)
		d := c.upFarA(t, a, "--dont-fragment", "inherit")
		from := inject(t, router, "to-a", a, "veth0")
		notBelieved := uint64(0)
		for _, step := range []struct {
			says     uint32
			want     int
			believed bool
		}{{1400, 1400, true}, {1450, 1400, false}, {0, 1006 /* the plateau */, true}, {10, 552, true}, {1000, 552, false}} {
			from.send(icmpError(3, 4, step.says, outer))
			if !step.believed {
				notBelieved++
			}
			netlab.Eventually(t, "it is taken in", func() bool {
				return d.Status().PathMTU == step.want && d.Drops("outer-error-not-believed") == notBelieved
			})
		}
	})
	t.Run("of the operator", func(t *testing.T) {
		a, router, b := routed(t)
		deafEnd(t, b)
		if out, err := a.Try("sysctl", "-w", "net.ipv4.route.min_pmtu=1280"); err != nil {
			t.Skipf("this kernel has one min_pmtu for all namespaces: %s", out)
		}
		d := variants[0].upFarA(t, a, "--dont-fragment", "inherit")
		inject(t, router, "to-a", a, "veth0").send(icmpError(3, 4, 10, outer))
		netlab.Eventually(t, "it is taken in", func() bool { return d.Status().PathMTU == 1280 })
	})
}

// An outer TTL that is too low: the router between answers time exceeded.
func TestAnExpiredOuterTTLIsToldAsHostUnreachable(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, _, b := routed(t)
		c.upFarA(t, a, "--ttl", "1")
		c.upFarB(t, b)
		netlab.Eventually(t, "a ping is told", func() bool {
			out, err := a.Try("ping", "-c", "1", "-W", "1", innerB)
			if err == nil {
				t.Fatalf("it was answered: %s", out)
			}
			return strings.Contains(out, "Destination Host Unreachable")
		})
	})
}
