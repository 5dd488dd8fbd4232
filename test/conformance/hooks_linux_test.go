package conformance

import (
	"errors"
	"net"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"ipipd/test/netlab"
)

// Queueing disciplines, tc filters, tcx programs, nftables chains and packet sockets on the
// tunnel's own interface. On egress they come after the fast path's tcx program, which would
// bypass them: the fast path is disabled. On ingress they see packets as usual.

// attachTCXDrop attaches a foreign tcx program to t0 that drops everything.
func attachTCXDrop(t *testing.T, ns *netlab.NS, where ebpf.AttachType) (remove func()) {
	t.Helper()
	var l link.Link
	ns.Do(func() {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // TCX_DROP
		})
		if err != nil {
			t.Skipf("cannot load a program: %v", err)
		}
		defer p.Close()
		i, err := net.InterfaceByName("t0")
		if err != nil {
			t.Fatal(err)
		}
		l, err = link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: p, Attach: where})
		if errors.Is(err, ebpf.ErrNotSupported) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

// runOrSkip runs shell commands in a namespace, and skips the test if one fails.
func runOrSkip(t *testing.T, ns *netlab.NS, commands string) {
	t.Helper()
	if out, err := ns.Try("sh", "-ec", commands); err != nil {
		t.Skipf("this system cannot %s: %s", commands, strings.TrimSpace(out))
	}
}

// toBlackhole is a tc filter that redirects all packets to the device of addBlackhole: not
// every kernel has the action "drop".
const toBlackhole = " protocol ip u32 match u32 0 0 action mirred egress redirect dev hole"

// addBlackhole adds the device "hole", a veth whose peer is down: it drops all packets.
func addBlackhole(t *testing.T, ns *netlab.NS) {
	t.Helper()
	ns.Run("sh", "-ec", "ip link add hole type veth peer name nobody; ip link set hole up")
}

// pingInBackground sends pings until the test ends.
func pingInBackground(t *testing.T, ns *netlab.NS) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = ns.Try("ping", "-c", "1", "-W", "1", innerB)
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
}

// The fast path is disabled while something is attached to the egress of the tunnel's
// interface.
func TestHooks_egress(t *testing.T) {
	t.Parallel()
	drops := func(t *testing.T, a *netlab.NS) {
		if _, err := a.Try("ping", "-c", "1", "-W", "1", innerB); err == nil {
			t.Error("a ping gets past what drops all")
		}
	}
	for _, x := range []struct {
		name, why string
		add       func(t *testing.T, a *netlab.NS) (remove func())
		holds     func(t *testing.T, a *netlab.NS)
		polled    bool // the kernel sends no notification
	}{
		{
			name: "queueing discipline", why: "queueing discipline tbf",
			add: func(t *testing.T, a *netlab.NS) func() {
				runOrSkip(t, a, "tc qdisc add dev t0 root tbf rate 5mbit burst 20k latency 100ms")
				return func() { a.Run("tc", "qdisc", "del", "dev", "t0", "root") }
			},
			holds: func(t *testing.T, a *netlab.NS) {
				ping(t, a, innerB)
				out := a.Run("tc", "-s", "qdisc", "show", "dev", "t0")
				if m := regexp.MustCompile(`Sent \d+ bytes (\d+) pkt`).FindStringSubmatch(out); m == nil || m[1] == "0" {
					t.Errorf("the discipline saw nothing of a ping:\n%s", out)
				}
			},
		},
		{
			name: "tc filter", why: "tc has filters on the egress of the interface",
			add: func(t *testing.T, a *netlab.NS) func() {
				runOrSkip(t, a, "tc qdisc add dev t0 clsact || true; tc filter add dev t0 egress"+toBlackhole)
				return func() { a.Run("tc", "filter", "del", "dev", "t0", "egress") } // an empty clsact stays
			},
			holds: drops,
		},
		{
			name: "tcx", why: "another eBPF program",
			add:   func(t *testing.T, a *netlab.NS) func() { return attachTCXDrop(t, a, ebpf.AttachTCXEgress) },
			holds: drops, polled: true,
		},
		{
			name: "promiscuous mode", why: "promiscuous",
			add: func(t *testing.T, a *netlab.NS) func() {
				a.Run("ip", "link", "set", "t0", "promisc", "on")
				return func() { a.Run("ip", "link", "set", "t0", "promisc", "off") }
			},
			holds: func(t *testing.T, a *netlab.NS) { ping(t, a, innerB) },
		},
		{
			name: "capture", why: "packet socket",
			add: func(t *testing.T, a *netlab.NS) func() {
				return netlab.Capture(t, a, "t0", nil).Close
			},
			holds: func(t *testing.T, a *netlab.NS) {
				inside := netlab.Capture(t, a, "t0", func(f netlab.Frame) bool { return f.Outgoing })
				ping(t, a, innerB)
				inside.Await(netlab.ICMP(8, 0))
				inside.Close()
			},
			polled: true,
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			d := fast.upA(t, a)
			fast.upB(t, b)
			requireFastPath(t, d)
			ping(t, a, innerB)
			addBlackhole(t, a)
			if x.polled {
				pingInBackground(t, a)
			}
			for range 2 {
				remove := x.add(t, a)
				netlab.Eventually(t, "the fast path is left", func() bool { return strings.Contains(d.Status().FastPath, x.why) })
				x.holds(t, a)
				remove()
				netlab.Eventually(t, "it is taken again", func() bool { return d.Status().FastPath == "active" })
				ping(t, a, innerB)
			}
			// The hook first, then the interface goes up.
			x.add(t, a)
			a.Run("ip", "link", "set", "t0", "down")
			a.Run("ip", "link", "set", "t0", "up")
			netlab.Eventually(t, "the fast path is left", func() bool { return strings.Contains(d.Status().FastPath, x.why) })
		})
	}
}

