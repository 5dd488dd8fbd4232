package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// receiver is a tunnel end at a, with an injector at b that sends crafted outer packets.
type receiver struct {
	a, b   *netlab.NS
	d      *netlab.Daemon
	from   *injector        // into veth0 of b
	inside *netlab.Recorder // packets from the tunnel to a's host
	marks  uint16           // ID of the next mark of settle
}

func newReceiver(t *testing.T, c variant, flags ...string) *receiver {
	t.Helper()
	a, b := hosts(t)
	sinkIPIP(t, b)
	r := &receiver{a: a, b: b, d: c.upA(t, a, flags...), from: newInjector(t, b, "veth0", a, "veth0"), marks: 0xf000}
	r.inside = netlab.CaptureReceived(t, a, "t0")
	return r
}

// settle waits until the tunnel has processed all packets sent so far: it sends marks, of
// enough flows for every receiver thread, and waits for them. A mark has a trailing byte, so
// that it takes the userspace path and does not overtake packets there.
func (r *receiver) settle() {
	const flows = 24
	for port := range uint16(flows) {
		h := bToA(r.marks + port)
		r.from.send(append(outerBToA(build(h, udp(h, 1000+port, 9, nil))), 0))
	}
	for range flows {
		r.inside.Await(netlab.ID(r.marks))
		r.marks++
	}
}

// got returns the packets that reached the host, without the marks of settle.
func (r *receiver) got() []netlab.Frame {
	return r.inside.Matching(netlab.Not(func(p ipv4.Packet) error {
		if p.ID() < 0xf000 {
			return fmt.Errorf("not a mark")
		}
		return nil
	}))
}

// partialChecksum returns a UDP datagram whose checksum field has the sum of the
// pseudo-header only, as a stack with checksum offload sends it.
func partialChecksum(h ipv4.Header, n int) []byte {
	b := udp(h, 9, 9, pattern(n))
	pseudo := ipv4.PseudoHeaderSum(h.Source, h.Destination, ipv4.ProtocolUDP, len(b))
	binary.BigEndian.PutUint16(b[6:], ipv4.Fold(pseudo))
	return build(h, b)
}

// The drop reasons of received packets. A packet for no tunnel never reaches the process:
// the kernel answers and counts it (IpInUnknownProtos).
func TestDecapsulate_drops(t *testing.T) {
	t.Parallel()
	good := datagram(bToA(1), 100)
	outer := func(h ipv4.Header, payload []byte) []byte {
		h.ID, h.Protocol = 9, ipv4.ProtocolIPIP
		return build(h, payload)
	}
	loop := build(ipv4.Header{ID: 2, Protocol: ipv4.ProtocolUDP, Source: addr(outerA), Destination: addr(outerB)}, pattern(20))
	probe := build(ipv4.Header{ID: 3, TTL: 1, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr(outerB)}, nil)
	wrongSum := bytes.Clone(good)
	wrongSum[10]++
	ecn := outerBToA(good)
	for _, test := range []struct {
		name, reason string
		packet       []byte
	}{
		{"from another source", "", outer(ipv4.Header{Source: addr("192.0.2.3"), Destination: addr(outerA)}, good)},
		{"to another address of this host", "", outer(ipv4.Header{Source: addr(outerB), Destination: addr("192.0.2.9")}, good)},
		{"inner TTL 0", "received-ttl-zero", outerBToA(withByte(good, 8, 0))},
		{"wrong inner header checksum", "received-checksum", outerBToA(wrongSum)},
		{"IPv6 inside", "received-not-ipv4", outerBToA(append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...))},
		{"no IP packet inside", "received-not-ipv4", outerBToA([]byte("no packet but forty bytes of text at all"))},
		{"an inner header of 16 bytes", "received-malformed", outerBToA(withByte(good, 0, 0x44))},
		{"an inner total length within the header", "received-malformed", outerBToA(withByte(withByte(good, 2, 0), 3, 19))},
		{"an inner packet longer than the outer", "received-truncated", outerBToA(good[:len(good)-1])},
		{"half an inner header", "received-truncated", outerBToA(good[:19])},
		{"one byte inside", "received-truncated", outerBToA(good[:1])},
		{"an inner packet of our own to the peer", "received-loop", outerBToA(loop)},
		{"35 nested outer headers", "received-loop", nested(35, good)},
		{"a reflect probe with TTL 1", "reflect-ttl-expired", outerBToA(probe)},
		{"outer CE on inner Not-ECT", "ecn-ce-on-not-ect", withByte(ecn, 1, 3)},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				r := newReceiver(t, c)
				r.a.Run("ip", "address", "add", "192.0.2.9/32", "dev", "veth0")
				r.from.send(test.packet)
				r.settle()
				status := r.d.Status()
				switch drops := status.AllDrops(); {
				case test.reason != "":
					if drops[test.reason] != 1 || len(drops) != 1 {
						t.Errorf("drops are %v, want one %s", drops, test.reason)
					}
				case len(drops) != 0 || inUnknownProtos(r.a) != 1:
					t.Errorf("drops are %v, and the kernel counted %d, want none and 1", drops, inUnknownProtos(r.a))
				}
				if got := r.got(); len(got) != 0 {
					t.Errorf("the host got %s", netlab.Describe(got[0].Packet))
				}
			})
		})
	}
}

