package conformance

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// awaitLinkLayer waits until the last state in the log of d is that packets are received from
// the link layer, or are not.
func awaitLinkLayer(t *testing.T, d *netlab.Daemon, link bool) {
	t.Helper()
	netlab.Eventually(t, fmt.Sprintf("the link layer receives: %v", link), func() bool {
		log := d.Log()
		last := strings.LastIndex(log, "where packets are received")
		return last >= 0 && strings.HasPrefix(log[last:], fmt.Sprintf(`where packets are received" link-layer=%v`, link))
	})
}

func TestReceive(t *testing.T) {
	t.Parallel()
	threads := []string{"--threads", "2", "--allow-fast-path", "no", "--keepalive", "off", "--log-level", "debug"}

	// Packets that arrive by another interface than the route's are subject to rp_filter.
	for _, filter := range []string{"0", "1"} {
		t.Run("another-interface/rp_filter="+filter, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			netlab.Veth(t, a, b, netlab.End{Name: "veth1", Address: "198.51.100.1/24"}, netlab.End{Name: "veth1", Address: "198.51.100.2/24"})
			a.Sysctl("net.ipv4.conf.all.rp_filter", filter)
			a.Sysctl("net.ipv4.conf.veth1.rp_filter", filter)
			sinkIPIP(t, b)
			d := upA(t, a, threads...)
			awaitLinkLayer(t, d, true)
			r := &receiver{a: a, b: b, d: d, from: newInjector(t, b, "veth0", a, "veth0"), marks: 0xf000}
			r.inside = netlab.Capture(t, a, "t0", func(f netlab.Frame) bool { return !f.Outgoing })
			around := newInjector(t, b, "veth1", a, "veth1")
			for id := range uint16(5) {
				h := bToA(id + 1)
				h.Protocol = experimental // GRO does not merge these
				around.send(outerBToA(build(h, pattern(100))))
			}
			if filter == "0" {
				for id := range uint16(5) {
					r.inside.Await(netlab.ID(id + 1))
				}
			}
			r.settle()
			want := map[string]int{"0": 5, "1": 0}[filter]
			if got := r.got(); len(got) != want {
				t.Errorf("%d packets came in, want %d", len(got), want)
			}
		})
	}

	// A netfilter rule applies also while there is no route to the peer, when the tunnel has
	// no path whose rules it checks.
	t.Run("rule-without-a-route", func(t *testing.T) {
		t.Parallel()
		if _, err := exec.LookPath("nft"); err != nil {
			t.Skip("needs nft (package nftables)")
		}
		a, b := hosts(t)
		sinkIPIP(t, b)
		d := upA(t, a, threads...)
		awaitLinkLayer(t, d, true)
		from, inside := newInjector(t, b, "veth0", a, "veth0"), netlab.Capture(t, a, "t0", func(f netlab.Frame) bool { return !f.Outgoing })
		a.Run("ip", "route", "add", "blackhole", outerB)
		if out, err := a.Try("nft", "add table ip test; add chain ip test stop { type filter hook input priority 0 ; } ; add rule ip test stop ip protocol 4 counter drop"); err != nil {
			t.Skipf("needs a kernel with nftables: %s", out)
		}
		awaitLinkLayer(t, d, false)
		for id := range uint16(5) {
			from.send(outerBToA(datagram(bToA(id+1), 100)))
		}
		netlab.Eventually(t, "the rule has dropped all", func() bool { return strings.Contains(a.Run("nft", "list", "ruleset"), "packets 5 ") })
		a.Run("nft", "delete", "table", "ip", "test")
		a.Run("ip", "route", "del", "blackhole", outerB)
		awaitLinkLayer(t, d, true)
		from.send(outerBToA(datagram(bToA(9), 100)))
		inside.Await(netlab.ID(9))
		if got := inside.Matching(netlab.Protocol(ipv4.ProtocolUDP)); len(got) != 1 {
			t.Errorf("%d packets came in, want the last only", len(got))
		}
	})

	// With the fast path no packet socket is open: it would be given each packet of this host.
	t.Run("fast-path-without-packet-sockets", func(t *testing.T) {
		t.Parallel()
		a, _ := hosts(t)
		d := upA(t, a, "--threads", "2", "--keepalive", "off")
		if s := d.Status(); s.FastPath != "active" {
			t.Skipf("the fast path is not active: %s", s.FastPath)
		}
		if n := strings.Count(a.Run("cat", "/proc/thread-self/net/packet"), " 0800 "); n != 0 {
			t.Errorf("%d packet sockets are open", n)
		}
	})

	// Of two processes with one tunnel each, neither receives the other's packets.
	t.Run("two-processes", func(t *testing.T) {
		t.Parallel()
		eachVariant(t, func(t *testing.T, c variant) {
			const outerC = "192.0.2.3"
			a, b := hosts(t)
			b.Run("ip", "address", "add", outerC+"/24", "dev", "veth0")
			sinkIPIP(t, b)
			from := newInjector(t, b, "veth0", a, "veth0")
			daemons := map[string]*netlab.Daemon{}
			for name, remote := range map[string]string{"t0": outerB, "t1": outerC} {
				daemons[name] = c.upAs(t, a, name, "--local-address", outerA, "--remote-address", remote, "--address", "10.255."+name[1:]+".1/24")
			}
			const n = 100
			for range n {
				for _, remote := range []string{outerB, outerC} {
					h := ipv4.Header{ID: 9, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr(remote), Destination: addr(outerA)}
					from.send(build(h, datagram(bToA(1), 100)))
				}
			}
			for name, d := range daemons {
				netlab.Eventually(t, name+" has what is for it", func() bool { return d.Status().RxPacket >= n })
				if s := d.Status(); s.RxPacket != n || s.ProcessDrops["unknown-peer"] != 0 {
					t.Errorf("%s received %d packets, dropped %v", name, s.RxPacket, s.AllDrops())
				}
			}
		})
	})
}
