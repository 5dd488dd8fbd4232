package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// The fast path of tunnels with many remotes and without a local address.

// Packets to each remote have the source that its route prefers, and packets to any address of this host are received,
// as addresses come and go.
func TestManyFastLocal_routes(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 2)
	other := far(t, hub)
	d := fast.up(t, hub, "--remote-address", "any", "--address", "10.255.0.1/32")
	routeTo(hub, "10.11.0.0/16", 11)
	hub.Run("ip", "route", "add", "10.21.0.0/16", "via", "198.51.100.21", "dev", "t0", "onlink")
	for ns, ends := range map[*netlab.NS][2]string{spoke[0]: {outerOf(11), outerOf(1)}, spoke[1]: {outerOf(12), outerOf(2)}, other: {"198.51.100.21", "198.51.100.1"}} {
		requireFastPath(t, fast.up(t, ns, "--local-address", ends[0], "--remote-address", ends[1], "--route", "10.10.0.0/16"))
	}
	for _, to := range []string{"10.11.0.1", "10.21.0.1"} {
		awaitBypassed(t, hub, true, to)
	}

	hub.Run("ip", "address", "add", outerOf(2)+"/24", "dev", "br0")
	hub.Run("ip", "route", "add", outerOf(12)+"/32", "dev", "br0", "src", outerOf(2))
	routeTo(hub, "10.12.0.0/16", 12)
	awaitBypassed(t, hub, true, "10.12.0.1")
	if s := d.Status().FastPath; s != "active" {
		t.Errorf("fast-path: %s", s)
	}

	hub.Run("ip", "route", "del", outerOf(12)+"/32", "dev", "br0")
	hub.Run("ip", "address", "del", outerOf(2)+"/24", "dev", "br0")
	netlab.Eventually(t, "what comes to an address that is gone is not received", func() bool {
		before := d.Status().RxPacket
		return !answeredFrom(spoke[1], "10.12.0.1", "10.10.0.1") && d.Status().RxPacket == before
	})
	for _, to := range []string{"10.11.0.1", "10.21.0.1"} {
		awaitBypassed(t, hub, true, to)
	}
}

// A real server takes packets of its balancers to any of its addresses, and refuses all others, without userspace.
func TestManyFastLocal_realServer(t *testing.T) {
	t.Parallel()
	server, spoke := mesh(t, 1)
	other := far(t, server)
	server.Run("sh", "-ec", "ip address add 203.0.113.5/32 dev lo; ip address add 203.0.113.6/32 dev lo; ip route add default via 192.0.2.11")
	for _, of := range []string{"all", "br0", "veth1"} {
		server.Sysctl("net.ipv4.conf."+of+".rp_filter", "0")
	}
	d := fast.up(t, server, "--remote-address", "any", "--accept-from", "172.16.0.0/12,192.0.2.11,198.51.100.21", "--accept-to", "203.0.113.5/32")
	for _, ns := range []*netlab.NS{spoke[0], other} { // neighbours are to be resolved
		server.Run("ping", "-c", "1", "-w", "5", map[*netlab.NS]string{spoke[0]: outerOf(11), other: "198.51.100.21"}[ns])
	}
	requireFastPath(t, fast.up(t, other, "--local-address", "198.51.100.21", "--remote-address", "198.51.100.1"))
	netlab.Eventually(t, "the fast path is active", func() bool { return d.Status().FastPath == "active" })
	near, farther := newInjector(t, spoke[0], "veth0", server, "br0"), newInjector(t, other, "veth0", server, "veth1")
	const n = 5
	send := func(by *injector, source, to, inner string) {
		in := datagram(ipv4.Header{Source: addr("8.8.8.8"), Destination: addr(inner)}, 18)
		for range n {
			by.send(build(ipv4.Header{Protocol: ipv4.ProtocolIPIP, Source: addr(source), Destination: addr(to)}, in))
		}
	}
	carried := func(by *injector, source, to string) {
		t.Helper()
		netlab.Eventually(t, fmt.Sprintf("what comes from %s to %s is carried past userspace", source, to), func() bool {
			before, received := inUserspace(t, server), d.Status().RxPacket
			send(by, source, to, "203.0.113.5")
			return netlab.WaitFor(func() bool { return d.Status().RxPacket == received+n }) && inUserspace(t, server) == before
		})
	}
	carried(near, "172.16.9.9", outerOf(1))
	carried(near, "192.0.2.11", outerOf(1))
	carried(farther, "198.51.100.21", "198.51.100.1")
	carried(farther, "198.51.100.21", outerOf(1)) // whichever link it is on
	for reason, refused := range map[string][2]string{"not-in-accept-from": {"203.0.113.77", "203.0.113.5"}, "not-in-accept-to": {"172.16.9.9", "203.0.113.6"}} {
		dropped, received := d.Drops(reason), d.Status().RxPacket
		send(near, refused[0], outerOf(1), refused[1])
		netlab.Eventually(t, reason+" is counted", func() bool { return d.Drops(reason) == dropped+n })
		if now := d.Status().RxPacket; now != received {
			t.Errorf("%s: %d packets are received", reason, now-received)
		}
	}

	// A prefix of accept-from is received on the device of its route; packets on another one pass the IP stack.
	before := inUserspace(t, server)
	received := d.Status().RxPacket
	send(farther, "172.16.9.9", "198.51.100.1", "203.0.113.5")
	netlab.Eventually(t, "what comes another way goes through userspace", func() bool { return d.Status().RxPacket == received+n })
	if now := inUserspace(t, server); now != before+n {
		t.Errorf("%d packets by another device went through userspace", now-before)
	}

	server.Run("ip", "address", "add", outerOf(2)+"/32", "dev", "lo")
	carried(near, "172.16.9.9", outerOf(2))
	server.Run("ip", "address", "del", outerOf(2)+"/32", "dev", "lo")
	netlab.Eventually(t, "what comes to an address that is gone is not received", func() bool {
		before := d.Status()
		send(near, "172.16.9.9", outerOf(2), "203.0.113.5")
		send(near, "172.16.9.9", outerOf(1), "203.0.113.5")
		return netlab.WaitFor(func() bool { return d.Status().RxPacket >= before.RxPacket+n }) && d.Status().RxPacket == before.RxPacket+n
	})
	// Everybody may send, on the device of the default route.
	if out, err := d.Run("set", "t0", "accept-from=0.0.0.0/0"); err != nil {
		t.Fatal(err, out)
	}
	carried(near, "203.0.113.77", outerOf(1))
	if s := d.Status(); s.TxPacket != 0 {
		t.Errorf("%d packets are sent", s.TxPacket)
	}
}

