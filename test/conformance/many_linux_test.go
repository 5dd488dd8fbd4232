package conformance

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// mesh returns a hub and spokes on one link: 192.0.2.1 and 192.0.2.11, .12, …, each with a network of its own on
// lo: 10.10.0.1/16 and 10.11.0.1/16, 10.12.0.1/16, ….
func mesh(t *testing.T, spokes int) (hub *netlab.NS, spoke []*netlab.NS) {
	t.Helper()
	hub = netlab.New(t)
	hub.Run("sh", "-ec", "ip link add br0 type bridge; ip address add 192.0.2.1/24 dev br0; ip link set br0 up; ip address add 10.10.0.1/16 dev lo")
	for i := range spokes {
		s, n := netlab.New(t), 11+i
		port := fmt.Sprintf("port%d", i)
		netlab.Veth(t, hub, s, netlab.End{Name: port}, netlab.End{Name: "veth0", Address: fmt.Sprintf("192.0.2.%d/24", n)})
		hub.Run("ip", "link", "set", port, "master", "br0", "up")
		s.Run("ip", "address", "add", fmt.Sprintf("10.%d.0.1/16", n), "dev", "lo")
		spoke = append(spoke, s)
	}
	return hub, spoke
}

func outerOf(n int) string { return fmt.Sprintf("192.0.2.%d", n) }

// upAny starts a tunnel with many remotes.
func (c variant) upAny(t *testing.T, ns *netlab.NS, n int, more ...string) *netlab.Daemon {
	t.Helper()
	return c.up(t, ns, append([]string{"--local-address", outerOf(n), "--remote-address", "any", "--address", fmt.Sprintf("10.255.0.%d/32", n)}, more...)...)
}

// routeTo adds or replaces a route with a gateway, as a routing protocol does.
func routeTo(ns *netlab.NS, prefix string, remote int) {
	ns.Run("ip", "route", "replace", prefix, "via", outerOf(remote), "dev", "t0", "onlink")
}

// The routes of the interface say where packets go, as they change, and who may send.
func TestMany_routes(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 3)
		d := c.upAny(t, hub, 1)
		for i, s := range spoke[:2] {
			// The spokes have one remote, or any: that makes no difference.
			if i == 0 {
				c.up(t, s, "--local-address", outerOf(11), "--remote-address", outerOf(1), "--address", "10.255.0.11/32", "--route", "10.10.0.0/16", "--route", "10.255.0.1/32")
			} else {
				c.upAny(t, s, 11+i)
				routeTo(s, "10.10.0.0/16", 1)
				routeTo(s, "10.255.0.1/32", 1)
			}
			routeTo(hub, fmt.Sprintf("10.%d.0.0/16", 11+i), 11+i)
			netlab.Eventually(t, "both ends have followed their routes", func() bool {
				_, err := hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", 11+i))
				return err == nil
			})
			ping(t, s, "-I", fmt.Sprintf("10.%d.0.1", 11+i), "10.10.0.1")
		}

		// A prefix of the first spoke moves to the third one, which was not there before: it takes over the address.
		c.upAny(t, spoke[2], 13)
		routeTo(spoke[2], "10.10.0.0/16", 1)
		routeTo(spoke[2], "10.255.0.1/32", 1)
		spoke[2].Run("ip", "address", "add", "10.11.7.1/32", "dev", "lo")
		routeTo(hub, "10.11.7.0/24", 13)
		netlab.Eventually(t, "the longer prefix is followed", func() bool { return answered(hub, "10.11.7.1") })
		hub.Run("ip", "route", "del", "10.11.7.0/24")
		spoke[0].Run("ip", "address", "add", "10.11.7.1/32", "dev", "lo")
		netlab.Eventually(t, "and the shorter one once that is gone", func() bool { return answered(hub, "10.11.7.1") })

		// The second spoke sends from an inner source of the first one.
		spoke[1].Run("ip", "address", "add", "10.11.0.9/32", "dev", "lo")
		ping(t, spoke[1], "-I", "10.12.0.1", "10.10.0.1") // from its own one
		before := d.Drops("reverse-path")
		if _, err := spoke[1].Try("ping", "-c", "1", "-W", "1", "-I", "10.11.0.9", "10.10.0.1"); err == nil {
			t.Error("an inner source of another remote is accepted")
		}
		if d.Drops("reverse-path") == before {
			t.Error("it is not counted")
		}
	})
}