// nested encapsulates b in that many outer headers of the tunnel.
func nested(levels int, b []byte) []byte {
	for range levels {
		b = outerBToA(b)
	}
	return b
}

// inUnknownProtos returns the kernel's count of packets without a socket (IpInUnknownProtos).
func inUnknownProtos(ns *netlab.NS) (n int) {
	_, _ = fmt.Sscanf(ns.Run("sh", "-c", "nstat -asz IpInUnknownProtos | tail -n1"), "IpInUnknownProtos %d", &n)
	return n
}

// A peer on the same machine sends partial checksums: they are accepted, wrong ones are not.
func TestDecapsulate_partialChecksum(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		conn := listenUDP(t, r.a, innerA+":9")
		wrong := datagram(bToA(1), 40)
		wrong[len(wrong)-1]++
		if c.fast {
			t.Skip("on the fast path the kernel itself says which checksums are unfinished, and a packet from a file descriptor says nothing of it")
		}
		r.from.send(outerBToA(wrong), outerBToA(partialChecksum(bToA(2), 1000)))
		buf := make([]byte, 2000)
		n, _, err := conn.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:n], pattern(1000)) {
			t.Errorf("the socket got %d bytes, %v", n, err)
		}
	})
}

// The kernel drops invalid outer headers before ipipd sees them.
func TestDecapsulate_invalidOuter(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		good := outerBToA(datagram(bToA(1), 100))
		wrongSum := bytes.Clone(good)
		wrongSum[10]++
		for _, b := range [][]byte{wrongSum, withByte(good, 0, 0x44), withByte(good, 2, 0x10), good[:19]} {
			r.from.send(b)
		}
		r.settle()
		if got := r.got(); len(got) != 0 {
			t.Errorf("the host got %s", netlab.Describe(got[0].Packet))
		}
	})
}

// Frames for another MAC address, or of a VLAN that this host is not in, are dropped.
func TestDecapsulate_otherHost(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		other, vlan := *r.from, *r.from
		other.to.Addr[5]++
		vlan.to.Protocol = binary.NativeEndian.Uint16([]byte{0x81, 0x00})
		other.send(outerBToA(datagram(bToA(1), 100)))
		vlan.send(append([]byte{0, 7, 0x08, 0x00}, outerBToA(datagram(bToA(2), 100))...))
		r.settle()
		if got := r.got(); len(got) != 0 {
			t.Errorf("the host got %s", netlab.Describe(got[0].Packet))
		}
		// VLAN 0 is a priority tag only (IEEE 802.1Q): accepted.
		vlan.send(append([]byte{0, 0, 0x08, 0x00}, outerBToA(datagram(bToA(3), 100))...))
		r.inside.Await(netlab.ID(3))
	})
}

