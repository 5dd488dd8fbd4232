package conformance

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// Without --local-address the route's source address is used, for both directions, and
// followed when it changes.
func TestLocalAddress_fromRoute(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		sinkIPIP(t, b)
		wire := outgoing(t, a, "veth0")
		d := c.up(t, a, "--remote-address", outerB, "--address", innerA+"/24")
		inside := netlab.CaptureReceived(t, a, "t0")
		into, from := newInjector(t, a, "t0", nil, ""), newInjector(t, b, "veth0", a, "veth0")
		check := func(local string, id uint16) {
			t.Helper()
			netlab.Eventually(t, "print shows "+local, func() bool { return d.Status().CurrentLocalAddress == local })
			into.send(datagram(aToB(id), 100))
			wire.Await(carries(id), netlab.Source(local))
			h := ipv4.Header{ID: 5, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr(local)}
			from.send(build(h, datagram(bToA(id), 100)))
			inside.Await(netlab.ID(id))
		}
		check(outerA, 1)
		a.Run("ip", "address", "add", "192.0.2.101/24", "dev", "veth0")
		a.Run("ip", "route", "add", outerB+"/32", "dev", "veth0", "src", "192.0.2.101")
		check("192.0.2.101", 2)
		a.Run("ip", "address", "delete", "192.0.2.101/24", "dev", "veth0") // and the route with it
		check(outerA, 3)

		h := ipv4.Header{ID: 6, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr("192.0.2.101")}
		a.Run("ip", "address", "add", "192.0.2.101/24", "dev", "veth0")
		from.send(build(h, datagram(bToA(4), 100)))
		netlab.Eventually(t, "packets to the old address have no socket", func() bool { return inUnknownProtos(a) == 1 })
	})
}

// hostsWithoutLocalAddress returns hosts where a lacks its local address, as a VRRP backup.
func hostsWithoutLocalAddress(t *testing.T) (a, b *netlab.NS) {
	t.Helper()
	a, b = netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.11/24"}, netlab.End{Name: "veth0", Address: outerB + "/24"})
	mac := strings.Fields(a.Run("ip", "-o", "link", "show", "veth0"))
	// Packets to that address arrive at a.
	b.Run("ip", "neigh", "replace", outerA, "lladdr", mac[slices.Index(mac, "link/ether")+1], "dev", "veth0", "nud", "permanent")
	return a, b
}

// Nothing is sent until the local address is on this host, so that a VRRP backup can have its
// tunnel ready.
func TestLocalAddress_absent(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"on the underlay", "on the loopback", "AnyIP"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hostsWithoutLocalAddress(t)
				wire := outgoing(t, a, "veth0")
				da := c.upA(t, a, "--keepalive", "1s,2")
				db := c.upB(t, b, "--keepalive", "1s,2")
				netlab.Eventually(t, "the peer has waited long enough", func() bool { return db.Status().KeepaliveState == "never-heard" })
				if got := wire.Matching(netlab.Source(outerA)); len(got) != 0 {
					t.Errorf("sent: %s", netlab.Describe(got[0].Packet))
				}
				if out, err := da.Run("print", "t0"); err != nil || !strings.Contains(out, "running: no\n") ||
					!strings.Contains(out, "waiting-for: local-address 192.0.2.1, which is not on this host\n") {
					t.Errorf("print: %v\n%s", err, out)
				}
				if !noCarrier(a) {
					t.Error("the interface has a carrier")
				}
				if w := da.AwaitWarning(warning.NoLocalAddress); w.Detail != outerA {
					t.Errorf("%+v", w)
				}

				come := map[string][]string{
					"on the underlay": {"address", "add", outerA + "/24", "dev", "veth0"},
					"on the loopback": {"address", "add", outerA + "/32", "dev", "lo"},
					"AnyIP":           {"route", "add", "local", outerA + "/32", "dev", "lo"},
				}[where]
				a.Run("ip", come...)
				netlab.Eventually(t, "both run", func() bool {
					return da.Status().KeepaliveState == "up" && db.Status().KeepaliveState == "up" && !noCarrier(a)
				})
				awaitPing(t, a, "the address came")
				da.AwaitNoWarning(warning.NoLocalAddress)
				if c.fast {
					netlab.Eventually(t, "the fast path is taken", func() bool { return da.Status().FastPath == "active" })
				}

				come[1] = "delete"
				a.Run("ip", come...)
				netlab.Eventually(t, "the peer does not hear it any more", func() bool { return db.Status().KeepaliveState == "lost" })
				netlab.Eventually(t, "there is no carrier", func() bool { return noCarrier(a) })
				if s := da.Status(); s.Running || s.FastPath == "active" {
					t.Errorf("running %v, fast-path %s", s.Running, s.FastPath)
				}
			})
		})
	}
}

// No IKE message is sent until the local address is on this host.
func TestLocalAddress_absentIKE(t *testing.T) {
	t.Parallel()
	a, b := hostsWithoutLocalAddress(t)
	wire, asked := outgoing(t, a, "veth0"), outgoing(t, b, "veth0")
	da := encryptedUpA(t, a)
	db := encryptedUpB(t, b)
	const udp, twice = 17, 2
	asked.AwaitN(twice, netlab.Protocol(udp), netlab.Destination(outerA))
	if got := wire.Matching(netlab.Source(outerA)); len(got) != 0 {
		t.Errorf("sent: %s", netlab.Describe(got[0].Packet))
	}
	if s := da.Status().IPsec; s != "not established: local-address 192.0.2.1, which is not on this host" {
		t.Errorf("ipsec: %s", s)
	}
	a.Run("ip", "address", "add", outerA+"/24", "dev", "veth0")
	awaitRunning(t, da, db)
	ping(t, a, innerB)
	a.Run("ip", "address", "delete", outerA+"/24", "dev", "veth0")
	netlab.Eventually(t, "it is not running", func() bool { return !da.Status().Running })
	sent, before := len(wire.Matching(netlab.Source(outerA))), len(asked.Matching(netlab.Protocol(udp)))
	db.Stop(syscall.SIGKILL)
	db.Restart()
	asked.AwaitN(before+twice, netlab.Protocol(udp))
	if now := len(wire.Matching(netlab.Source(outerA))); now != sent {
		t.Errorf("%d packets were sent since the address has gone", now-sent)
	}
}