// Without a route of the interface nothing is sent. The sender is not told: the route may be so new that it
// is not followed yet.
func TestMany_noRemote(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, _ := mesh(t, 1)
		d := c.upAny(t, hub, 1)
		hub.Run("ip", "route", "add", "224.0.0.0/4", "dev", "t0")
		netlab.Eventually(t, "multicast without a gateway is counted", func() bool {
			_, _ = hub.Try("ping", "-c", "1", "-W", "1", "224.0.0.5")
			return d.Drops("remote-not-usable") > 0
		})
		netlab.Eventually(t, "what no route covers is counted", func() bool {
			if out, err := hub.Try("ping", "-c", "1", "-W", "1", "-I", "t0", "10.99.0.1"); err == nil || strings.Contains(out, "nreachable") {
				t.Error(out)
			}
			return d.Drops("no-remote") > 0
		})
	})
}

// A gateway, or a destination without one, that is reached through the interface itself is a loop, and is dropped.
func TestMany_loop(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, _ := mesh(t, 1)
		d := c.upAny(t, hub, 1)
		hub.Run("ip", "route", "add", "10.1.0.0/16", "via", "203.0.113.7", "dev", "t0", "onlink")
		hub.Run("ip", "route", "add", "203.0.113.0/24", "via", outerOf(11), "dev", "t0", "onlink")
		hub.Run("ip", "route", "add", "10.2.0.0/16", "dev", "t0")
		for _, to := range []string{"10.1.0.1", "10.2.0.1"} {
			before := d.Drops("loop")
			netlab.Eventually(t, "a loop is counted", func() bool {
				_, _ = hub.Try("ping", "-c", "1", "-W", "1", to)
				return d.Drops("loop") > before
			})
		}
		before := d.Status().TxPacket
		time.Sleep(100 * time.Millisecond)
		if now := d.Status().TxPacket; now > before+2 {
			t.Errorf("it goes on: %d packets, then %d", before, now)
		}
	})
}

// The real server of a load balancer takes packets to the addresses that it serves only.
func TestMany_acceptTo(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		server, spoke := mesh(t, 2)
		server.Run("ip", "address", "add", "203.0.113.5/32", "dev", "lo")
		server.Run("ip", "address", "add", "203.0.113.6/32", "dev", "lo")
		server.Sysctl("net.ipv4.conf.all.rp_filter", "0")
		d := c.up(t, server, "--remote-address", "any", "--accept-from", "192.0.2.11,172.16.0.0/12", "--accept-to", "203.0.113.5/32")
		server.Sysctl("net.ipv4.conf.t0.rp_filter", "0")
		for i, s := range spoke {
			n := 11 + i
			c.up(t, s, "--local-address", outerOf(n), "--remote-address", outerOf(1), "--route", "203.0.113.0/24")
			server.Run("ip", "route", "add", fmt.Sprintf("10.%d.0.0/16", n), "via", outerOf(n)) // answers leave by the underlay
		}
		ping(t, spoke[0], "-I", "10.11.0.1", "203.0.113.5")
		if out, err := spoke[0].Try("ping", "-c", "1", "-W", "1", "-I", "10.11.0.1", "203.0.113.6"); err == nil {
			t.Error(out)
		}
		if d.Drops("not-in-accept-to") == 0 {
			t.Error("another destination is not counted")
		}
		if out, err := spoke[1].Try("ping", "-c", "1", "-W", "1", "-I", "10.12.0.1", "203.0.113.5"); err == nil {
			t.Error(out)
		}
		if d.Drops("not-in-accept-from") == 0 {
			t.Error("another source is not counted")
		}
	})
}

