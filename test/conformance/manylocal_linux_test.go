package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// far adds to the hub of a mesh a second underlay network, 198.51.100.0/24, with a spoke 198.51.100.21, which
// has 10.21.0.0/16.
func far(t *testing.T, hub *netlab.NS) *netlab.NS {
	t.Helper()
	s := netlab.New(t)
	netlab.Veth(t, hub, s, netlab.End{Name: "veth1", Address: "198.51.100.1/24"}, netlab.End{Name: "veth0", Address: "198.51.100.21/24"})
	s.Run("ip", "address", "add", "10.21.0.1/16", "dev", "lo")
	return s
}

// Without a local address the outer source is the one that the route to each remote prefers, as it changes, and
// packets to any address of this host are received. The spokes take packets of one source only.
func TestManyLocal_routes(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 2)
		other := far(t, hub)
		hub.Run("ip", "address", "add", "192.0.2.2/24", "dev", "br0")
		d := c.up(t, hub, "--remote-address", "any", "--address", "10.255.0.1/32")
		if s := d.Status(); s.CurrentLocalAddress != "" || !s.Running {
			t.Errorf("current-local-address %q, running %v", s.CurrentLocalAddress, s.Running)
		}
		routeTo(hub, "10.11.0.0/16", 11)
		routeTo(hub, "10.12.0.0/16", 12)
		hub.Run("ip", "route", "add", "10.21.0.0/16", "via", "198.51.100.21", "dev", "t0", "onlink")
		end := func(ns *netlab.NS, local, remote string, more ...string) *netlab.Daemon {
			return c.up(t, ns, append([]string{"--local-address", local, "--remote-address", remote, "--route", "10.10.0.0/16"}, more...)...)
		}
		end(spoke[0], outerOf(11), outerOf(1))
		end(other, "198.51.100.21", "198.51.100.1")
		for ns, n := range map[*netlab.NS]int{spoke[0]: 11, other: 21} {
			at := fmt.Sprintf("10.%d.0.1", n)
			ping(t, hub, "-I", "10.10.0.1", at)
			ping(t, ns, "-I", at, "10.10.0.1")
			ping(t, hub, "-I", "10.10.0.1", "-s", "4000", at)
			ping(t, hub, "-I", "10.10.0.1", "-s", "1470", "-M", "dont", at) // too long for the path by the outer header
		}

		// The second address of the hub: probes are answered from there, though nothing else leaves from it.
		second := end(spoke[1], outerOf(12), outerOf(2), "--keepalive", "1s,3")
		netlab.Eventually(t, "a probe is answered from the address that it came to", func() bool { return second.Status().KeepaliveState == "up" })
		before := d.Status().RxPacket
		netlab.Eventually(t, "data to it comes in", func() bool {
			_, _ = spoke[1].Try("ping", "-c", "1", "-W", "1", "-I", "10.12.0.1", "10.10.0.1")
			return d.Status().RxPacket > before
		})
		hub.Run("ip", "route", "add", outerOf(12)+"/32", "dev", "br0", "src", outerOf(2))
		netlab.Eventually(t, "the route prefers that address now", func() bool { return answeredFrom(hub, "10.10.0.1", "10.12.0.1") })
		hub.Run("ip", "route", "del", outerOf(12)+"/32", "dev", "br0")
		hub.Run("ip", "address", "del", outerOf(2)+"/24", "dev", "br0")
		netlab.Eventually(t, "an address that the hub has not any more is not received", func() bool { return !answeredFrom(spoke[1], "10.12.0.1", "10.10.0.1") })
		ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	})
}

// The inner sender gets ICMP errors about a remote, and a route to a remote that leads into the interface is a loop.
func TestManyLocal_errors(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, _ := mesh(t, 1)
		d := c.up(t, hub, "--remote-address", "any", "--address", "10.255.0.1/32", "--dont-fragment", "inherit")
		routeTo(hub, "10.13.0.0/16", 13)
		hub.Run("ip", "route", "add", "10.2.0.0/16", "dev", "t0")
		hub.Run("ip", "route", "add", "10.3.0.0/16", "via", "10.2.0.7", "dev", "t0", "onlink")
		netlab.Eventually(t, "the sender is told of an unreachable remote", func() bool {
			out, _ := hub.Try("ping", "-c", "2", "-W", "1", "-I", "10.10.0.1", "10.13.0.1")
			return strings.Contains(out, "nreachable")
		})
		for _, to := range []string{"10.2.0.1", "10.3.0.1"} {
			before := d.Drops("loop")
			netlab.Eventually(t, "a loop is counted: "+to, func() bool {
				_, _ = hub.Try("ping", "-c", "1", "-W", "1", to)
				return d.Drops("loop") > before
			})
		}
	})
}

