package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// Two hosts on two links. Each has a loopback address that is reachable by both; the main
// table routes by the first:
//
//	               192.0.2.1 ── veth0 ─ veth0 ── 192.0.2.2
//	a  203.0.113.1                                          203.0.113.2  b
//	            198.51.100.1 ── veth1 ─ veth1 ── 198.51.100.2
const (
	loopbackA, loopbackB = "203.0.113.1", "203.0.113.2"
	wire1A               = "198.51.100.1"
	wire1B               = "198.51.100.2"
)

func twoWires(t *testing.T) (a, b *netlab.NS) {
	t.Helper()
	a, b = hosts(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth1", Address: wire1A + "/24"}, netlab.End{Name: "veth1", Address: wire1B + "/24"})
	for _, x := range []struct {
		ns                *netlab.NS
		own, other, first string
	}{{a, loopbackA, loopbackB, outerB}, {b, loopbackB, loopbackA, outerA}} {
		x.ns.Run("ip", "address", "add", x.own+"/32", "dev", "lo")
		x.ns.Run("ip", "route", "add", x.other, "via", x.first, "src", x.own)
		for _, which := range []string{"all", "veth0", "veth1"} {
			x.ns.Sysctl("net.ipv4.conf."+which+".rp_filter", "0")
		}
	}
	return a, b
}

// outgoing captures outgoing packets of an interface.
func outgoing(t *testing.T, ns *netlab.NS, ifname string) *netlab.Recorder {
	t.Helper()
	return netlab.Capture(t, ns, ifname, func(f netlab.Frame) bool { return f.Outgoing })
}

// carries matches an outer packet around the inner packet with that ID.
func carries(id uint16) netlab.Check { return netlab.Outer(netlab.Inner(netlab.ID(id))) }

// With --underlay-device outer packets leave and enter by that interface only.
func TestUnderlay_device(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := twoWires(t)
		sinkIPIP(t, b)
		a.Run("ip", "route", "add", loopbackB, "via", wire1B, "src", loopbackA, "metric", "100")
		wire0, wire1 := outgoing(t, a, "veth0"), outgoing(t, a, "veth1")
		d := c.up(t, a, "--local-address", loopbackA, "--remote-address", loopbackB, "--address", innerA+"/24", "--underlay-device", "veth1")
		inside := netlab.CaptureReceived(t, a, "t0")
		into := newInjector(t, a, "t0", nil, "")
		into.send(datagram(aToB(1), 100), datagram(aToB(2), 100))
		wire1.Await(carries(2))
		if got := wire0.Matching(netlab.Protocol(4)); len(got) != 0 {
			t.Errorf("by the other interface left %s", netlab.Describe(got[0].Packet))
		}

		enter := func(id uint16) []byte {
			return build(ipv4.Header{ID: 5, Protocol: ipv4.ProtocolIPIP, Source: addr(loopbackB), Destination: addr(loopbackA)}, datagram(bToA(id), 100))
		}
		good, bad := newInjector(t, b, "veth1", a, "veth1"), newInjector(t, b, "veth0", a, "veth0")
		netlab.Eventually(t, "nothing enters by the other interface", func() bool { // at first it may
			before := d.Status().RxPacket
			bad.send(enter(3))
			good.send(enter(4))
			inside.Await(netlab.ID(4))
			return d.Status().RxPacket == before+1
		})
		bad.send(enter(5))
		good.send(enter(6))
		inside.Await(netlab.ID(6))
		if got := inside.Matching(netlab.ID(5)); len(got) != 0 {
			t.Errorf("by the other interface came %s", netlab.Describe(got[0].Packet))
		}
	})
}

// Outer packets carry the mark of --fwmark, for policy routing.
func TestUnderlay_fwmark(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		for _, mtu := range []string{"1480", "9000"} { // whole, and in fragments
			a, b := twoWires(t)
			sinkIPIP(t, b)
			a.Run("ip", "route", "add", loopbackB, "via", wire1B, "table", "77")
			a.Run("ip", "rule", "add", "fwmark", "0x4d", "table", "77")
			wire0, wire1 := outgoing(t, a, "veth0"), outgoing(t, a, "veth1")
			c.up(t, a, "--local-address", loopbackA, "--remote-address", loopbackB, "--address", innerA+"/24", "--fwmark", "77", "--mtu", mtu)
			into := newInjector(t, a, "t0", nil, "")
			into.send(datagram(aToB(1), 1400))
			wire1.Await(carries(1), netlab.Source(loopbackA), netlab.Destination(loopbackB))
			if mtu == "9000" {
				into.send(datagram(aToB(2), 8000))
				wire1.Await(netlab.Protocol(4), netlab.Fragmented(true), netlab.MF(false), netlab.Source(loopbackA))
			}
			if got := wire0.Matching(netlab.Protocol(4)); len(got) != 0 {
				t.Errorf("by the other interface left %s", netlab.Describe(got[0].Packet))
			}
		}
	})
}

