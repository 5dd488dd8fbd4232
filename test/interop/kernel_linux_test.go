package interop

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

func TestKernel_ping(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	wire := l.record(t)
	d := up(t, l.ours)
	l.tunnel(t, "")
	ours := inNamespace(l.ours)
	for _, size := range []int{0, 1, 56, fullSize - 1, fullSize, fullSize + 1, manyFrags} {
		ping(t, ours, peerInner, size, "")
		ping(t, l.guest.Run, ourInner, size, "")
	}
	// A full-size packet needs no fragmentation.
	wire.Await(sent(netlab.TotalLen(1500), netlab.DF(false), netlab.TTL(255), netlab.TOS(0), request(netlab.TTL(64))))
	wire.Await(received(netlab.TotalLen(1500), reply(netlab.TTL(64))))
	if fragments := wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP), netlab.Fragmented(true)); len(fragments) > 0 {
		t.Errorf("%d outer packets are fragments, such as %s", len(fragments), netlab.Describe(fragments[0].Packet))
	}
	if s := d.Status(); len(s.AllDrops()) > 0 || s.ActualMTU != innerMTU {
		t.Errorf("actual MTU is %d, drops are %v", s.ActualMTU, s.AllDrops())
	}
}

func TestKernel_bulkTCP(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	up(t, l.ours)
	l.tunnel(t, "")
	ours := inNamespace(l.ours)
	for _, wire := range []string{"offload", "segments"} {
		t.Run(wire, func(t *testing.T) {
			if wire == "segments" {
				netlab.DisableOffload(l.ours, "eth0")
			}
			bulk(t, ours, l.guest.Run, peerInner, false)
			bulk(t, ours, l.guest.Run, peerInner, true)
			bulk(t, l.guest.Run, ours, ourInner, false)
		})
	}
}

// With the fast path the kernel sends superpackets, as its own tunnels do. The guest's driver
// accepts none, so segmentation offload of the veth is off.
func TestKernel_bulkTCPFastPath(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	netlab.DisableOffload(l.ours, "eth0")
	d := up(t, l.ours, "--allow-fast-path", "yes")
	l.tunnel(t, "")
	ours := inNamespace(l.ours)
	ping(t, ours, peerInner, fullSize, "")
	if state := d.Status().FastPath; state != "active" {
		t.Skipf("the fast path is not there: %s", state)
	}
	bulk(t, ours, l.guest.Run, peerInner, false)
	bulk(t, ours, l.guest.Run, peerInner, true)
	bulk(t, l.guest.Run, ours, ourInner, false)
}

// Over a TAP the two kernels exchange superpackets and partial checksums without a veth in
// between.
func TestKernel_bulkTCPOverTAP(t *testing.T) {
	t.Parallel()
	l := newTapLab(t)
	up(t, l.ours)
	l.tunnel(t, "")
	ours := inNamespace(l.ours)
	ping(t, ours, peerInner, fullSize, "")
	ping(t, l.guest.Run, ourInner, manyFrags, "")
	bulk(t, ours, l.guest.Run, peerInner, false)
	bulk(t, ours, l.guest.Run, peerInner, true)
}

func TestKernel_outerTTL(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	tests := []struct {
		kernel     string // option of the guest's tunnel
		ours       string // --ttl
		innerTTL   uint8
		wantKernel uint8
		wantOurs   uint8
	}{
		{"ttl 37", "255", 64, 37, 255},
		{"ttl inherit", "inherit", 9, 9, 9},
		{"ttl 255", "17", 64, 255, 17},
	}
	for _, tt := range tests {
		t.Run(tt.kernel+", ours "+tt.ours, func(t *testing.T) {
			l.tunnel(t, tt.kernel)
			wire := l.record(t)
			d := up(t, l.ours, "--ttl", tt.ours)
			option := fmt.Sprintf("-t %d", tt.innerTTL)
			ping(t, inNamespace(l.ours), peerInner, 56, option)
			ping(t, l.guest.Run, ourInner, 56, option)
			wire.Await(sent(netlab.TTL(tt.wantOurs), request(netlab.TTL(tt.innerTTL))))
			wire.Await(received(netlab.TTL(tt.wantKernel), request(netlab.TTL(tt.innerTTL))))
			if drops := d.Status().AllDrops(); len(drops) > 0 {
				t.Errorf("drops are %v", drops)
			}
		})
	}
}

