package conformance

import (
	"bytes"
	"fmt"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// outerRule gives the outer header's fields for a command line.
type outerRule struct {
	name  string
	flags []string
	dscp  func(inner uint8) uint8
	df    func(inner bool) bool
	ttl   func(inner uint8) uint8
}

func inherited[T any](inner T) T { return inner }

func fixed[T any](v T) func(T) T { return func(T) T { return v } }

var outerRules = []outerRule{
	{"default", nil, inherited[uint8], fixed(false), fixed[uint8](255)},
	{"dscp inherit, dont-fragment no, ttl 255", []string{"--dscp", "inherit", "--dont-fragment", "no", "--ttl", "255"}, inherited[uint8], fixed(false), fixed[uint8](255)},
	{"dscp 46, ttl 17", []string{"--dscp", "46", "--ttl", "17"}, fixed[uint8](46), fixed(false), fixed[uint8](17)},
	{"dscp 0, ttl 1", []string{"--dscp", "0", "--ttl", "1"}, fixed[uint8](0), fixed(false), fixed[uint8](1)},
	{"dont-fragment inherit, ttl inherit", []string{"--dont-fragment", "inherit", "--ttl", "inherit"}, inherited[uint8], inherited[bool], inherited[uint8]},
	{"dscp 63, dont-fragment inherit", []string{"--dscp", "63", "--dont-fragment", "inherit"}, fixed[uint8](63), inherited[bool], fixed[uint8](255)},
	// With a mark packets go through the kernel's routing, not to the link layer.
	{"fwmark", []string{"--fwmark", "7", "--dont-fragment", "inherit"}, inherited[uint8], inherited[bool], fixed[uint8](255)},
}

// The outer header has the tunnel's source and destination, protocol 4 and no options; DSCP,
// DF and TTL by the properties; ECN always copied (RFC 6040, section 4.1). The inner packet is
// unchanged (RFC 2003, section 3.1).
func TestEncapsulate_outerHeader(t *testing.T) {
	t.Parallel()
	for _, rule := range outerRules {
		t.Run(rule.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				sinkIPIP(t, b)
				wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
				c.upA(t, a, rule.flags...)
				into := newInjector(t, a, "t0", nil, "")

				inner := innerPackets()
				into.send(inner...)
				outer := wire.AwaitN(len(inner), netlab.Outer())
				for i, f := range outer {
					want, _ := ipv4.Parse(inner[i])
					tos := rule.dscp(want.DSCP())<<2 | uint8(want.ECN())
					netlab.Assert(t, f.Packet, netlab.Outer(netlab.Source(outerA), netlab.Destination(outerB),
						netlab.TOS(tos), netlab.DF(rule.df(want.DF())), netlab.TTL(rule.ttl(want.TTL())),
						netlab.TotalLen(20+len(inner[i])), netlab.Payload(inner[i]), idMatchesDF))
				}
			})
		})
	}
}

// innerPackets returns packets with every ECN codepoint, with and without DF, and with several
// TTL and DSCP values.
func innerPackets() (inner [][]byte) {
	for _, dscp := range []uint8{0, 10, 63} {
		for ecn := range uint8(4) {
			for _, df := range []bool{false, true} {
				for _, ttl := range []uint8{1, 64, 255} {
					h := aToB(uint16(1 + len(inner)))
					h.TOS, h.DF, h.TTL = dscp<<2|ecn, df, ttl
					inner = append(inner, datagram(h, len(inner)))
				}
			}
		}
	}
	return inner
}

// idMatchesDF checks that packets with DF have ID 0, and others have not: only packets that
// can be fragmented need one (RFC 6864, section 4).
func idMatchesDF(p ipv4.Packet) error {
	if p.DF() != (p.ID() == 0) {
		return fmt.Errorf("DF %v with ID %d", p.DF(), p.ID())
	}
	return nil
}

// Outer IDs do not repeat (RFC 6864, section 4.2).
func TestEncapsulate_outerIDs(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		c.upA(t, a)
		c.upB(t, b) // not sinkIPIP, which sends unreachables once its buffer is full
		into := newInjector(t, a, "t0", nil, "")
		const most = 5000
		for sent := 0; sent < most; {
			for range 100 { // more at once might overflow the TUN's queue
				sent++
				into.send(datagram(aToB(uint16(sent)), 10))
			}
			wire.AwaitN(sent, netlab.Outer())
		}
		first := make(map[uint16]int)
		for i, f := range wire.Matching(netlab.Outer()) {
			p, _ := ipv4.Parse(f.Packet)
			if before, ok := first[p.ID()]; ok || p.ID() == 0 {
				t.Fatalf("packets %d and %d have the ID %d", before, i, p.ID())
			}
			first[p.ID()] = i
		}
	})
}

// RFC 2003, section 3.1: inner options are not copied to the outer header.
func TestEncapsulate_innerOptions(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		wire := netlab.Capture(t, a, "veth0", nil)
		c.upA(t, a)
		c.upB(t, b)
		inside := netlab.CaptureReceived(t, b, "t0")
		h := aToB(77)
		timestamp := []byte{68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		inner := buildOptions(h, timestamp, udp(h, 9, 9, pattern(100)))
		newInjector(t, a, "t0", nil, "").send(inner)
		wire.Await(netlab.Outer(netlab.HeaderLen(20), netlab.Payload(inner)))
		got := inside.Await(netlab.ID(77))
		if !bytes.Equal(got.Packet, inner) {
			t.Errorf("it came as % x, want % x", got.Packet, inner)
		}
	})
}