// awaitPing waits until the tunnel carries packets again after what.
func awaitPing(t *testing.T, from *netlab.NS, what string) {
	t.Helper()
	netlab.Eventually(t, "the tunnel works after "+what, func() bool { return answered(from, innerB) })
}

// The next hop's MAC address changes without an announcement: the kernel's neighbour
// unreachability detection finds the new one, as for its own packets.
func TestUnderlay_nextHopMACChanged(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		// Probe neighbours within seconds, not half a minute.
		a.Sysctl("net.ipv4.neigh.veth0.base_reachable_time_ms", "2000")
		a.Sysctl("net.ipv4.neigh.veth0.delay_first_probe_time", "1")
		a.Sysctl("net.ipv4.neigh.veth0.retrans_time_ms", "100")
		b.Sysctl("net.ipv4.conf.veth0.arp_notify", "0")
		c.upA(t, a)
		c.upB(t, b)
		ping(t, a, innerB)
		// By then the entry is STALE and would stay so, as the kernel sends no packet there
		// itself: the tunnel must refresh it.
		time.Sleep(4 * time.Second)
		b.Run("ip", "link", "set", "dev", "veth0", "address", "02:00:00:00:00:99")
		awaitPing(t, a, "the next hop's MAC address changed")
	})
}

// The route moves to another next hop, and to another interface.
func TestUnderlay_routeChanged(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := twoWires(t)
		sinkIPIP(t, b)
		wire0, wire1 := outgoing(t, a, "veth0"), outgoing(t, a, "veth1")
		c.up(t, a, "--local-address", loopbackA, "--remote-address", loopbackB, "--address", innerA+"/24")
		into := newInjector(t, a, "t0", nil, "")
		into.send(datagram(aToB(1), 100))
		wire0.Await(carries(1))
		a.Run("ip", "route", "replace", loopbackB, "via", wire1B, "src", loopbackA)
		id := uint16(1)
		netlab.Eventually(t, "packets take the new route", func() bool {
			id++
			into.send(datagram(aToB(id), 100))
			return len(wire1.Matching(netlab.Protocol(4))) > 0
		})
		wire1.Await(carries(id)) // the last one; earlier ones took the old route
		before := len(wire0.Matching(netlab.Protocol(4)))
		into.send(datagram(aToB(id+1), 100))
		wire1.Await(carries(id + 1))
		if after := len(wire0.Matching(netlab.Protocol(4))); after != before {
			t.Error("packets take the old route too")
		}
	})
}

// A storm of route changes that concern no tunnel loses none of its packets. The processor time of a change is printed: 10 µs
// would be a tenth of a processor for 10,000 a second. Reading all routes again for each would take milliseconds.
func TestUnderlay_routeStorm(t *testing.T) {
	const changes, most = 20_000, 50 * time.Microsecond
	var storm strings.Builder
	for i := range changes / 2 {
		fmt.Fprintf(&storm, "route add 10.%d.%d.%d/32 dev veth0\nroute del 10.%d.%d.%d/32 dev veth0\n", 64+i>>14, i>>6&0xff, i&0x3f, 64+i>>14, i>>6&0xff, i&0x3f)
	}
	file := filepath.Join(t.TempDir(), "storm")
	if err := os.WriteFile(file, []byte(storm.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a)
		c.upB(t, b)
		ping(t, a, innerB)
		end := netlab.Stream(t, a, innerA, b, innerB)
		before := processorTime(t, d.PID())
		a.Run("ip", "-batch", file)
		took := (processorTime(t, d.PID()) - before) / changes
		end()
		t.Logf("%v a change", took)
		if took > most && !testing.Short() { // the race detector's run is
			t.Errorf("a change takes %v of a processor, want %v at most", took, most)
		}
		if drops := d.Status().AllDrops(); len(drops) > 0 {
			t.Errorf("drops are %v", drops)
		}
	})
}

