package conformance

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// noCarrier reports whether `ip link` shows t0 without carrier.
func noCarrier(ns *netlab.NS) bool {
	return strings.Contains(ns.Run("ip", "-o", "link", "show", "t0"), "NO-CARRIER")
}

// The interface loses its carrier with the peer, and regains it.
func TestKeepalive_carrier(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		da := c.upA(t, a, "--keepalive", "1s,2")
		db := c.upB(t, b, "--keepalive", "1s,2")
		netlab.Eventually(t, "both ends hear each other, and a is running", func() bool {
			s := da.Status()
			return s.KeepaliveState == "up" && s.Running && !noCarrier(a) && db.Status().KeepaliveState == "up"
		})

		db.Stop(syscall.SIGKILL)
		netlab.Eventually(t, "ip link shows NO-CARRIER", func() bool { return noCarrier(a) })
		netlab.Eventually(t, "print says so too", func() bool { s := da.Status(); return !s.Running && s.KeepaliveState == "lost" })
		if out, _ := da.Run("print"); strings.Contains(out, "R  t0") {
			t.Errorf("print still has the R: %s", out)
		}

		db.Restart()
		netlab.Eventually(t, "the carrier is back", func() bool { return !noCarrier(a) && da.Status().KeepaliveState == "up" })
		ping(t, a, innerB)
	})
}

// There is a keepalive state of its own, with a remedy, for a peer that has never answered.
func TestKeepalive_neverHeard(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, _ := hosts(t)
		d := c.upA(t, a, "--keepalive", "60s,10")
		if s := d.Status(); !s.Running || s.KeepaliveState != "waiting" {
			t.Errorf("at first running %v, %s: want it to wait, running", s.Running, s.KeepaliveState)
		}
		if _, err := d.Run("set", "t0", "keepalive=1s,2"); err != nil {
			t.Fatal(err)
		}
		netlab.Eventually(t, "the wait is over", func() bool { return d.Status().KeepaliveState == "never-heard" })
		netlab.Eventually(t, "there is no carrier", func() bool { return noCarrier(a) })
		if w := d.AwaitWarning(warning.PeerNotHeard); w.Remedy == "" {
			t.Errorf("%+v", w)
		}
	})
}

// Probes continue while neither end is running, so that both recover when the path works.
func TestKeepalive_bothEndsDown(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		router.Sysctl("net.ipv4.ip_forward", "0")
		da := c.up(t, a, "--remote-address", farB, "--keepalive", "1s,1")
		db := c.up(t, b, "--remote-address", farA, "--keepalive", "1s,1")
		netlab.Eventually(t, "both have given up", func() bool { return noCarrier(a) && noCarrier(b) })
		router.Sysctl("net.ipv4.ip_forward", "1")
		netlab.Eventually(t, "both hear each other", func() bool {
			return da.Status().KeepaliveState == "up" && db.Status().KeepaliveState == "up"
		})
		da.AwaitNoWarning(warning.PeerNotHeard)
	})
}

// The inner packet of a reflect probe is sent back, also with keepalive off, and never
// reaches the host.
func TestKeepalive_reflect(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		wire := netlab.Capture(t, a, "veth0", nil)
		da := c.upA(t, a, "--keepalive", "off")
		inside := netlab.CaptureReceived(t, a, "t0")
		db := c.upB(t, b, "--keepalive", "1s,3")
		probe := wire.Await(netlab.Outer(netlab.Source(outerB), netlab.Destination(outerA), netlab.TotalLen(40),
			netlab.Inner(netlab.Source(outerA), netlab.Destination(outerB), netlab.Protocol(4), netlab.TotalLen(20))))
		if probe.Outgoing {
			t.Error("the probe of b left a")
		}
		wire.Await(netlab.Source(outerA), netlab.Destination(outerB), netlab.Protocol(4), netlab.TotalLen(20), netlab.TTL(254))
		netlab.Eventually(t, "b hears a", func() bool { return db.Status().KeepaliveState == "up" })
		if got := inside.Frames(); len(got) > 0 {
			t.Errorf("the host of a got %s", netlab.Describe(got[0].Packet))
		}
		if s := da.Status(); s.KeepaliveState != "off" || !s.Running {
			t.Errorf("keepalive is off, and a is %s, running %v", s.KeepaliveState, s.Running)
		}
	})
}

