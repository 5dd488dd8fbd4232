package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/netlab"
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

// RFC 2003, sections 4.1 and 5.1: a router's datagram too big teaches the path
// MTU, the sender of the inner packet is told that less 20, and so is the sender
// of the next one that does not fit, at once.
func TestThePathMTUIsLearntAndToldToInnerSenders(t *testing.T) {
	t.Parallel()
	eachCarrier(t, func(t *testing.T, c carrier) {
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
		inside.Await(netlab.Destination(innerA), nextHopMTU(narrow-20), quotes(first))
		netlab.Eventually(t, "print shows the path MTU", func() bool { return d.Status().PathMTU == narrow })
		if mtu := d.Status().ActualMTU; mtu != 1480 {
			t.Errorf("actual-mtu is %d now: what was learnt is not the interface's MTU", mtu)
		}

		second := sized(2, narrow-20+1, true)
		into.send(second)
		inside.Await(netlab.Destination(innerA), nextHopMTU(narrow-20), quotes(second))
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
	eachCarrier(t, func(t *testing.T, c carrier) {
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

// outerAToB is an outer packet as a sends it to b.
func outerAToB(inner []byte) []byte {
	return build(ipv4.Header{ID: 7, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}, inner)
}

// forger is a tunnel end at a whose only router tells it things by hand.
func forger(t *testing.T, c carrier) (d *netlab.Daemon, from *injector, inside *netlab.Recorder) {
	t.Helper()
	a, router, b := routed(t)
	deafEnd(t, b)
	d = c.upFarA(t, a, "--dont-fragment", "inherit")
	from = inject(t, router, "to-a", a, "veth0")
	inside = netlab.CaptureReceived(t, a, "t0")
	return d, from, inside
}

// RFC 2003, section 4: what the sender of the inner packet is told of an error on
// the outer path, and what not.
func TestOuterErrorsAreRelayedToInnerSendersAsRFC2003Says(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	inner := datagram(h, 200)
	outer := outerAToB(inner)
	damaged := bytes.Clone(inner)
	damaged[8]++
	innerError := build(ipv4.Header{ID: 2, Protocol: ipv4.ProtocolICMP, Source: addr(innerA), Destination: addr(innerB)}, append([]byte{3, 1}, make([]byte, 40)...))
	relayed := func(kind, code byte) netlab.Check {
		return netlab.All(netlab.Destination(innerA), netlab.ICMP(kind, code), quotes(inner))
	}
	for _, test := range []struct {
		name   string
		packet []byte
		want   netlab.Check // nil: nothing is told
		drop   string
	}{
		{"datagram too big", icmpError(3, 4, 1400, outer), netlab.All(relayed(3, 4), nextHopMTU(1380)), ""},
		{"net unreachable", icmpError(3, 0, 0, outer), relayed(3, 1), ""},
		{"host unreachable", icmpError(3, 1, 0, outer), relayed(3, 1), ""},
		{"protocol unreachable", icmpError(3, 2, 0, outer), relayed(3, 1), ""},
		{"communication prohibited", icmpError(3, 13, 0, outer), relayed(3, 1), ""},
		{"time exceeded", icmpError(11, 0, 0, outer), relayed(3, 1), ""},
		{"port unreachable", icmpError(3, 3, 0, outer), nil, "outer-error-not-relayed"},
		{"source route failed", icmpError(3, 5, 0, outer), nil, "outer-error-not-relayed"},
		{"reassembly time exceeded", icmpError(11, 1, 0, outer), nil, "outer-error-not-relayed"},
		{"too short a quote", icmpError(3, 1, 0, outer[:28]), nil, "outer-error-quote-short"},
		{"a wrong ICMP checksum", with(icmpError(3, 1, 0, outer), 23, 0), nil, "outer-error-malformed"},
		{"a damaged quote", icmpError(3, 1, 0, outerAToB(damaged)), nil, "outer-error-malformed"},
		{"about an inner ICMP error", icmpError(3, 1, 0, outerAToB(innerError)), nil, "icmp-forbidden"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachCarrier(t, func(t *testing.T, c carrier) {
				d, from, inside := forger(t, c)
				from.send(test.packet)
				if test.want != nil {
					inside.Await(test.want)
					if drops := d.Status().Drops; len(drops) != 0 {
						t.Errorf("drops are %v", drops)
					}
					return
				}
				netlab.Eventually(t, "it is counted", func() bool { return d.Drops(test.drop) == 1 })
				// One that is told afterwards shows that the other was not.
				from.send(icmpError(3, 0, 0, outer))
				inside.Await(relayed(3, 1))
				if got := inside.Frames(); len(got) != 1 {
					t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
				}
			})
		})
	}
}

// Whoever wants to lower the path MTU has to know a packet of the tunnel at least.
func TestAForgedTooBigThatQuotesNoPacketOfTheTunnelIsIgnored(t *testing.T) {
	t.Parallel()
	inner := datagram(aToB(1), 200)
	other := func(change func(h *ipv4.Header)) []byte {
		h := ipv4.Header{ID: 7, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}
		change(&h)
		return build(h, inner)
	}
	eachCarrier(t, func(t *testing.T, c carrier) {
		d, from, inside := forger(t, c)
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
		h := aToB(2)
		h.DF = true
		from.send(icmpError(3, 4, 1400, outerAToB(datagram(h, 200))))
		inside.Await(nextHopMTU(1380))
		if got := inside.Frames(); len(got) != 1 {
			t.Errorf("the sender was told %s", netlab.Describe(got[0].Packet))
		}
		netlab.Eventually(t, "the right one counts", func() bool { return d.Status().PathMTU == 1400 })
		d.LogsOnce("path MTU learnt") // from no other
	})
}

// RFC 1191, section 3: whatever a message says, 68 bytes go through; and none
// raises the estimate.
func TestThePathMTUHasAFloorAndIsNotRaisedByMessages(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	outer := outerAToB(datagram(h, 1400))
	eachCarrier(t, func(t *testing.T, c carrier) {
		d, from, inside := forger(t, c)
		for _, step := range []struct {
			says uint32
			told uint16
		}{{1400, 1380}, {1450, 1380}, {0, 986 /* the plateau of 1006 */}, {10, 48}, {1000, 48}} {
			before := len(inside.Frames())
			from.send(icmpError(3, 4, step.says, outer))
			inside.AwaitN(before + 1)
			netlab.Assert(t, inside.Frames()[before].Packet, nextHopMTU(step.told))
			netlab.Eventually(t, "print shows it", func() bool { return d.Status().PathMTU == int(step.told)+20 })
		}
	})
}

// An outer TTL that is too low: the router between answers time exceeded.
func TestAnExpiredOuterTTLIsToldAsHostUnreachable(t *testing.T) {
	t.Parallel()
	eachCarrier(t, func(t *testing.T, c carrier) {
		a, _, b := routed(t)
		c.upFarA(t, a, "--ttl", "1")
		c.upFarB(t, b)
		if out, err := a.Try("ping", "-c", "1", "-W", netlab.Seconds(netlab.Patience()), innerB); err == nil || !strings.Contains(out, "Destination Host Unreachable") {
			t.Errorf("%v: %s", err, out)
		}
	})
}