// RFC 6040, section 4.2: the table of [inner][outer], each Not-ECT, ECT(1),
// ECT(0), CE as the codepoints 0 to 3 count.
func TestDecapsulate_ecn(t *testing.T) {
	t.Parallel()
	const none, ect1, ect0, ce, drop = 0, 1, 2, 3, 4
	table := [4][4]uint8{
		none: {none: none, ect0: none, ect1: none, ce: drop},
		ect0: {none: ect0, ect0: ect0, ect1: ect1, ce: ce},
		ect1: {none: ect1, ect0: ect1, ect1: ect1, ce: ce},
		ce:   {none: ce, ect0: ce, ect1: ce, ce: ce},
	}
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		for inner := range uint8(4) {
			for outer := range uint8(4) {
				h := bToA(uint16(1 + inner<<2 + outer))
				h.TOS = 10<<2 | inner
				h.Protocol = experimental
				// The outer DSCP differs, and is discarded (RFC 2983, pipe model).
				r.from.send(withByte(outerBToA(build(h, pattern(50))), 1, 46<<2|outer))
			}
		}
		r.settle()
		for inner := range uint8(4) {
			for outer := range uint8(4) {
				got := r.inside.Matching(netlab.ID(uint16(1 + inner<<2 + outer)))
				want := table[inner][outer]
				if want == drop {
					if len(got) != 0 {
						t.Errorf("inner %v, outer %v: not dropped", ipv4.ECN(inner), ipv4.ECN(outer))
					}
					continue
				}
				if len(got) != 1 {
					t.Errorf("inner %v, outer %v: dropped", ipv4.ECN(inner), ipv4.ECN(outer))
					continue
				}
				netlab.Assert(t, got[0].Packet, netlab.TOS(10<<2|want), netlab.Payload(pattern(50)))
			}
		}
		if n := r.d.Drops("ecn-ce-on-not-ect"); n != 1 {
			t.Errorf("%d packets counted, want 1", n)
		}
	})
}

// Bytes after the inner packet's total length are removed.
func TestDecapsulate_trailingBytes(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		h := bToA(1)
		h.Protocol = experimental
		inner := build(h, pattern(11))
		padded := append(bytes.Clone(inner), 1, 2, 3, 4, 5, 6, 7)
		r.from.send(outerBToA(padded), append(outerBToA(inner), 8, 9))
		r.settle()
		got := r.got()
		if len(got) != 2 || !bytes.Equal(got[0].Packet, inner) || !bytes.Equal(got[1].Packet, inner) {
			t.Errorf("the host got %d packets, the first %x, want %x twice", len(got), got[0].Packet, inner)
		}
	})
}

// Outer headers with options are accepted, though ipipd never sends any.
func TestDecapsulate_outerOptions(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		inner := datagram(bToA(1), 60)
		h := ipv4.Header{ID: 9, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr(outerA)}
		r.from.send(buildOptions(h, []byte{1, 1, 1, 0}, inner))
		r.settle()
		if got := r.got(); len(got) != 1 || !bytes.Equal(got[0].Packet, inner) {
			t.Errorf("the host got %d packets", len(got))
		}
	})
}

// Packets for an interface that is down are counted as dropped, not as received.
func TestDecapsulate_interfaceDown(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		r.a.Run("ip", "link", "set", "dev", "t0", "down")
		netlab.Eventually(t, "the fast path is off", func() bool { return r.d.Status().FastPath != "active" })
		r.from.send(outerBToA(datagram(bToA(1), 100)))
		netlab.Eventually(t, "it is counted", func() bool {
			drops := r.d.Status().AllDrops()
			return drops["write-failed"]+drops["received-not-running"] == 1
		})
		if rx := r.d.Status().RxPacket; rx != 0 {
			t.Errorf("%d packets are counted as received", rx)
		}
	})
}

