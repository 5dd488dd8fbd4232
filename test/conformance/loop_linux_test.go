package conformance

import (
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// The route to the remote leads into the tunnel itself: the loop is detected, counted, and
// logged once, and the tunnel works again when the route is corrected.
func TestLoop_routeIntoTunnel(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change []string // of a's routes
		undo   []string
	}{
		{"a route to the remote", []string{"add", outerB + "/32", "dev", "t0"}, []string{"delete", outerB + "/32", "dev", "t0"}},
		{"a default route without the network", []string{"replace", "192.0.2.0/24", "dev", "t0", "src", outerA}, []string{"replace", "192.0.2.0/24", "dev", "veth0", "src", outerA}},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				d := c.upA(t, a)
				c.upB(t, b)
				ping(t, a, innerB)
				a.Run("ip", append([]string{"route"}, test.change...)...)

				into := newInjector(t, a, "t0", nil, "")
				for _, want := range []uint64{1, 20, 40} {
					netlab.Eventually(t, "the loop is counted", func() bool {
						into.send(datagram(aToB(1), 500))
						return d.Drops("loop") >= want
					})
				}
				if w := d.AwaitWarning(warning.RouteLoop); !strings.Contains(w.Remedy, outerB) {
					t.Errorf("%+v", w)
				}
				if s := d.Status(); s.ActualMTU != 1480 {
					t.Errorf("the MTU is %d now: it followed its own interface", s.ActualMTU)
				}

				a.Run("ip", append([]string{"route"}, test.undo...)...)
				netlab.Eventually(t, "the tunnel works again", func() bool { return answered(a, innerB) })
				d.AwaitNoWarning(warning.RouteLoop)
			})
		})
	}
}

// A looped probe does not count as received from the remote.
func TestLoop_keepalive(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		sinkIPIP(t, b)
		d := c.upA(t, a, "--keepalive", "1s,2")
		a.Run("ip", "route", "add", outerB+"/32", "dev", "t0")
		netlab.Eventually(t, "the tunnel is not running, and nothing was heard", func() bool {
			s := d.Status()
			return !s.Running && s.KeepaliveState == "never-heard"
		})
	})
}

// Two tunnels whose remotes are routed into each other: the outer packet of one
// is the inner packet of the other.
func TestLoop_twoTunnels(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		sinkIPIP(t, b)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		first := c.upA(t, a)
		second := netlab.Up(t, a, "t1", append(c.flags, "--keepalive", "off", "--local-address", outerA, "--remote-address", "192.0.2.3")...)
		a.Run("ip", "route", "add", outerB+"/32", "dev", "t1")
		a.Run("ip", "route", "add", "192.0.2.3/32", "dev", "t0")
		into := newInjector(t, a, "t0", nil, "")
		netlab.Eventually(t, "the loop is counted", func() bool {
			into.send(datagram(aToB(1), 500))
			return first.Drops("loop")+second.Drops("loop") > 0
		})
		for _, f := range wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP)) {
			netlab.Assert(t, f.Packet, netlab.MaxTotalLen(20+20+528))
		}
	})
}