// A peer behind a 1:1 NAT has its private address in the probe. The answer goes to the
// tunnel's remote, never to an address from a probe.
func TestKeepalive_reflectNAT(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		r := newReceiver(t, c)
		wire := netlab.Capture(t, r.a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		r.a.Run("ip", "route", "add", "10.0.0.0/24", "via", outerB) // a route to the private address
		const probes = 5
		for range probes {
			r.from.send(outerBToA(build(ipv4.Header{TTL: 255, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr("10.0.0.5")}, nil)))
		}
		wire.AwaitN(probes, netlab.Source(outerA), netlab.Destination(outerB), netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20), netlab.TTL(254))
		r.settle()
		if got := r.got(); len(got) > 0 {
			t.Errorf("the host got %s", netlab.Describe(got[0].Packet))
		}
		answers := wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20))
		for _, f := range answers {
			netlab.Assert(t, f.Packet, netlab.Source(outerA), netlab.Destination(outerB), netlab.TTL(254))
		}
		if len(answers) != probes {
			t.Errorf("%d answers to %d probes", len(answers), probes)
		}
	})
}

// An end behind a 1:1 NAT is probed with its public address inside, and answers, also with keepalive off.
// Its own probes have its private address inside, and are answered, too, without a warning.
func TestKeepalive_reflectBehindNAT(t *testing.T) {
	t.Parallel()
	const publicB, privateB = "203.0.113.10", "10.0.0.5"
	eachVariant(t, func(t *testing.T, c variant) {
		a, router, b := routed(t)
		b.Run("ip", "address", "add", privateB+"/32", "dev", "veth0")
		router.Run("ip", "route", "add", privateB, "via", farB)
		router.Run("nft", `add table ip n; add chain ip n pre { type nat hook prerouting priority -100; };
			add chain ip n post { type nat hook postrouting priority 100; };
			add rule ip n pre ip daddr `+publicB+` dnat to `+privateB+`; add rule ip n post ip saddr `+privateB+` snat to `+publicB)
		wire := netlab.Capture(t, a, "veth0", nil)
		db := c.up(t, b, "--local-address", privateB, "--remote-address", farA)
		inside := netlab.CaptureReceived(t, b, "t0")
		da := c.up(t, a, "--local-address", farA, "--remote-address", publicB, "--keepalive", "1s,2")
		answer := []netlab.Check{netlab.Source(publicB), netlab.Destination(farA), netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20)}
		wire.Await(netlab.Outer(netlab.Source(farA), netlab.Destination(publicB), netlab.TotalLen(40),
			netlab.Inner(netlab.Source(publicB), netlab.Destination(farA), netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20))))
		wire.Await(answer...)
		netlab.Eventually(t, "a hears b", func() bool { return da.Status().KeepaliveState == "up" })

		if out, err := db.Run("set", "t0", "keepalive=1s,2"); err != nil {
			t.Fatal(err, out)
		}
		wire.Await(netlab.Outer(netlab.Source(publicB), netlab.Destination(farA), netlab.TotalLen(40),
			netlab.Inner(netlab.Source(farA), netlab.Destination(privateB), netlab.Protocol(ipv4.ProtocolIPIP), netlab.TotalLen(20))))
		netlab.Eventually(t, "b hears a", func() bool { return db.Status().KeepaliveState == "up" })
		wire.AwaitN(5, answer...)
		db.AwaitNoWarning(warning.KeepaliveBehindNAT)
		for name, d := range map[string]*netlab.Daemon{"a": da, "b": db} {
			if s := d.Status(); len(s.Warnings) != 0 || len(s.AllDrops()) != 0 {
				t.Errorf("%s warns of %+v, and drops %v", name, s.Warnings, s.AllDrops())
			}
		}
		if got := inside.Matching(netlab.Protocol(ipv4.ProtocolIPIP)); len(got) > 0 {
			t.Errorf("the host of b got %s", netlab.Describe(got[0].Packet))
		}
	})
}

