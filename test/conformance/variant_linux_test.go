package conformance

import (
	"testing"

	"ipipd/test/netlab"
)

// variant is a configuration of the data path. All must conform to the same rules, so most
// tests run with each.
type variant struct {
	name  string
	flags []string // of `ipipd up`
	fast  bool     // with the fast path
}

var variants = []variant{
	{name: "one-thread", flags: []string{"--threads", "1", "--tun-queues", "1", "--allow-fast-path", "no"}},
	// Several threads receive from the link layer instead of the raw socket.
	{name: "two-threads", flags: []string{"--threads", "2", "--tun-queues", "2", "--allow-fast-path", "no"}},
	// Where the kernel has no fast path this is userspace with default threads.
	{name: "fast-path", fast: true},
}

// eachVariant runs a test with each variant, as parallel subtests; with -short, which the race detector's
// run has, only with those of several threads.
func eachVariant(t *testing.T, test func(t *testing.T, c variant)) {
	t.Helper()
	for _, c := range variants {
		if testing.Short() && c.name == "one-thread" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			test(t, c)
		})
	}
}

// up starts a tunnel t0 of this variant. Keepalive is off unless flags turn it on, so that
// the link carries the test's packets only.
func (c variant) up(t *testing.T, ns *netlab.NS, flags ...string) *netlab.Daemon {
	t.Helper()
	return c.upAs(t, ns, "t0", flags...)
}

// upAs is up for a tunnel of another name.
func (c variant) upAs(t *testing.T, ns *netlab.NS, name string, flags ...string) *netlab.Daemon {
	t.Helper()
	return netlab.Up(t, ns, name, append(append([]string{"--keepalive", "off"}, c.flags...), flags...)...)
}

// upA and upB start one end of the tunnel between hosts.
func (c variant) upA(t *testing.T, a *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return c.up(t, a, append([]string{"--local-address", outerA, "--remote-address", outerB, "--address", innerA + "/24"}, more...)...)
}

func (c variant) upB(t *testing.T, b *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return c.up(t, b, append([]string{"--local-address", outerB, "--remote-address", outerA, "--address", innerB + "/24"}, more...)...)
}

// upFarA and upFarB start one end of the tunnel between routed hosts.
func (c variant) upFarA(t *testing.T, a *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return c.up(t, a, append([]string{"--local-address", farA, "--remote-address", farB, "--address", innerA + "/24"}, more...)...)
}

func (c variant) upFarB(t *testing.T, b *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return c.up(t, b, append([]string{"--local-address", farB, "--remote-address", farA, "--address", innerB + "/24"}, more...)...)
}
