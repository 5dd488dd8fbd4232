package conformance

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// segmented opens a UDP socket in ns with UDP_SEGMENT set to segment bytes, or an ordinary one
// with 0.
func segmented(t *testing.T, ns *netlab.NS, address string, segment int) *net.UDPConn {
	t.Helper()
	conn := listenUDP(t, ns, address+":0").(*net.UDPConn)
	if segment == 0 {
		return conn
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		_ = raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
		})
	}
	if err != nil {
		t.Skipf("needs a kernel with UDP_SEGMENT (4.18): %v", err)
	}
	return conn
}

// Each segment of a superpacket has its own ID, also when the ID space wraps around (RFC 6864,
// section 4.2). The fast path's IDs are disjoint from those of userspace.
func TestSuperpacket_ids(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		netlab.DisableOffload(a, "veth0")
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool {
			return f.Outgoing && netlab.Match(f.Packet, netlab.Outer()) == nil
		})
		c.upA(t, a)
		c.upB(t, b)                               // not sinkIPIP, which sends unreachables once its buffer is full
		const segment, each, all = 50, 100, 34000 // more than the 32,768 IDs of each path
		conn := segmented(t, a, innerA, segment)
		to := &net.UDPAddr{IP: net.ParseIP(innerB), Port: 9}
		for sent := 0; sent < all; {
			if _, err := conn.WriteTo(make([]byte, segment*each), to); err != nil {
				t.Fatal(err)
			}
			if sent += each; sent%1000 == 0 { // queues may drop some
				wire.AwaitN(sent*9/10, netlab.Outer())
			}
		}
		last := make(map[uint16]int)
		for i, f := range wire.Frames() {
			p, _ := ipv4.Parse(f.Packet)
			if p.ID() == 0 || c.fast && p.ID() < 0x8000 {
				t.Fatalf("packet %d has the ID %d: %s", i, p.ID(), netlab.Describe(f.Packet))
			}
			if before, ok := last[p.ID()]; ok && i-before < 10000 {
				t.Fatalf("packets %d and %d have the ID %d", before, i, p.ID())
			}
			last[p.ID()] = i
		}
	})
}

// Each segment of a superpacket is fragmented if it exceeds the path MTU.
func TestSuperpacket_fragmented(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		netlab.DisableOffload(a, "veth0")
		netlab.DisableOffload(b, "veth0")
		wire := netlab.Capture(t, b, "veth0", func(f netlab.Frame) bool { return !f.Outgoing })
		c.upA(t, a, "--mtu", "2000")
		c.upB(t, b, "--mtu", "2000")
		for _, segment := range []int{
			1452, // fits exactly
			1453, // one byte too long
			1480, // fits without the inner headers only
			1700,
		} {
			echo(t, a, b, []int{segment*10 + 7}, segment)
		}
		for _, f := range wire.Matching(netlab.Not(netlab.MaxTotalLen(1500))) {
			t.Errorf("on the wire is %s", netlab.Describe(f.Packet))
		}
		if len(wire.Matching(netlab.Fragmented(true))) == 0 {
			t.Error("nothing was fragmented")
		}
	})
}

// Superpackets of the host's sockets (UDP_SEGMENT) arrive as separate datagrams.
func TestSuperpacket_udpSegment(t *testing.T) {
	t.Parallel()
	eachUnderlay(t, func(t *testing.T, u underlay, a, b *netlab.NS, da, db *netlab.Daemon) {
		for _, segment := range []int{500, 1400} {
			echo(t, a, b, []int{segment * 20, segment*7 + 13, segment, segment * 3}, segment)
			echo(t, a, b, []int{min(segment*120, 65507)}, segment) // as long as IPv4 can be, if that is less
		}
	})
}

// A received UDP superpacket of unknown segment size is dropped: its boundaries are lost.
func TestSuperpacket_sizeUnknown(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		r.from.send(fragment(outerBToA(partialChecksum(bToA(1), 4000)), 1480)...)
		r.settle()
		if s := r.d.Status(); s.Drops["superpacket-size-unknown"] != 1 || len(r.got()) != 0 {
			t.Errorf("drops are %v, and the host got %d packets", s.Drops, len(r.got()))
		}
	})
}
