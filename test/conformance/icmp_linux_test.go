package conformance

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// icmpError returns an ICMP error from the router to a. word is the second word of its header,
// with the next-hop MTU of a datagram too big.
func icmpError(kind, code byte, word uint32, quote []byte) []byte {
	message := append([]byte{kind, code, 0, 0, 0, 0, 0, 0}, quote...)
	binary.BigEndian.PutUint32(message[4:], word)
	binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
	return build(ipv4.Header{ID: 1, Protocol: ipv4.ProtocolICMP, Source: addr("192.0.2.254"), Destination: addr(farA)}, message)
}

// outerAToB returns an outer packet as a sends it to b, with DF=1.
func outerAToB(inner []byte) []byte {
	return build(ipv4.Header{DF: true, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}, inner)
}

// newForger starts a tunnel end at a, and returns an injector in a's only router.
func newForger(t *testing.T, c variant) (a *netlab.NS, d *netlab.Daemon, from *injector, inside *netlab.Recorder) {
	t.Helper()
	var router, b *netlab.NS
	a, router, b = routed(t)
	sinkIPIP(t, b)
	d = c.upFarA(t, a, "--dont-fragment", "inherit")
	from = newInjector(t, router, "to-a", a, "veth0")
	inside = netlab.CaptureReceived(t, a, "t0")
	return a, d, from, inside
}

// quotes checks that an ICMP error quotes the beginning of b.
func quotes(b []byte) netlab.Check {
	return func(p ipv4.Packet) error {
		quote := p.Payload()[8:]
		if len(quote) < min(28, len(b)) || len(quote) > len(b) || string(quote) != string(b[:len(quote)]) {
			return fmt.Errorf("it quotes % x", quote)
		}
		return nil
	}
}

// RFC 2003, sections 4 and 5: the ICMP error that the sender of the next inner packet gets
// after an error about an outer packet. It never quotes the packet that the outer error
// quotes, which may be forged.
func TestICMP_outerErrors(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	outer := outerAToB(datagram(h, 1400))
	h.ID = 2
	next := datagram(h, 1390) // too big for 1400 with its outer header
	relayed := func(kind, code byte) netlab.Check {
		return netlab.All(netlab.Destination(innerA), netlab.ICMP(kind, code), quotes(next))
	}
	for _, test := range []struct {
		name   string
		packet []byte
		want   netlab.Check // nil: no ICMP error
		drop   string
	}{
		{"datagram too big", icmpError(3, 4, 1400, outer), netlab.All(relayed(3, 4), nextHopMTU(1380)), ""},
		{"net unreachable", icmpError(3, 0, 0, outer), relayed(3, 1), ""},
		{"host unreachable", icmpError(3, 1, 0, outer), relayed(3, 1), ""},
		{"protocol unreachable", icmpError(3, 2, 0, outer), relayed(3, 1), ""},
		{"communication prohibited", icmpError(3, 13, 0, outer), relayed(3, 1), ""},
		{"time exceeded", icmpError(11, 0, 0, outer), relayed(3, 1), ""},
		{"a quote of 8 bytes", icmpError(3, 1, 0, outer[:28]), relayed(3, 1), ""},
		{"port unreachable", icmpError(3, 3, 0, outer), nil, "outer-error-ignored"},
		{"source route failed", icmpError(3, 5, 0, outer), nil, "outer-error-ignored"},
		{"reassembly time exceeded", icmpError(11, 1, 0, outer), nil, "outer-error-ignored"},
		{"a wrong ICMP checksum", withByte(icmpError(3, 1, 0, outer), 23, 0), nil, "outer-error-malformed"},
		{"datagram too big, about one with DF=0", icmpError(3, 4, 600, withByte(outer, 6, 0)), nil, "outer-error-not-believed"},
		{"datagram too big, about one that fits", icmpError(3, 4, 1448, outer), nil, "outer-error-not-believed"},
		{"about an encrypted packet", icmpError(3, 1, 0, withByte(outer, 9, 50)), nil, "outer-error-not-believed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, d, from, inside := newForger(t, c)
				wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
				into := newInjector(t, a, "t0", nil, "")
				from.send(test.packet)
				if test.want == nil {
					netlab.Eventually(t, "it is counted", func() bool { return d.Drops(test.drop) == 1 })
					into.send(next)
					wire.Await(netlab.Outer(netlab.Payload(next)))
					if got := inside.Frames(); len(got) != 0 {
						t.Errorf("the sender got %s", netlab.Describe(got[0].Packet))
					}
					return
				}
				netlab.Eventually(t, "the sender gets the ICMP error", func() bool {
					into.send(next)
					return len(inside.Matching(test.want)) > 0
				})
				if got := inside.Matching(netlab.Not(test.want)); len(got) != 0 {
					t.Errorf("the sender got %s", netlab.Describe(got[0].Packet))
				}
				for reason := range d.Status().AllDrops() {
					if reason != "too-big" {
						t.Errorf("drops are %v", d.Status().AllDrops())
					}
				}
			})
		})
	}
}

// Unreachables are ignored while packets from the peer arrive, in userspace or by the fast
// path: no inner sender gets an ICMP error, and nothing is logged.
func TestICMP_forgedUnreachable(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		d := c.upFarA(t, a)
		c.upFarB(t, b)
		from := newInjector(t, router, "to-a", a, "veth0")
		inside := netlab.Capture(t, a, "t0", func(f netlab.Frame) bool { return !f.Outgoing })
		outer := outerAToB(datagram(aToB(1), 200))
		netlab.Eventually(t, "the tunnel works", func() bool {
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
			t.Errorf("an inner sender got %s", netlab.Describe(got[0].Packet))
		}
		if s := d.Status(); len(s.Warnings) > 0 || strings.Contains(d.Log(), "level=WARN") {
			t.Errorf("it warns of %+v, or logs a warning", s.Warnings)
		}
	})
}

// A time exceeded about the outer packet is relayed as host unreachable.
func TestICMP_timeExceeded(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, _, b := routed(t)
		c.upFarA(t, a, "--ttl", "1")
		c.upFarB(t, b)
		netlab.Eventually(t, "a ping gets host unreachable", func() bool {
			out, err := a.Try("ping", "-c", "1", "-W", "1", innerB)
			if err == nil {
				t.Fatalf("it was answered: %s", out)
			}
			return strings.Contains(out, "Destination Host Unreachable")
		})
	})
}