// While ipipd is stopped more probes arrive than it answers in a second, and then more
// packets than the receive buffer holds.
func TestDecapsulate_flood(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		r.d.Signal(syscall.SIGSTOP)
		probe := outerBToA(build(ipv4.Header{ID: 3, TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr(outerB)}, nil))
		const probes = 4000
		for range probes {
			r.from.send(probe)
		}
		large := outerBToA(datagram(bToA(1), 1400))
		for range 20000 {
			r.from.send(large)
		}
		r.d.Signal(syscall.SIGCONT)
		netlab.Eventually(t, "more probes than are answered are counted", func() bool { return r.d.Drops("reflect-limited") > 0 })
		if c.fast {
			t.Skip("the fast path does not use the receive buffer")
		}
		netlab.Eventually(t, "what there was no room for is counted", func() bool { return r.d.Drops("receive-overflow") > 0 })
		r.settle()
	})
}

// Thousands of malformed packets from the remote: each is delivered or counted under a
// reason, nothing is logged, and the tunnel still works.
func TestDecapsulate_garbage(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		da, db := c.upA(t, a), c.upB(t, b)
		ping(t, a, innerB)
		ends{da, db}.awaitEqual(t, counted{}) // the reply may be counted after it has arrived
		from := newInjector(t, b, "veth0", a, "veth0")
		// No replies from a's host.
		a.Run("ip", "route", "add", "blackhole", innerB+"/32", "metric", "1")
		before := da.Status()
		seed := rand.NewPCG(2003, 791)
		const total, burst = 5000, 100
		for sent := 0; sent < total; {
			for range burst {
				sent++
				from.send(outerBToA(garbage(rand.New(seed))))
			}
			netlab.Eventually(t, "every packet is accounted for", func() bool {
				s := da.Status()
				sum := s.RxPacket - before.RxPacket
				for _, n := range s.AllDrops() {
					sum += n
				}
				if sum > uint64(sent) {
					t.Fatalf("%d packets were sent and %d counted: %+v", sent, sum, s)
				}
				return sum == uint64(sent)
			})
		}
		s := da.Status()
		for _, reason := range []string{"received-not-ipv4", "received-malformed", "received-checksum", "received-truncated", "received-ttl-zero"} {
			if s.Drops[reason] == 0 {
				t.Errorf("none of %d packets was %s: is the garbage too tame? %v", total, reason, s.AllDrops())
			}
		}
		if n := s.ProcessDrops["receive-overflow"] + s.ProcessDrops["unknown-peer"]; n != 0 {
			t.Errorf("%d packets were dropped before they were parsed: %v", n, s.AllDrops())
		}
		if lines := strings.Count(da.Log(), "\n"); lines > 1 {
			t.Errorf("the garbage is logged:\n%s", da.Log())
		}
		a.Run("ip", "route", "delete", "blackhole", innerB+"/32", "metric", "1")
		ping(t, a, innerB)
		ping(t, b, innerA)
	})
}

// garbage returns an inner packet, malformed in most cases.
func garbage(r *rand.Rand) []byte {
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	h := bToA(uint16(r.Uint32()))
	// Not protocol 4: a's host would deliver it to ipipd again.
	h.Protocol = []uint8{ipv4.ProtocolTCP, ipv4.ProtocolUDP, 47, 50}[r.IntN(4)]
	h.TOS, h.MF, h.FragmentOffset = uint8(r.Uint32()), r.IntN(8) == 0, 8*r.IntN(2)*r.IntN(8191)
	b := build(h, random(r.IntN(200)))
	switch r.IntN(6) {
	case 0: // random bytes; never empty, which is an empty probe
		return random(1 + r.IntN(300))
	case 1: // truncated
		return b[:1+r.IntN(len(b)-1)]
	case 2: // one bit flipped
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		return b
	}
	// Wrong fields with a valid header checksum.
	for range 1 + r.IntN(3) {
		b[[]int{0, 1, 2, 3, 6, 7, 8}[r.IntN(7)]] = byte(r.IntN(256) & r.IntN(256))
	}
	if b[0]&0xf >= 5 && int(b[0]&0xf)*4 <= len(b) {
		updateChecksum(b)
	}
	return b
}
