package conformance

import (
	"bytes"
	"fmt"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// An outer packet above the path MTU with DF=0 is fragmented: each fragment fits the link, all
// have the same ID, and they are contiguous (RFC 791, section 3.2). Both ends send and
// receive fragments.
func TestFragment_outer(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ mtu, size int }{{1500, 1472}, {9000, 8000}, {65515, 60000}, {65515, 65487}} {
		t.Run(fmt.Sprintf("mtu %d, ping of %d bytes", test.mtu, test.size), func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				wire := netlab.Capture(t, a, "veth0", nil)
				mtu := fmt.Sprint(test.mtu)
				da, db := c.upA(t, a, "--mtu", mtu), c.upB(t, b, "--mtu", mtu)
				size := fmt.Sprint(test.size)
				// Inner DF is set: the default dont-fragment=no clears the outer one.
				ping(t, a, "-s", size, "-M", "do", innerB)
				ping(t, b, "-s", size, "-M", "do", innerA)

				inner := test.size + 28
				for _, way := range []struct{ from, to string }{{outerA, outerB}, {outerB, outerA}} {
					checkFragments(t, wire, way.from, way.to, 20+inner, 2) // a request and a reply
				}
				for _, d := range []*netlab.Daemon{da, db} {
					netlab.Eventually(t, "two packets in each direction are counted", func() bool { s := d.Status(); return s.RxPacket == 2 && s.TxPacket == 2 })
					if drops := d.Status().AllDrops(); len(drops) != 0 {
						t.Errorf("drops are %v", drops)
					}
				}
			})
		})
	}
}

// checkFragments checks the captured fragments of count outer packets of total bytes.
func checkFragments(t *testing.T, wire *netlab.Recorder, from, to string, total, count int) {
	t.Helper()
	way := netlab.All(netlab.Source(from), netlab.Destination(to), netlab.Protocol(4))
	wire.AwaitN(count, way, netlab.MF(false))
	next := make(map[uint16]int) // ID → payload bytes so far
	for _, f := range wire.Matching(way) {
		p, _ := ipv4.Parse(f.Packet)
		netlab.Assert(t, f.Packet, netlab.DF(false), netlab.MaxTotalLen(1500), netlab.HeaderLen(20), netlab.Fragmented(true),
			netlab.FragmentOffset(next[p.ID()]), netlab.TTL(255))
		next[p.ID()] += len(p.Payload())
		if end := 20 + next[p.ID()]; p.MF() == (end == total) {
			t.Errorf("%s ends at %d of %d bytes", netlab.Describe(f.Packet), end, total)
		}
	}
	if len(next) != count || next[0] != 0 {
		t.Errorf("%d IDs, one 0: %v; want %d", len(next), next[0] != 0, count)
	}
}

// Fragments are reassembled in any order and with duplicates (RFC 791, section 3.2).
func TestFragment_reassembly(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		for _, order := range []string{"012345", "543210", "304152", "001122334455", "050505123450"} {
			r := newReceiver(t, c)
			h := bToA(1)
			h.Protocol = experimental
			inner := build(h, pattern(1300))
			pieces := fragment(outerBToA(inner), 224)
			for i := range order {
				r.from.send(pieces[order[i]-'0'])
			}
			r.settle()
			if got := r.got(); len(got) == 0 || !bytes.Equal(got[0].Packet, inner) {
				t.Errorf("in the order %s %d packets came", order, len(got))
			}
		}
	})
}

// An incomplete packet is not delivered, and does not block later ones.
func TestFragment_missing(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		pieces := fragment(outerBToA(datagram(bToA(1), 1300)), 224)
		r.from.send(append(pieces[:2], pieces[3:]...)...)
		r.settle()
		if got := r.got(); len(got) != 0 {
			t.Errorf("the host got %s", netlab.Describe(got[0].Packet))
		}
	})
}

// Inner fragments are carried unchanged.
func TestFragment_inner(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		c.upA(t, a)
		c.upB(t, b)
		inside := netlab.CaptureReceived(t, b, "t0")
		whole := datagram(aToB(5), 4000)
		pieces := fragment(whole, 1400)
		newInjector(t, a, "t0", nil, "").send(pieces...)
		for _, piece := range pieces {
			p, _ := ipv4.Parse(piece)
			got := inside.Await(netlab.ID(5), netlab.FragmentOffset(p.FragmentOffset()))
			if !bytes.Equal(got.Packet, piece) {
				t.Errorf("it came as %s, want %s", netlab.Describe(got.Packet), netlab.Describe(piece))
			}
		}
		ping(t, a, "-s", "20000", innerB) // fragmented by the host before the tunnel
	})
}