// The inner TTL is decremented by the kernels that forward into and out of the tunnel, not by
// the tunnel itself (RFC 2003, section 3.1).
func TestEncapsulate_ttl(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		lanA, lanB := netlab.New(t), netlab.New(t)
		netlab.Veth(t, a, lanA, netlab.End{Name: "lan", Address: "10.1.0.1/24"}, netlab.End{Name: "eth0", Address: "10.1.0.2/24"})
		netlab.Veth(t, b, lanB, netlab.End{Name: "lan", Address: "10.2.0.1/24"}, netlab.End{Name: "eth0", Address: "10.2.0.2/24"})
		a.Sysctl("net.ipv4.ip_forward", "1")
		b.Sysctl("net.ipv4.ip_forward", "1")
		lanA.Run("ip", "route", "add", "default", "via", "10.1.0.1")
		lanB.Run("ip", "route", "add", "default", "via", "10.2.0.1")
		wire := netlab.Capture(t, a, "veth0", nil)
		far := netlab.Capture(t, lanB, "eth0", nil)
		c.upA(t, a, "--route", "10.2.0.0/24")
		c.upB(t, b, "--route", "10.1.0.0/24")

		ping(t, lanA, "-t", "40", "10.2.0.2")
		wire.Await(netlab.Outer(netlab.TTL(255), netlab.Inner(netlab.ICMP(8, 0), netlab.TTL(39))))
		far.Await(netlab.ICMP(8, 0), netlab.TTL(38))
	})
}

// The drop reasons of sent packets that depend on the packet only.
func TestEncapsulate_drops(t *testing.T) {
	t.Parallel()
	good := datagram(aToB(1), 100)
	nested := func(inner []byte, times int) []byte {
		for range times {
			inner = build(ipv4.Header{ID: 5, Protocol: ipv4.ProtocolIPIP, Source: addr("203.0.113.1"), Destination: addr("203.0.113.2")}, inner)
		}
		return inner
	}
	outer := build(ipv4.Header{ID: 5, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr(outerB)}, good)
	fromRemote := build(ipv4.Header{ID: 6, Protocol: ipv4.ProtocolUDP, Source: addr(outerB), Destination: addr(innerB)}, pattern(20))
	ipv6 := append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...)
	for _, test := range []struct {
		name, reason string
		packet       []byte
	}{
		{"IPv6", "inner-not-ipv4", ipv6},
		{"a header of 16 bytes", "inner-malformed", withByte(good, 0, 0x44)},
		{"a total length larger than the packet", "inner-malformed", withByte(good, 2, 0x10)},
		{"a total length within the header", "inner-malformed", withByte(withByte(good, 2, 0), 3, 19)},
		{"half a header", "inner-malformed", good[:10]},
		{"TTL 0", "inner-ttl-zero", withByte(good, 8, 0)},
		{"65,516 bytes", "inner-too-long", datagram(aToB(2), 65516-28)},
		{"its own outer packet", "loop", outer},
		{"its own outer packet in another tunnel's", "loop", nested(outer, 1)},
		{"its own outer packet in those of two other tunnels", "loop", nested(outer, 2)},
		{"a packet from the far end of the tunnel", "loop", fromRemote},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				sinkIPIP(t, b)
				wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
				d := c.upA(t, a, "--mtu", "65515")
				a.Run("ip", "link", "set", "dev", "t0", "mtu", "65535")
				into := newInjector(t, a, "t0", nil, "")
				into.send(test.packet, good)
				wire.Await(netlab.Outer(netlab.Payload(good)))
				// With the fast path the good packet overtakes the other.
				netlab.Eventually(t, "both are counted", func() bool { s := d.Status(); return s.TxPacket == 1 && len(s.AllDrops()) > 0 })
				if s := d.Status(); s.Drops[test.reason] != 1 || len(s.AllDrops()) != 1 {
					t.Errorf("drops are %v, want one %s", s.Drops, test.reason)
				}
				if got := wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP)); len(got) != 1 {
					t.Errorf("it was sent: %s", netlab.Describe(got[0].Packet))
				}
			})
		})
	}
}

// Bytes after the inner packet's total length are not sent.
func TestEncapsulate_trailingBytes(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		sinkIPIP(t, b)
		wire := netlab.Capture(t, a, "veth0", nil)
		c.upA(t, a)
		inner := datagram(aToB(3), 30)
		newInjector(t, a, "t0", nil, "").send(append(bytes.Clone(inner), 1, 2, 3, 4, 5))
		wire.Await(netlab.Outer(netlab.TotalLen(20+len(inner)), netlab.Payload(inner)))
	})
}

// A full queueing discipline of the underlay (ENOBUFS) is counted.
func TestEncapsulate_queueFull(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		if c.fast {
			t.Skip("the fast path gets no error: only the queueing discipline counts it")
		}
		a, b := hosts(t)
		sinkIPIP(t, b)
		a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), outerB) // the neighbour is known
		if out, err := a.Try("tc", "qdisc", "add", "dev", "veth0", "root", "tbf", "rate", "8kbit", "burst", "1600", "limit", "3000"); err != nil {
			t.Skipf("needs the token bucket filter of tc: %s", out)
		}
		d := c.upA(t, a)
		into := newInjector(t, a, "t0", nil, "")
		netlab.Eventually(t, "the queue is full", func() bool {
			for range 10 { // on a busy machine the link may drain a packet per status request
				into.send(datagram(aToB(4), 1200))
			}
			return d.Drops("queue-full") > 0
		})
	})
}
