package conformance

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"ipipd/test/netlab"
)

// Queueing disciplines, tc filters, tcx programs, nftables chains and packet sockets on the
// tunnel's own interface. On egress the root queueing discipline and packet sockets come after the
// fast path's program, which would bypass them: the fast path is disabled. The others see packets as
// usual.

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

// The fast path is disabled while something that follows its program is on the egress of the tunnel's
// interface.
func TestHooks_egress(t *testing.T) {
	t.Parallel()
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
// programs, chains and captures see them, and the fast path stays active. It does for those of egress
// too, which come before its own program.
func TestHooks_filters(t *testing.T) {
	t.Parallel()
	const clsact = "tc qdisc add dev t0 clsact 2>/dev/null || tc qdisc replace dev t0 clsact; "
	const chain = "nft add table netdev t; nft add chain netdev t c '{ type filter hook %s device t0 priority 0 ; }'; nft add rule netdev t c ip daddr 10.255.0.0/24 drop"
	for _, x := range []struct {
		name string
		add  func(t *testing.T, a *netlab.NS) (remove func())
	}{
		{"tc filter", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, clsact+"tc filter add dev t0 ingress"+toBlackhole)
			return func() { a.Run("tc", "filter", "del", "dev", "t0", "ingress") }
		}},
		{"tc filter on egress", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, clsact+"tc filter add dev t0 egress pref 9"+toBlackhole)
			return func() { a.Run("tc", "filter", "del", "dev", "t0", "egress", "pref", "9") }
		}},
		{"tc filter on egress of any preference", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, clsact+"tc filter add dev t0 egress"+toBlackhole)
			return func() { a.Run("tc", "qdisc", "del", "dev", "t0", "clsact") }
		}},
		{"tcx on egress", func(t *testing.T, a *netlab.NS) func() { return attachTCXDrop(t, a, ebpf.AttachTCXEgress) }},
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

// The queueing discipline ingress takes the place of clsact, which the fast path's program needs.
func TestHooks_ingressQdisc(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a)
		c.upB(t, b)
		if c.fast {
			requireFastPath(t, d)
			a.Run("tc", "qdisc", "del", "dev", "t0", "clsact")
		}
		addBlackhole(t, a)
		runOrSkip(t, a, "tc qdisc add dev t0 ingress; tc filter add dev t0 parent ffff:"+toBlackhole)
		if _, err := a.Try("ping", "-c", "2", "-i", "0.2", "-W", "1", innerB); err == nil {
			t.Error("a ping gets through")
		}
		if c.fast {
			netlab.Eventually(t, "print names it", func() bool { return strings.Contains(d.Status().FastPath, "clsact of the interface was removed") })
		}
		a.Run("tc", "qdisc", "del", "dev", "t0", "ingress")
		awaitPing(t, a, "it was taken away")
		if c.fast {
			a.Run("tc", "qdisc", "add", "dev", "t0", "clsact")
			netlab.Eventually(t, "the fast path is taken again", func() bool { return d.Status().FastPath == "active" })
		}
	})
}

// An operator takes the fast path's program away: packets go on through userspace, and it comes back
// without a loss, but not into a place that they may want for a queueing discipline of theirs.
func TestHooks_programRemoved(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, command, back string }{
		{"filters", "for i in $(seq 20); do tc filter del dev t0 egress; sleep 0.1; done", ""},
		{"clsact", "tc qdisc del dev t0 clsact", "tc qdisc add dev t0 clsact"},
		{"clsact, and then the interface is down", "tc qdisc del dev t0 clsact", "ip link set t0 down; ip link set t0 up"},
		{"clsact, moved to another network namespace and back", "ip link set t0 netns %s; nsenter --net=%[1]s ip link set t0 netns %[2]s; ip link set t0 up", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			d := fast.upA(t, a)
			fast.upB(t, b)
			requireFastPath(t, d)
			var end func()
			if c.name == "filters" {
				end = netlab.Stream(t, a, innerA, b, innerB)
			} else {
				a.Start(exec.Command("ping", "-q", "-i", "0.002", "-c", "1000", innerB))
			}
			if strings.Contains(c.command, "netns") {
				c.command = fmt.Sprintf(c.command, netlab.New(t).Path(), a.Path())
			}
			runOrSkip(t, a, c.command)
			if c.name == "filters" {
				end()
				netlab.Eventually(t, "it is counted", func() bool { return d.Status().Restored["program"] > 0 })
			}
			if c.back != "" {
				netlab.Eventually(t, "print says so", func() bool { return strings.Contains(d.Status().FastPath, "clsact of the interface was removed") })
				transfer(t, a, b, innerB, 1<<20)
				a.Run("sh", "-ec", c.back)
			}
			netlab.Eventually(t, "the fast path is active", func() bool { return d.Status().FastPath == "active" })
			transfer(t, a, b, innerB, 1<<20)
			if out := a.Run("tc", "filter", "show", "dev", "t0", "egress"); !strings.Contains(out, "ipip_encap") {
				t.Errorf("on the egress there is: %s", out)
			}
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
