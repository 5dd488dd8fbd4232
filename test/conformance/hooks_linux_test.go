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

// What hangs on the tunnel's own interface: what is sent meets it behind the program of
// the fast path, which is therefore left; what is received meets it as ever.

// attachTCXDrop hangs a program of another on t0 that drops everything, and returns how to take it
// away.
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

// runOrSkip runs commands in a namespace, and skips the test where that cannot be done.
func runOrSkip(t *testing.T, ns *netlab.NS, commands string) {
	t.Helper()
	if out, err := ns.Try("sh", "-ec", commands); err != nil {
		t.Skipf("this system cannot %s: %s", commands, strings.TrimSpace(out))
	}
}

// hole is a tc filter's action: not every kernel has "drop".
const hole = " protocol ip u32 match u32 0 0 action mirred egress redirect dev hole"

// addBlackhole makes the device that packets vanish in.
func addBlackhole(t *testing.T, ns *netlab.NS) {
	t.Helper()
	ns.Run("sh", "-ec", "ip link add hole type veth peer name nobody; ip link set hole up")
}

// pingInBackground has one ping after the other run until the test ends.
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
		looked    bool // nobody tells of it
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
				runOrSkip(t, a, "tc qdisc add dev t0 clsact || true; tc filter add dev t0 egress"+hole)
				return func() { a.Run("tc", "filter", "del", "dev", "t0", "egress") } // clsact stays, and is nothing
			},
			holds: drops,
		},
		{
			name: "tcx", why: "another eBPF program",
			add:   func(t *testing.T, a *netlab.NS) func() { return attachTCXDrop(t, a, ebpf.AttachTCXEgress) },
			holds: drops, looked: true,
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
			looked: true,
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
			if x.looked {
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
			// There first, and then the tunnel's next look at it.
			x.add(t, a)
			a.Run("ip", "link", "set", "t0", "down")
			a.Run("ip", "link", "set", "t0", "up")
			netlab.Eventually(t, "the fast path is left", func() bool { return strings.Contains(d.Status().FastPath, x.why) })
		})
	}
}

// An idle tunnel is looked at whenever it is for something else.
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

// What is received is handed to the interface as its driver does, whoever carries it:
// filters, programs, nftables and captures there see it, and the fast path stays. So it
// does for what a packet meets before the program on its way out.
func TestHooks_ingress(t *testing.T) {
	t.Parallel()
	const chain = "nft add table netdev t; nft add chain netdev t c '{ type filter hook %s device t0 priority 0 ; }'; nft add rule netdev t c ip daddr 10.255.0.0/24 drop"
	for _, x := range []struct {
		name string
		add  func(t *testing.T, a *netlab.NS) (remove func())
	}{
		{"tc filter", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, "tc qdisc add dev t0 clsact; tc filter add dev t0 ingress"+hole)
			return func() { a.Run("tc", "qdisc", "del", "dev", "t0", "clsact") }
		}},
		{"ingress queueing discipline", func(t *testing.T, a *netlab.NS) func() {
			runOrSkip(t, a, "tc qdisc add dev t0 ingress; tc filter add dev t0 parent ffff:"+hole)
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

// On the underlay what is sent is seen and queued as ever, whoever carries it.
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