func TestKernel_outerTOS(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	tests := []struct {
		kernel     string // option of the guest's tunnel
		ours       string // --dscp
		inner      uint8
		wantKernel uint8
		wantOurs   uint8
	}{
		{"tos inherit", "inherit", 0xb8, 0xb8, 0xb8},
		{"tos 0x28", "10", 0x00, 0x28, 0x28},
		{"tos 0x00", "0", 0xb8, 0x00, 0x00},
		// Both ends copy the ECN field, whatever the DSCP (RFC 6040 section 4.1).
		{"tos 0x28", "46", 0x02, 0x2a, 0xba},
		{"tos inherit", "inherit", 0x29, 0x29, 0x29},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s, ours %s, inner %#02x", tt.kernel, tt.ours, tt.inner), func(t *testing.T) {
			l.tunnel(t, tt.kernel)
			wire := l.record(t)
			up(t, l.ours, "--dscp", tt.ours)
			option := fmt.Sprintf("-Q %#02x", tt.inner)
			ping(t, inNamespace(l.ours), peerInner, 56, option)
			ping(t, l.guest.Run, ourInner, 56, option)
			wire.Await(sent(netlab.TOS(tt.wantOurs), request(netlab.TOS(tt.inner))))
			wire.Await(received(netlab.TOS(tt.wantKernel), request(netlab.TOS(tt.inner))))
		})
	}
}

// Linux sets the outer DF with pmtudisc, its default, and copies the inner one with
// nopmtudisc. ipipd clears it by default, or copies the inner one.
func TestKernel_outerDF(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	tests := []struct {
		kernel     string
		ours       string // --dont-fragment
		inner      bool
		wantKernel bool
		wantOurs   bool
	}{
		{"pmtudisc", "no", true, true, false},
		{"pmtudisc", "no", false, true, false},
		{"nopmtudisc", "inherit", true, true, true},
		{"nopmtudisc", "inherit", false, false, false},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s, ours %s, inner %v", tt.kernel, tt.ours, tt.inner), func(t *testing.T) {
			l.tunnel(t, "ttl inherit "+tt.kernel)
			wire := l.record(t)
			up(t, l.ours, "--dont-fragment", tt.ours)
			option := "-M dont"
			if tt.inner {
				option = "-M do"
			}
			ping(t, inNamespace(l.ours), peerInner, fullSize, option)
			ping(t, l.guest.Run, ourInner, fullSize, option)
			wire.Await(sent(netlab.DF(tt.wantOurs), request(netlab.DF(tt.inner))))
			wire.Await(received(netlab.DF(tt.wantKernel), request(netlab.DF(tt.inner))))
		})
	}
}

// With an inner MTU above the underlay's each end fragments outer packets and reassembles the
// other's.
func TestKernel_outerFragments(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	l.tunnel(t, "ttl inherit nopmtudisc")
	l.guest.MustRun("ip link set t0 mtu 9000")
	wire := l.record(t)
	d := up(t, l.ours, "--mtu", "9000")
	ours := inNamespace(l.ours)

	ping(t, ours, peerInner, manyFrags, "-M dont")
	ping(t, l.guest.Run, ourInner, manyFrags, "-M dont")
	for _, source := range []string{ourOuter, peerOuter} {
		from := netlab.All(netlab.Protocol(ipv4.ProtocolIPIP), netlab.Source(source), netlab.DF(false), netlab.MaxTotalLen(1500))
		first := wire.Await(from, netlab.FragmentOffset(0), netlab.MF(true))
		p, err := ipv4.Parse(first.Packet)
		if err != nil {
			t.Fatal(err)
		}
		wire.Await(from, netlab.ID(p.ID()), netlab.MF(false), netlab.Not(netlab.FragmentOffset(0)))
	}
	bulk(t, ours, l.guest.Run, peerInner, false)
	bulk(t, ours, l.guest.Run, peerInner, true)
	if drops := d.Status().AllDrops(); len(drops) > 0 {
		t.Errorf("drops are %v", drops)
	}
}

// The path MTU is lower than both ends' link MTU. With DF=0 the routers fragment outer
// packets; with DF=1 each end has to discover the path MTU and send ICMP errors to its inner
// senders. A PMTU black hole in either direction fails the test.
func TestKernel_pmtu(t *testing.T) {
	t.Parallel()
	second := netlab.Seconds(netlab.Scale(time.Second)) // longer than any round trip
	for _, dontFragment := range []string{"no", "inherit"} {
		t.Run("ours "+dontFragment, func(t *testing.T) {
			t.Parallel()
			l := newNarrowLab(t)
			l.tunnel(t, "ttl 64 pmtudisc")
			wire := l.record(t)
			d := up(t, l.ours, "--dont-fragment", dontFragment, "--clamp-tcp-mss", "no")
			ours := inNamespace(l.ours)
			bulk(t, ours, l.guest.Run, peerInner, false)
			bulk(t, ours, l.guest.Run, peerInner, true)
			// The kernel's end loses two packets that are too large before its inner
			// sender gets an error; these pings provoke that.
			netlab.Eventually(t, "the guest's inner sender knows what fits", func() bool {
				_, err := l.guest.Run(fmt.Sprintf("ping -n -c 1 -W %s -s %d -M dont %s", second, manyFrags, ourInner))
				return err == nil
			})
			ping(t, ours, peerInner, manyFrags, "-M dont")
			ping(t, l.guest.Run, ourInner, manyFrags, "-M dont")
			if dontFragment == "no" {
				return
			}
			const fits = narrowMTU - 20 - 28
			netlab.Eventually(t, "an inner sender gets an ICMP error", func() bool {
				out, err := ours(fmt.Sprintf("ping -n -c 1 -W %s -M do -s %d %s", second, fits+1, peerInner))
				return err != nil && strings.Contains(out, fmt.Sprintf("mtu = %d", narrowMTU-20)) || strings.Contains(out, fmt.Sprintf("mtu=%d", narrowMTU-20))
			})
			wire.Await(netlab.ICMP(3, 4), netlab.Destination(ourOuter))
			if got := d.Status().PathMTU; got != narrowMTU {
				t.Errorf("the path MTU is %d, want %d", got, narrowMTU)
			}
			ping(t, ours, peerInner, fits, "-M do")
		})
	}
}

