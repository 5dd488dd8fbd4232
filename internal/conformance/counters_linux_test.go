package conformance

import (
	"testing"

	"ipipd/internal/netlab"
)

// same waits until each end has counted as received what the other has counted as
// sent, in packets and bytes.
func same(t *testing.T, da, db *netlab.Daemon) {
	t.Helper()
	var sa, sb netlab.Status
	defer func() {
		if t.Failed() {
			t.Logf("a: %+v\nb: %+v", sa, sb)
		}
	}()
	netlab.Eventually(t, "both ends have counted the same", func() bool {
		sa, sb = da.Status(), db.Status()
		return sa.TxPacket == sb.RxPacket && sa.RxPacket == sb.TxPacket && sa.TxByte == sb.RxByte && sa.RxByte == sb.TxByte
	})
}

// Bulk, which is counted in superpackets and in what they stand for; pings with
// options, which take the other path; and fragments of large ones. Both ends have
// counted the same when it is over, whoever carries at either, and whatever the wire
// makes of the packets.
func TestBothEndsCountTheSameAfterAMixedRun(t *testing.T) {
	t.Parallel()
	for _, u := range underlays[:3] { // the others have no fast path, or no superpackets
		for _, far := range carriers {
			t.Run(u.name+", "+far.name, func(t *testing.T) {
				t.Parallel()
				a, b := hosts(t)
				if u.wire != nil {
					u.wire(a, b)
				}
				da, db := fast.upA(t, a), far.upB(t, b)
				isFast(t, da)
				// No more packets than the receiving kernel queues (1000): what is
				// lost on the way is counted by one end only.
				const bytes = 1 << 20
				transfer(t, a, b, innerB, bytes)
				ping(t, a, "-T", "tsonly", innerB)
				ping(t, b, "-s", "5000", innerA)
				transfer(t, b, a, innerA, bytes)
				same(t, da, db)
				if s := da.Status(); s.TxByte < bytes || s.TxPacket < bytes/1500 {
					t.Errorf("1 MiB was sent, and counted as %d bytes in %d packets", s.TxByte, s.TxPacket)
				}
			})
		}
	}
}

// Datagrams that a socket hands over as one superpacket are as many packets.
func TestDatagramsThatTravelAsOneAreCountedEach(t *testing.T) {
	t.Parallel()
	for _, u := range underlays[:2] {
		t.Run(u.name, func(t *testing.T) {
			eachCarrier(t, func(t *testing.T, c carrier) {
				a, b := hosts(t)
				if u.wire != nil {
					u.wire(a, b)
				}
				da, db := c.upA(t, a), c.upB(t, b)
				const segment, full, rest = 500, 40, 13
				echoed(t, a, b, []int{segment*full + rest}, segment)
				same(t, da, db)
				s := da.Status()
				// Both have counted each way the same; a lost datagram is sent again.
				if n := s.TxPacket; n%(full+1) != 0 || s.TxByte != n/(full+1)*(full*(segment+28)+rest+28) {
					t.Errorf("%d packets of %d bytes for a superpacket of %d", n, s.TxByte, full+1)
				}
			})
		})
	}
}

// What the kernel has counted stays counted when it carries no more, and what it
// counts afterwards comes on top.
func TestCountersOutliveTheFastPath(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := fast.upA(t, a), fast.upB(t, b)
	isFast(t, da, db)
	const policy = "src 192.0.2.1 dst 192.0.2.2 proto 4 dir out"
	for range 2 {
		transfer(t, a, b, innerB, 1<<20)
		transfer(t, b, a, innerA, 1<<20)
		if out, err := a.Try("sh", "-c", "ip xfrm policy add "+policy); err != nil { // which lets all through
			t.Skipf("needs a kernel with IPsec: %s", out)
		}
		netlab.Eventually(t, "userspace carries", func() bool { return da.Status().FastPath != "active" })
		same(t, da, db)
		ping(t, a, innerB)
		a.Run("sh", "-c", "ip xfrm policy delete "+policy)
		netlab.Eventually(t, "the kernel carries again", func() bool { return da.Status().FastPath == "active" })
		same(t, da, db)
	}
	if s := da.Status(); s.TxByte < 2<<20 || s.RxByte < 2<<20 {
		t.Errorf("twice 1 MiB each way, and %d bytes sent, %d received", s.TxByte, s.RxByte)
	}
}