// Other tunnels, with a local address or with one remote, keep their packets, though they are carried in userspace.
func TestManyFastLocal_beside(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 3)
	hub.Run("ip", "address", "add", outerOf(2)+"/24", "dev", "br0")
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	text := `defaults: {keepalive: off}
tunnels:
- {name: t0, remote-address: any, address: 10.255.0.1/32, peers: {10.11.0.0/16: 192.0.2.11}}
- {name: t1, local-address: 192.0.2.2, remote-address: any, address: 10.255.0.2/32, peers: {10.12.0.0/16: 192.0.2.12}, allow-fast-path: no}
- {name: t2, local-address: 192.0.2.1, remote-address: 192.0.2.13, address: 10.255.0.3/32, route: 10.13.0.0/16, allow-fast-path: no}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	netlab.UpConfig(t, hub, "t0", file)
	for i, ns := range spoke {
		requireFastPath(t, fast.up(t, ns, "--local-address", outerOf(11+i), "--remote-address", outerOf([]int{1, 2, 1}[i]), "--route", "10.10.0.0/16"))
	}
	awaitBypassed(t, hub, true, "10.11.0.1")
	for i, name := range []string{"t1", "t2"} {
		before := received(t, hub, name)
		ping(t, hub, "-c", "3", "-i", "0.2", "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", 12+i))
		if got := received(t, hub, name) - before; got != 3 {
			t.Errorf("%s has received %d packets", name, got)
		}
	}
}

// If accept-from is too long for the fast path, print says so.
func TestManyFastLocal_acceptFrom(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 1)
	requireFastPath(t, fast.up(t, spoke[0], "--local-address", outerOf(11), "--remote-address", outerOf(1)))
	list := make([]string, 257)
	for i := range list {
		list[i] = fmt.Sprintf("192.0.%d.%d", 2+i>>8, i&0xff)
	}
	d := fast.up(t, hub, "--remote-address", "any", "--accept-from", strings.Join(list, ","), "--accept-to", "10.10.0.0/16")
	netlab.Eventually(t, "print says why it is carried in userspace", func() bool {
		return d.Status().FastPath == "accept-from has 257 prefixes, more than the 256 that the fast path takes"
	})
	if out, err := d.Run("set", "t0", "accept-from="+strings.Join(list[:256], ",")); err != nil {
		t.Fatal(out)
	}
	netlab.Eventually(t, "256 are few enough", func() bool { return d.Status().FastPath == "active" })
}