// The path MTU of each remote is that of its route, and an ICMP error about one remote does not concern the others.
func TestMany_paths(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 3)
		hub.Run("ip", "route", "add", "192.0.2.12/32", "dev", "br0", "mtu", "1300")
		d := c.upAny(t, hub, 1, "--mtu", "1480", "--dont-fragment", "inherit")
		for i, s := range spoke {
			n := 11 + i
			routeTo(hub, fmt.Sprintf("10.%d.0.0/16", n), n)
			if n != 13 { // there nothing takes protocol 4
				c.upAny(t, s, n)
				routeTo(s, "10.10.0.0/16", 1)
			}
		}
		from := []string{"-c", "1", "-W", "1", "-I", "10.10.0.1", "-M", "do", "-s", "1400"}
		netlab.Eventually(t, "what does not fit one path is told, with that path's MTU", func() bool {
			out, _ := hub.Try("ping", append(from, "10.12.0.1")...)
			return strings.Contains(out, "mtu = 1280") || strings.Contains(out, "mtu=1280")
		})
		ping(t, hub, append(from[4:], "10.11.0.1")...)
		disableTxChecksum(t, spoke[:2]...)
		inside := netlab.CaptureReceived(t, hub, "t0")
		for i, mss := range []uint16{1440, 1240} {
			source := fmt.Sprintf("10.255.0.%d", 11+i)
			routeTo(hub, source+"/32", 11+i)
			transfer(t, spoke[i], hub, "10.10.0.1", 1<<10)
			inside.Await(netlab.Source(source), syn(flagSYN, mss)) // what fits the path to that remote
		}
		netlab.Eventually(t, "the sender is told of an unreachable remote", func() bool {
			out, _ := hub.Try("ping", "-c", "2", "-W", "1", "-I", "10.10.0.1", "10.13.0.1")
			return strings.Contains(out, "Destination Host Unreachable")
		})
		ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
		c.upAny(t, spoke[2], 13)
		routeTo(spoke[2], "10.10.0.0/16", 1)
		netlab.Eventually(t, "it is there again, and heard", func() bool {
			out, err := hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "10.13.0.1")
			return err == nil && !strings.Contains(out, "nreachable")
		})
		if n := d.Status().ActualMTU; n != 1480 {
			t.Errorf("actual-mtu is %d", n)
		}
	})
}

// Without mtu the interface has the smallest MTU of all remotes.
func TestMany_mtu(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, _ := mesh(t, 2)
		hub.Run("ip", "route", "add", "192.0.2.12/32", "dev", "br0", "mtu", "1300")
		d := c.upAny(t, hub, 1)
		mtu := func(want int) func() bool { return func() bool { return d.Status().ActualMTU == want } }
		routeTo(hub, "10.11.0.0/16", 11)
		netlab.Eventually(t, "one of 1500", mtu(1480))
		routeTo(hub, "10.12.0.0/16", 12)
		netlab.Eventually(t, "and one of 1300", mtu(1280))
		hub.Run("ip", "route", "change", "192.0.2.12/32", "dev", "br0", "mtu", "1200")
		netlab.Eventually(t, "which becomes 1200", mtu(1180))
		hub.Run("ip", "route", "del", "10.12.0.0/16")
		hub.Run("ip", "route", "add", "10.14.0.0/16", "via", outerOf(14), "dev", "t0", "onlink")
		netlab.Eventually(t, "and goes", mtu(1480))
	})
}

// The reverse path is checked by the routes of the interface only. rp_filter refuses a source that is on another one.
func TestMany_rpFilter(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 1)
		hub.Run("sh", "-ec", "ip link add lan0 type bridge; ip address add 10.11.9.1/24 dev lan0; ip link set lan0 up")
		c.upAny(t, hub, 1)
		c.upAny(t, spoke[0], 11)
		routeTo(spoke[0], "10.10.0.0/16", 1)
		routeTo(hub, "10.11.0.0/16", 11)
		ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
		spoke[0].Run("ip", "address", "add", "10.11.9.9/32", "dev", "lo")
		inside := netlab.CaptureReceived(t, hub, "t0")
		send := func() { _, _ = spoke[0].Try("ping", "-c", "1", "-W", "1", "-I", "10.11.9.9", "10.10.0.1") }
		send()
		inside.Await(netlab.Source("10.11.9.9"))
		hub.Sysctl("net.ipv4.conf.t0.rp_filter", "1")
		netlab.Eventually(t, "rp_filter refuses it", func() bool {
			send()
			return !strings.Contains(hub.Run("nstat", "-asz", "TcpExtIPReversePathFilter"), " 0 ")
		})
		ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	})
}