// A capture is noticed on an idle tunnel too.
func TestHooks_idleCapture(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	d := fast.upA(t, a)
	requireFastPath(t, d)
	capture := netlab.Capture(t, a, "t0", nil)
	netlab.Eventually(t, "the fast path is left", func() bool { return strings.Contains(d.Status().FastPath, "packet socket") })
	capture.Close()
	netlab.Eventually(t, "it is taken again", func() bool { return d.Status().FastPath == "active" })
}

// Received packets enter the interface as from its driver, in every variant: ingress filters,
// programs, chains and captures see them, and the fast path stays active. It does for nftables
// egress chains too, which run before tcx.
func TestHooks_ingress(t *testing.T) {
	t.Parallel()
	const chain = "nft add table netdev t; nft add chain netdev t c '{ type filter hook %s device t0 priority 0 ; }'; nft add rule netdev t c ip daddr 10.255.0.0/24 drop"
	for _, x := range []struct {
		name string
		add  func(t *testing.T, a *netlab.NS) (remove func())
	}{
		{"tc filter", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, "tc qdisc add dev t0 clsact; tc filter add dev t0 ingress"+toBlackhole)
			return func() { a.Run("tc", "qdisc", "del", "dev", "t0", "clsact") }
		}},
		{"ingress queueing discipline", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, "tc qdisc add dev t0 ingress; tc filter add dev t0 parent ffff:"+toBlackhole)
			return func() { a.Run("tc", "qdisc", "del", "dev", "t0", "ingress") }
		}},
		{"tcx", func(t *testing.T, a *netlab.NS) func() { return attachTCXDrop(t, a, ebpf.AttachTCXIngress) }},
		{"nftables ingress", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, strings.ReplaceAll(chain, "%s", "ingress"))
			return func() { a.Run("nft", "delete", "table", "netdev", "t") }
		}},
		{"nftables egress", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, strings.ReplaceAll(chain, "%s", "egress"))
			return func() { a.Run("nft", "delete", "table", "netdev", "t") }
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				d := c.upA(t, a)
				c.upB(t, b)
				if c.fast {
					requireFastPath(t, d)
				}
				inside := netlab.CaptureReceived(t, a, "t0")
				ping(t, a, innerB)
				inside.Await(netlab.ICMP(0, 0))
				addBlackhole(t, a)
				remove := x.add(t, a)
				if _, err := a.Try("ping", "-c", "2", "-i", "0.2", "-W", "1", innerB); err == nil {
					t.Error("a ping gets through")
				}
				if s := d.Status().FastPath; c.fast && s != "active" {
					t.Errorf("the fast path is left: %s", s)
				}
				remove()
				awaitPing(t, a, "it was taken away")
			})
		})
	}
}

// Captures and queueing disciplines of the underlay see outer packets in every variant.
func TestHooks_underlay(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a)
		c.upB(t, b)
		if c.fast {
			requireFastPath(t, d)
		}
		runOrSkip(t, a, "tc qdisc add dev veth0 root handle 1: pfifo")
		wire := netlab.Capture(t, a, "veth0", nil)
		before := d.Status().TxPacket
		ping(t, a, innerB)
		if s := d.Status(); c.fast && s.FastPath != "active" || s.TxPacket == before {
			t.Errorf("fast-path is %s, and %d packets were sent", s.FastPath, s.TxPacket-before)
		}
		sent := wire.Await(netlab.Outer(netlab.Source(outerA), netlab.Inner(netlab.ICMP(8, 0))))
		if !sent.Outgoing {
			t.Error("the request came in")
		}
		wire.Await(netlab.Outer(netlab.Source(outerB), netlab.Inner(netlab.ICMP(0, 0))))
		pkts := regexp.MustCompile(`Sent \d+ bytes (\d+) pkt`).FindStringSubmatch(a.Run("tc", "-s", "qdisc", "show", "dev", "veth0"))
		if pkts == nil || pkts[1] == "0" {
			t.Errorf("the queueing discipline saw nothing: %v", pkts)
		}
		runOrSkip(t, a, "tc qdisc replace dev veth0 root handle 1: pfifo limit 0")
		if _, err := a.Try("ping", "-c", "1", "-W", "1", innerB); err == nil {
			t.Error("a ping gets through a queue without room")
		}
		a.Run("tc", "qdisc", "del", "dev", "veth0", "root")
		awaitPing(t, a, "the queue is gone")
	})
}
