package conformance

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// IPsec policies and tc filters apply to outer packets, whether they exist before the tunnel or
// are added while it runs, until they are removed.
func TestFilter_xfrmAndTC(t *testing.T) {
	t.Parallel()
	// Redirected to a veth whose peer is down: not every kernel has the action "drop".
	const all = "protocol ip prio 1 u32 match ip protocol 4 0xff action mirred egress redirect dev hole"
	for _, test := range []struct{ name, add, remove string }{
		{"an IPsec policy out",
			"ip xfrm policy add src 192.0.2.1 dst 192.0.2.2 proto 4 dir out action block",
			"ip xfrm policy delete src 192.0.2.1 dst 192.0.2.2 proto 4 dir out"},
		{"an IPsec policy in",
			"ip xfrm policy add src 192.0.2.2 dst 192.0.2.1 proto 4 dir in action block",
			"ip xfrm policy delete src 192.0.2.2 dst 192.0.2.1 proto 4 dir in"},
		{"tc on egress",
			"tc qdisc add dev veth0 clsact && tc filter add dev veth0 egress " + all,
			"tc qdisc delete dev veth0 clsact"},
		{"tc on ingress",
			"tc qdisc add dev veth0 clsact && tc filter add dev veth0 ingress " + all,
			"tc qdisc delete dev veth0 clsact"},
		{"tc on an ingress qdisc",
			"tc qdisc add dev veth0 ingress && tc filter add dev veth0 parent ffff: " + all,
			"tc qdisc delete dev veth0 ingress"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				d := c.upA(t, a)
				c.upB(t, b)
				ping(t, a, innerB)
				a.Run("ip", "link", "add", "hole", "type", "veth", "peer", "name", "nobody")
				a.Run("ip", "link", "set", "hole", "up")
				if out, err := a.Try("sh", "-c", test.add); err != nil {
					t.Skipf("this system cannot %s: %s", test.add, strings.TrimSpace(out))
				}
				netlab.Eventually(t, "packets stop", func() bool { return !answered(a, innerB) })
				a.Run("sh", "-c", test.remove)
				awaitPing(t, a, "it was taken away")

				// The filter exists before the tunnel.
				d.Stop(syscall.SIGTERM)
				a.Run("sh", "-c", test.add)
				d.Restart()
				for range 3 {
					if answered(a, innerB) {
						t.Fatal("a ping gets through")
					}
				}
			})
		})
	}
}

// nftables rules for protocol 4 that are added while a tunnel runs apply to its outer packets
// in both directions, until they are removed.
func TestFilter_nftables(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft (package nftables)")
	}
	for _, hook := range []string{"output", "postrouting", "prerouting", "input"} {
		t.Run(hook, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				d := c.upA(t, a)
				c.upB(t, b)
				ping(t, a, innerB)
				if out, err := a.Try("nft", "add table ip test; add chain ip test stop { type filter hook "+hook+" priority 0 ; } ; add rule ip test stop ip protocol 4 drop"); err != nil {
					t.Skipf("needs a kernel with nftables: %s", out)
				}
				// The rule takes effect asynchronously, after its netlink notification.
				netlab.Eventually(t, "packets stop", func() bool { return !answered(a, innerB) })
				wire := outgoing(t, a, "veth0")
				inside := netlab.CaptureReceived(t, a, "t0")
				before := d.Status()
				newInjector(t, a, "t0", nil, "").send(datagram(aToB(1), 100))
				newInjector(t, b, "t0", nil, "").send(datagram(bToA(2), 100))
				if hook == "output" || hook == "postrouting" {
					inside.Await(netlab.ID(2))
					netlab.Eventually(t, "the packet was tried", func() bool {
						s := d.Status()
						return s.TxPacket+s.Drops["send-failed"] > before.TxPacket+before.Drops["send-failed"]
					})
				} else {
					wire.Await(carries(1))
				}
				if answered(a, innerB) {
					t.Error("a ping gets through")
				}
				if hook == "output" || hook == "postrouting" {
					if got := wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP)); len(got) != 0 {
						t.Errorf("and yet there left %s", netlab.Describe(got[0].Packet))
					}
				} else if got := inside.Frames(); len(got) != 0 {
					t.Errorf("and yet there came %s", netlab.Describe(got[0].Packet))
				}
				a.Run("nft", "delete table ip test")
				awaitPing(t, a, "the rule was taken away")
			})
		})
	}
}