func TestKernel_echoKeepalive(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	l.tunnel(t, "")
	wire := l.record(t)
	d := up(t, l.ours, "--keepalive", "1s,3", "--keepalive-probe", "echo", "--keepalive-target", peerInner)
	awaitRunning(t, d, true, "up")
	wire.Await(sent(request(netlab.Source(ourInner), netlab.Destination(peerInner))))
	wire.Await(received(reply()))

	l.guest.MustRun("ip link set t0 down")
	awaitRunning(t, d, false, "lost")
	if out := l.ours.Run("ip", "link", "show", "dev", "t0"); !strings.Contains(out, "NO-CARRIER") {
		t.Errorf("ip link shows a carrier: %s", out)
	}
	l.guest.MustRun("ip link set t0 up")
	awaitRunning(t, d, true, "up")
	ping(t, inNamespace(l.ours), peerInner, 56, "")
}

// Linux drops a reflect probe as a martian, since the inner source is its own address, unless
// accept_local is set.
func TestKernel_reflectKeepalive(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	l.tunnel(t, "")
	probe := sent(netlab.TotalLen(40), netlab.Inner(netlab.Source(peerOuter), netlab.Destination(ourOuter), netlab.Protocol(ipv4.ProtocolIPIP)))
	answer := netlab.All(netlab.Source(peerOuter), netlab.Destination(ourOuter), netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20))

	wire := l.record(t)
	d := up(t, l.ours, "--keepalive", "1s,2", "--keepalive-probe", "reflect")
	awaitRunning(t, d, false, "never")
	wire.AwaitN(3, probe)
	if n := len(wire.Matching(answer)); n > 0 {
		t.Errorf("%d probes were answered by a Linux without accept_local", n)
	}
	if w := d.AwaitWarning(warning.PeerNotHeard); !strings.Contains(w.Remedy, "accept_local") {
		t.Errorf("it does not say how Linux is made to answer: %+v", w)
	}

	l.guest.MustRun(`set -e; cd /proc/sys/net/ipv4; echo 1 >ip_forward
		for i in all t0; do echo 1 >conf/$i/accept_local; echo 0 >conf/$i/rp_filter; done`)
	awaitRunning(t, d, true, "up")
	wire.Await(answer)
	// The answers do not reach the interface.
	if s := d.Status(); s.RxPacket > 0 {
		t.Errorf("%d packets reached the interface", s.RxPacket)
	}
	ping(t, inNamespace(l.ours), peerInner, fullSize, "")
}

// BenchmarkKernel measures bulk TCP to and from the kernel's ipip in a guest, with ipipd and,
// for comparison, socat at this end. The guest is the bottleneck: no row should be slower than
// socat. Segmentation offload is off, as the guest's driver accepts no superpackets.
func BenchmarkKernel(b *testing.B) {
	if testing.Short() {
		b.Skip("a minute long")
	}
	for _, tunnel := range []struct {
		name  string
		start func(b *testing.B, ns *netlab.NS)
	}{
		{"socat", func(b *testing.B, ns *netlab.NS) { socat(b, ns, ourOuter, peerOuter, ourInner) }},
		{"userspace", func(b *testing.B, ns *netlab.NS) { up(b, ns) }},
		{"fastpath", func(b *testing.B, ns *netlab.NS) {
			if s := up(b, ns, "--allow-fast-path", "yes").Status().FastPath; s != "active" {
				b.Skipf("no fast path here: %s", s)
			}
		}},
	} {
		b.Run(tunnel.name, func(b *testing.B) {
			for _, way := range []struct {
				name    string
				reverse bool
			}{{"to-guest", false}, {"from-guest", true}} {
				b.Run(way.name, func(b *testing.B) {
					l := newKernelLab(b)
					netlab.DisableOffload(l.ours, "eth0")
					tunnel.start(b, l.ours)
					l.tunnel(b, "")
					var gbps []float64
					for b.Loop() {
						gbps = append(gbps, bulk(b, inNamespace(l.ours), l.guest.Run, peerInner, way.reverse))
					}
					slices.Sort(gbps)
					b.SetBytes(bulkBytes)
					b.ReportMetric(gbps[len(gbps)/2], "Gb/s")
				})
			}
		})
	}
}