// The more specific tunnel gets the packets: one with this remote before one with this local address only. A second
// tunnel without a local address is refused.
func TestManyLocal_beside(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 3)
		other := far(t, hub)
		hub.Run("ip", "address", "add", "192.0.2.2/24", "dev", "br0")
		file := filepath.Join(t.TempDir(), "ipipd.yaml")
		threads, fast := "1", "no"
		if c.fast {
			fast = "yes"
		} else if c.name == "two-threads" {
			threads = "2"
		}
		text := fmt.Sprintf(`threads: %s
defaults: {allow-fast-path: %s, keepalive: off}
tunnels:
- {name: t0, remote-address: any, address: 10.255.0.1/32, peers: {10.11.0.0/16: 192.0.2.11, 10.21.0.0/16: 198.51.100.21}}
- {name: t1, local-address: 192.0.2.2, remote-address: any, address: 10.255.0.2/32, peers: {10.12.0.0/16: 192.0.2.12}}
- {name: t2, local-address: 192.0.2.1, remote-address: 192.0.2.13, address: 10.255.0.3/32, route: 10.13.0.0/16}
`, threads, fast)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		d := netlab.UpConfig(t, hub, "t0", file)
		hub.Sysctl("net.ipv4.conf.all.rp_filter", "0")
		for i, ns := range append(spoke, other) {
			n, local, remote := 11+i, outerOf(11+i), outerOf([]int{1, 2, 1, 1}[i])
			if ns == other {
				n, local, remote = 21, "198.51.100.21", "198.51.100.1"
			}
			c.up(t, ns, "--local-address", local, "--remote-address", remote, "--route", "10.10.0.0/16")
			ping(t, hub, "-c", "3", "-i", "0.2", "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", n))
		}
		for name, least := range map[string]uint64{"t0": 6, "t1": 3, "t2": 3} {
			out, err := d.Run("print", "--json", name)
			if err != nil {
				t.Fatal(out)
			}
			var s []netlab.Status
			if err := json.Unmarshal([]byte(out), &s); err != nil || len(s) != 1 || s[0].RxPacket < least {
				t.Errorf("%s: %v, want at least %d packets received: %s", name, err, least, out)
			}
		}
		twice := text + "- {name: t3, remote-address: any, address: 10.255.0.4/32}\n"
		if err := os.WriteFile(file, []byte(twice), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := d.Run("reload"); err == nil || !strings.Contains(out, "each pair of outer addresses once") {
			t.Errorf("reload: %v, %s", err, out)
		}
		ping(t, hub, "-I", "10.10.0.1", "10.21.0.1")
	})
}

// Packets without a gateway go to the inner destination, from the source that the kernel prefers, in fragments, too.
func TestManyLocal_noGateway(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, spoke := mesh(t, 1)
		hub.Run("ip", "route", "add", "203.0.113.0/24", "dev", "br0", "metric", "100")
		spoke[0].Run("ip", "address", "add", "203.0.113.11/32", "dev", "lo")
		d := c.up(t, hub, "--remote-address", "any", "--address", "10.255.0.1/32", "--underlay-device", "br0")
		c.up(t, spoke[0], "--local-address", "203.0.113.11", "--remote-address", outerOf(1), "--route", "10.10.0.0/16")
		hub.Run("ip", "route", "add", "203.0.113.0/24", "dev", "t0")
		ping(t, hub, "-I", "10.10.0.1", "203.0.113.11")
		ping(t, hub, "-I", "10.10.0.1", "-s", "4000", "203.0.113.11")
		ping(t, hub, "-I", "10.10.0.1", "-s", "1470", "-M", "dont", "203.0.113.11")
		if s := d.Status(); s.TxPacket < 3 || s.RxPacket < 3 {
			t.Errorf("they went another way: %d sent, %d received", s.TxPacket, s.RxPacket)
		}
	})
}

// A loop by way of another tunnel is found by the outer source, whichever remote it belongs to.
func TestManyLocal_nestedLoop(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		hub, _ := mesh(t, 1)
		c.upAs(t, hub, "t1", "--local-address", outerOf(1), "--remote-address", outerOf(11), "--address", "10.254.0.1/32", "--route", "203.0.113.0/24")
		d := c.up(t, hub, "--remote-address", "any", "--address", "10.255.0.1/32")
		routeTo(hub, outerOf(11)+"/32", 12)
		hub.Run("ip", "route", "add", "10.1.0.0/16", "via", "203.0.113.7", "dev", "t0", "onlink")
		netlab.Eventually(t, "a loop is counted", func() bool {
			_, _ = hub.Try("ping", "-c", "1", "-W", "1", "10.1.0.1")
			return d.Drops("loop") > 0
		})
		before := d.Status().TxPacket
		_, _ = hub.Try("ping", "-c", "1", "-W", "1", "10.1.0.1")
		if now := d.Status().TxPacket; now > before+3 {
			t.Errorf("it goes on: %d packets, then %d", before, now)
		}
	})
}
