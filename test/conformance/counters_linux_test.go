package conformance

import (
	"testing"
	"time"

	"ipipd/test/netlab"
)

// ends are the daemons of a tunnel.
type ends struct{ a, b *netlab.Daemon }

// counted is the status of both ends.
type counted struct{ a, b netlab.Status }

func (e ends) status() counted { return counted{e.a.Status(), e.b.Status()} }

// equalSince reports whether each end's rx counters equal the other's tx counters since
// before, in packets and bytes.
func (c counted) equalSince(before counted) bool {
	return c.a.TxPacket-before.a.TxPacket == c.b.RxPacket-before.b.RxPacket &&
		c.a.RxPacket-before.a.RxPacket == c.b.TxPacket-before.b.TxPacket &&
		c.a.TxByte-before.a.TxByte == c.b.RxByte-before.b.RxByte &&
		c.a.RxByte-before.a.RxByte == c.b.TxByte-before.b.TxByte
}

// awaitEqual waits for equalSince.
func (e ends) awaitEqual(t *testing.T, before counted) {
	t.Helper()
	var now counted
	defer func() {
		if t.Failed() {
			t.Logf("before: %+v\nnow: %+v", before, now)
		}
	}()
	netlab.Eventually(t, "both ends have counted the same", func() bool {
		now = e.status()
		return now.equalSince(before)
	})
}

// awaitIdle waits until the packet counters stand still.
func (e ends) awaitIdle(t *testing.T) counted {
	t.Helper()
	now := e.status()
	netlab.Eventually(t, "nothing more is counted", func() bool {
		before := now
		time.Sleep(netlab.Scale(100 * time.Millisecond))
		now = e.status()
		return now.a.RxPacket == before.a.RxPacket && now.b.RxPacket == before.b.RxPacket &&
			now.a.TxPacket == before.a.TxPacket && now.b.TxPacket == before.b.TxPacket
	})
	return now
}

// settle repeats traffic until both ends count the same twice in a row. The first packets
// with partial checksums switch reception to the link layer, and may be received twice.
func (e ends) settle(t *testing.T, traffic func()) counted {
	t.Helper()
	now, agreed := e.status(), 0
	for range 20 {
		before := now
		traffic()
		if now = e.awaitIdle(t); !now.equalSince(before) {
			agreed = 0
		} else if agreed++; agreed == 2 {
			return now
		}
	}
	t.Fatalf("the two ends never count the same: %+v", now)
	return now
}

// Both ends count the same for superpackets, for pings with options, which go through
// userspace, and for fragments, with every variant and underlay.
func TestCounters_mixedTraffic(t *testing.T) {
	t.Parallel()
	for _, u := range underlays[:3] { // the others have no fast path, or no superpackets
		for _, far := range variants {
			t.Run(u.name+", "+far.name, func(t *testing.T) {
				t.Parallel()
				a, b := hosts(t)
				if u.wire != nil {
					u.wire(a, b)
				}
				da, db := fast.upA(t, a), far.upB(t, b)
				requireFastPath(t, da)
				// No more packets than the receiver's backlog (1000): a lost packet is
				// counted by one end only.
				const bytes = 1 << 20
				both := ends{da, db}
				// As much as is counted afterwards, so that reception changes now or never.
				before := both.settle(t, func() {
					transfer(t, a, b, innerB, bytes)
					transfer(t, b, a, innerA, bytes)
				})
				transfer(t, a, b, innerB, bytes)
				ping(t, a, "-T", "tsonly", innerB)
				ping(t, b, "-s", "5000", innerA)
				transfer(t, b, a, innerA, bytes)
				both.awaitEqual(t, before)
				if s := da.Status(); s.TxByte-before.a.TxByte < bytes || s.TxPacket-before.a.TxPacket < bytes/1500 {
					t.Errorf("1 MiB was sent, and counted as %d bytes in %d packets", s.TxByte, s.TxPacket)
				}
			})
		}
	}
}

// A superpacket of a UDP_SEGMENT socket counts as its segments.
func TestCounters_superpacket(t *testing.T) {
	t.Parallel()
	for _, u := range underlays[:2] {
		t.Run(u.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				if u.wire != nil {
					u.wire(a, b)
				}
				da, db := c.upA(t, a), c.upB(t, b)
				const segment, full, rest = 500, 40, 13
				echo(t, a, b, []int{segment*full + rest}, segment)
				ends{da, db}.awaitEqual(t, counted{})
				s := da.Status()
				// echo sends everything again if a datagram was lost.
				if n := s.TxPacket; n%(full+1) != 0 || s.TxByte != n/(full+1)*(full*(segment+28)+rest+28) {
					t.Errorf("%d packets of %d bytes for a superpacket of %d", n, s.TxByte, full+1)
				}
			})
		})
	}
}

// The fast path's counters survive its removal, and continue when it is enabled again.
func TestCounters_fastPathLeft(t *testing.T) {
	t.Parallel()
	a, b, da, db := fastHosts(t)
	const policy = "src 192.0.2.1 dst 192.0.2.2 proto 4 dir out"
	for range 2 {
		transfer(t, a, b, innerB, 1<<20)
		transfer(t, b, a, innerA, 1<<20)
		if out, err := a.Try("sh", "-c", "ip xfrm policy add "+policy); err != nil { // which lets all through
			t.Skipf("needs a kernel with IPsec: %s", out)
		}
		netlab.Eventually(t, "the fast path is off", func() bool { return da.Status().FastPath != "active" })
		ends{da, db}.awaitEqual(t, counted{})
		ping(t, a, innerB)
		a.Run("sh", "-c", "ip xfrm policy delete "+policy)
		netlab.Eventually(t, "the fast path is active again", func() bool { return da.Status().FastPath == "active" })
		ends{da, db}.awaitEqual(t, counted{})
	}
	if s := da.Status(); s.TxByte < 2<<20 || s.RxByte < 2<<20 {
		t.Errorf("twice 1 MiB in each direction, and %d bytes sent, %d received", s.TxByte, s.RxByte)
	}
}