func TestKeepalive_empty(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		wire := netlab.Capture(t, a, "veth0", nil)
		da := c.upA(t, a, "--keepalive", "1s,3", "--keepalive-probe", "empty")
		db := c.upB(t, b, "--keepalive", "1s,3", "--keepalive-probe", "empty")
		wire.Await(netlab.Source(outerA), netlab.Protocol(4), netlab.TotalLen(20))
		netlab.Eventually(t, "both hear each other", func() bool {
			return da.Status().KeepaliveState == "up" && db.Status().KeepaliveState == "up"
		})
	})
}

// An echo probe is answered by a host without keepalive, and its reply does not reach the
// prober's host.
func TestKeepalive_echo(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		da := c.upA(t, a, "--keepalive", "1s,3", "--keepalive-probe", "echo", "--keepalive-target", innerB)
		inside := netlab.CaptureReceived(t, a, "t0")
		c.upB(t, b, "--keepalive", "off")
		netlab.Eventually(t, "a hears b", func() bool { return da.Status().KeepaliveState == "up" })
		if got := inside.Matching(netlab.ICMP(0, 0)); len(got) > 0 {
			t.Errorf("the reply to a probe reached the host: %s", netlab.Describe(got[0].Packet))
		}
	})
}

// A loss in one direction that begins while the tunnel is up: the end that hears the other stays running, by the
// other's probes or by data alone, and warns that it has no answers until there is one.
func TestKeepalive_oneDirection(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		for _, probe := range []struct {
			form   string
			flags  []string // of a
			peer   string   // keepalive of b
			answer netlab.Check
		}{
			{"reflect", nil, "1s,3", netlab.TotalLen(20)},
			{"echo", []string{"--keepalive-probe", "echo", "--keepalive-target", innerB}, "off", netlab.Inner(netlab.ICMP(0, 0))},
		} {
			t.Run(probe.form, func(t *testing.T) {
				t.Parallel()
				a, router, b := routed(t)
				wire := netlab.CaptureReceived(t, a, "veth0")
				db := c.upFarB(t, b, "--keepalive", probe.peer)
				da := c.upFarA(t, a, append([]string{"--keepalive", "1s,3"}, probe.flags...)...)
				if probe.peer == "off" { // b is heard by what it sends through the tunnel
					ping(t, b, innerA)
					b.Start(exec.Command("ping", "-q", "-i", "0.2", innerA))
				}
				wire.AwaitN(6, netlab.Protocol(4), netlab.Source(farB), probe.answer)
				if c.fast {
					requireFastPath(t, da)
				}
				if s := da.Status(); s.Warning(warning.KeepaliveUnanswered).Code != "" {
					t.Errorf("it is answered, and warns: %+v", s.Warnings)
				}

				router.Run("nft", "table ip x { chain y { type filter hook forward priority 0; ip protocol 4 ip saddr "+farA+" drop; }; }")
				if w := da.AwaitWarning(warning.KeepaliveUnanswered); !strings.Contains(w.Detail, "has answered none since 20") || !strings.Contains(w.Remedy, "from "+farA+" to "+farB) {
					t.Errorf("%+v", w)
				}
				netlab.Eventually(t, "it runs", func() bool { s := da.Status(); return s.Running && s.KeepaliveState == "up" })
				if probe.peer != "off" {
					netlab.Eventually(t, "the other end does not", func() bool { return db.Status().KeepaliveState == "lost" })
				}

				router.Run("nft", "delete table ip x")
				da.AwaitNoWarning(warning.KeepaliveUnanswered)
			})
		}
	})
}
