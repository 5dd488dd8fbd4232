package conformance

import (
	"strings"
	"syscall"
	"testing"

	"ipipd/test/netlab"
)

// What decides about packets besides netfilter holds for outer packets too: it may
// be there before the tunnel, or come while that runs, and the tunnel works again
// when it is taken away.
func TestIPsecPoliciesAndTrafficFiltersHoldForOuterPackets(t *testing.T) {
	t.Parallel()
	// Redirected to where nobody is: not every kernel has the action "drop".
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
				pingsAgain(t, a, "it was taken away")

				// There first, and then the tunnel.
				d.Stop(syscall.SIGTERM)
				a.Run("sh", "-c", test.add)
				d.Again()
				for range 3 {
					if answered(a, innerB) {
						t.Fatal("a ping gets through")
					}
				}
			})
		})
	}
}
