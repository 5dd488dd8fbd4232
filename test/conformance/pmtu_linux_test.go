package conformance

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// narrow is the MTU of the link between the router and b.
const narrow = 1300

// routedNarrow is routed with a lower MTU between the router and b.
func routedNarrow(t *testing.T) (a, router, b *netlab.NS) {
	t.Helper()
	a, router, b = routed(t)
	router.Run("ip", "link", "set", "dev", "to-b", "mtu", fmt.Sprint(narrow))
	b.Run("ip", "link", "set", "dev", "veth0", "mtu", fmt.Sprint(narrow))
	return a, router, b
}

// nextHopMTU checks for an ICMP datagram too big with that next-hop MTU.
func nextHopMTU(want uint16) netlab.Check {
	return netlab.All(netlab.ICMP(3, 4), func(p ipv4.Packet) error {
		if got := binary.BigEndian.Uint16(p.Payload()[6:]); got != want {
			return fmt.Errorf("next-hop MTU is %d, want %d", got, want)
		}
		return nil
	})
}

// RFC 2003, sections 4.1, 5 and 5.1: a router's datagram too big sets the path MTU, and the
// sender of the next inner packet that does not fit gets one with that MTU less 20, at once.
// The packet that the router quoted causes none.
func TestPMTU_learnt(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routedNarrow(t)
		sinkIPIP(t, b)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		d := c.upFarA(t, a, "--dont-fragment", "inherit")
		if s := d.Status(); s.PathMTU != 1500 || s.ActualMTU != 1480 {
			t.Fatalf("path-mtu %d, actual-mtu %d", s.PathMTU, s.ActualMTU)
		}
		inside := netlab.CaptureReceived(t, a, "t0")
		errors := netlab.Capture(t, router, "to-a", func(f netlab.Frame) bool { return f.Outgoing })
		into := newInjector(t, a, "t0", nil, "")
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
			t.Errorf("the sender got %s", netlab.Describe(got[0].Packet))
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

// Bulk TCP survives a path MTU that is lower than the link's.
func TestPMTU_bulkTCP(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		for _, flag := range []string{"no", "inherit"} {
			a, _, b := routedNarrow(t)
			d := c.upFarA(t, a, "--dont-fragment", flag)
			c.upFarB(t, b, "--dont-fragment", flag, "--mtu", "1480")
			// b knows its link's MTU; a has to discover it.
			transfer(t, a, b, innerB, 4<<20)
			transfer(t, b, a, innerA, 4<<20)
			if flag == "inherit" {
				netlab.Eventually(t, "print shows the path MTU", func() bool { return d.Status().PathMTU == narrow })
			}
		}
	})
}

// With the default, dont-fragment no, outer packets have DF=0, so a datagram too big is forged
// and ignored. The kernel, which fragments outer packets above the MTU, must not learn from
// it either.
func TestPMTU_dfClear(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		sinkIPIP(t, b)
		d := c.upFarA(t, a, "--mtu", "4000")
		from := newInjector(t, router, "to-a", a, "veth0")
		outer := outerAToB(datagram(aToB(1), 1400))
		for _, mtu := range []uint32{68, 552, 1400, 0} {
			from.send(icmpError(3, 4, mtu, withByte(outer, 6, 0)))
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

// A datagram too big that quotes no packet of the tunnel is ignored.
func TestPMTU_foreignQuote(t *testing.T) {
	t.Parallel()
	inner := datagram(aToB(1), 1400)
	other := func(change func(h *ipv4.Header)) []byte {
		h := ipv4.Header{DF: true, TTL: 250, Protocol: ipv4.ProtocolIPIP, Source: addr(farA), Destination: addr(farB)}
		change(&h)
		return build(h, inner)
	}
	eachVariant(t, func(t *testing.T, c variant) {
		_, d, from, inside := newForger(t, c)
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
		// A valid one after them shows that they have been processed.
		from.send(icmpError(3, 4, 1400, outerAToB(inner)))
		netlab.Eventually(t, "the right one counts", func() bool { return d.Status().PathMTU == 1400 })
		if got := inside.Frames(); len(got) != 0 {
			t.Errorf("the sender got %s", netlab.Describe(got[0].Packet))
		}
		if w := d.AwaitWarning(warning.PathMTULowered); !strings.HasPrefix(w.Detail, "path-mtu 1400, ") { // by no other
			t.Errorf("%+v", w)
		}
	})
}

// The path MTU is never lowered below net.ipv4.route.min_pmtu, 552 by default, and no message
// raises it.
func TestPMTU_bounds(t *testing.T) {
	t.Parallel()
	h := aToB(1)
	h.DF = true
	outer := outerAToB(datagram(h, 1400))
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		sinkIPIP(t, b)
		d := c.upFarA(t, a, "--dont-fragment", "inherit")
		from := newInjector(t, router, "to-a", a, "veth0")
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
		sinkIPIP(t, b)
		if out, err := a.Try("sysctl", "-w", "net.ipv4.route.min_pmtu=1280"); err != nil {
			t.Skipf("this kernel has one min_pmtu for all namespaces: %s", out)
		}
		d := variants[0].upFarA(t, a, "--dont-fragment", "inherit")
		newInjector(t, router, "to-a", a, "veth0").send(icmpError(3, 4, 10, outer))
		netlab.Eventually(t, "it is taken in", func() bool { return d.Status().PathMTU == 1280 })
	})
}