// processorTime returns the processor time of the threads of a process so far.
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil { // clock_getcpuclockid(3)
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// The tunnel's MTU follows the MTU of the underlay's interface and of the route.
func TestUnderlay_routeMTU(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, _ := hosts(t)
		d := c.upA(t, a)
		fixed := netlab.Up(t, a, "t1", "--remote-address", "192.0.2.3", "--mtu", "1400")
		for _, step := range []struct {
			change string
			want   int
		}{
			{"link set dev veth0 mtu 1300", 1280},
			{"link set dev veth0 mtu 9000", 8980},
			{"route add 192.0.2.2/32 dev veth0 mtu 1200", 1180},
			{"route delete 192.0.2.2/32", 8980},
		} {
			a.Run("sh", "-c", "ip "+step.change)
			netlab.Eventually(t, fmt.Sprintf("the MTU is %d after %s", step.want, step.change), func() bool { return d.Status().ActualMTU == step.want })
		}
		if mtu := fixed.Status().ActualMTU; mtu != 1400 {
			t.Errorf("the MTU that was set to 1400 is %d", mtu)
		}
	})
}

// A deleted route is not used any more, until it is added again.
func TestUnderlay_routeDeleted(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := twoWires(t)
		sinkIPIP(t, b)
		a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), outerB) // resolves the neighbour
		wire0 := outgoing(t, a, "veth0")
		d := c.up(t, a, "--local-address", loopbackA, "--remote-address", loopbackB, "--address", innerA+"/24")
		into := newInjector(t, a, "t0", nil, "")
		into.send(datagram(aToB(1), 100))
		wire0.Await(carries(1))

		a.Run("ip", "route", "delete", loopbackB)
		netlab.Eventually(t, "packets are counted under no-path", func() bool {
			into.send(datagram(aToB(2), 100))
			return d.Drops("no-path") > 0
		})
		a.Run("ip", "route", "add", loopbackB, "via", outerB, "src", loopbackA)
		netlab.Eventually(t, "packets pass again", func() bool {
			into.send(datagram(aToB(3), 100))
			return len(wire0.Matching(carries(3))) > 0
		})
	})
}

// The underlay interface goes down and up, and is recreated with another index and MAC address.
func TestUnderlay_deviceRecreated(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		flags []string
	}{{"found by the route", nil}, {"named", []string{"--underlay-device", "veth0"}}} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				c.upA(t, a, test.flags...)
				c.upB(t, b)
				ping(t, a, innerB)
				a.Run("ip", "link", "set", "dev", "veth0", "down")
				a.Run("ip", "link", "set", "dev", "veth0", "up")
				awaitPing(t, a, "the interface was down")
				a.Run("ip", "link", "delete", "veth0") // and its other end
				netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: outerA + "/24"}, netlab.End{Name: "veth0", Address: outerB + "/24"})
				awaitPing(t, a, "the interface was made anew")
				ping(t, a, "-s", "20000", innerB)
			})
		})
	}
}

// --underlay-device is a name: an interface that loses it is not used any more.
func TestUnderlay_deviceRenamed(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a, "--underlay-device", "veth0")
		c.upB(t, b)
		ping(t, a, innerB)
		wire := outgoing(t, a, "veth0")
		a.Run("ip", "link", "set", "veth0", "down")
		a.Run("ip", "link", "set", "veth0", "name", "veth9")
		a.Run("ip", "link", "set", "veth9", "up")
		d.AwaitWarning(warning.NoRoute)
		into := newInjector(t, a, "t0", nil, "")
		netlab.Eventually(t, "packets are counted under no-path", func() bool {
			into.send(datagram(aToB(1), 100))
			return d.Drops("no-path") > 0
		})
		// Packets of another size, since some of the earlier ones left before the tunnel knew.
		const n, size = 20, 200
		before := d.Drops("no-path")
		for range n {
			into.send(datagram(aToB(1), size))
		}
		netlab.Eventually(t, "each of them is counted", func() bool { return d.Drops("no-path") >= before+n })
		if got := wire.Matching(netlab.Protocol(4), netlab.TotalLen(20+20+8+size)); len(got) != 0 {
			t.Errorf("packets leave by the interface that had the name: %s", netlab.Describe(got[0].Packet))
		}
		a.Run("ip", "link", "set", "veth9", "down")
		a.Run("ip", "link", "set", "veth9", "name", "veth0")
		a.Run("ip", "link", "set", "veth0", "up")
		awaitPing(t, a, "the interface has its name again")
	})
}
