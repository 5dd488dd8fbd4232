package conformance

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// segmented is a socket in ns that hands the kernel superpackets of datagrams with
// that many bytes each; with 0 an ordinary one.
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

// RFC 6864, section 4.2, for what the kernel cuts up: each of the segments has an ID
// of its own, up to the end of the IDs and beyond it, and the paths have no ID in
// common.
func TestSuperpacket_ids(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		netlab.DisableOffload(a, "veth0")
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool {
			return f.Outgoing && netlab.Match(f.Packet, netlab.Outer()) == nil
		})
		c.upA(t, a)
		c.upB(t, b)                               // an end that only takes them would say "unreachable" once its buffer is full
		const segment, each, all = 50, 100, 34000 // more than the IDs that a path has
		conn := segmented(t, a, innerA, segment)
		to := &net.UDPAddr{IP: net.ParseIP(innerB), Port: 9}
		for sent := 0; sent < all; {
			if _, err := conn.WriteTo(make([]byte, segment*each), to); err != nil {
				t.Fatal(err)
			}
			if sent += each; sent%1000 == 0 { // a queue may lose some: all that came are looked at
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

// A superpacket whose segments are larger than the path is one of packets that have
// to be cut, each.
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
			1452, // fits to the byte
			1453, // one too many
			1480, // only without its headers
			1700,
		} {
			echo(t, a, b, []int{segment*10 + 7}, segment)
		}
		for _, f := range wire.Matching(netlab.Not(netlab.MaxTotalLen(1500))) {
			t.Errorf("on the wire is %s", netlab.Describe(f.Packet))
		}
		if len(wire.Matching(netlab.Fragmented(true))) == 0 {
			t.Error("nothing was cut")
		}
	})
}

// The host's own superpackets, made by sockets with UDP_SEGMENT, are datagrams on
// the wire and at the other end.
func TestSuperpacket_udpSegment(t *testing.T) {
	t.Parallel()
	eachUnderlay(t, func(t *testing.T, u underlay, a, b *netlab.NS, da, db *netlab.Daemon) {
		for _, segment := range []int{500, 1400} {
			echo(t, a, b, []int{segment * 20, segment*7 + 13, segment, segment * 3}, segment)
			echo(t, a, b, []int{min(segment*120, 65507)}, segment) // as long as IPv4 can be, if that is less
		}
	})
}

// Datagrams that were merged on their way have lost their boundaries.
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
