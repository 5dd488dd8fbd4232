package conformance

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"ipipd/test/netlab"
)

// shows waits until a command's output has the text.
func shows(t *testing.T, ns *netlab.NS, want string, command ...string) {
	t.Helper()
	netlab.Eventually(t, strings.Join(command, " ")+" shows "+want, func() bool {
		out, _ := ns.Try(command[0], command[1:]...)
		return strings.Contains(out, want)
	})
}

// The name that the interface was made with is a stranger's since.
func TestARenamedInterfaceIsFollowed(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a)
		c.upB(t, b)
		ping(t, a, innerB)
		a.Run("ip", "link", "set", "t0", "down")
		a.Run("ip", "link", "set", "t0", "name", "tunx")
		a.Run("ip", "link", "set", "tunx", "up")
		a.Run("ip", "tuntap", "add", "mode", "tun", "name", "t0")
		a.Run("ip", "link", "set", "t0", "mtu", "1450")
		a.Run("ip", "link", "set", "veth0", "mtu", "1400")
		shows(t, a, "mtu 1380", "ip", "link", "show", "tunx")
		shows(t, a, "mtu 1450", "ip", "link", "show", "t0")
		pingsAgain(t, a, "it was renamed")
		if c.fast {
			netlab.Eventually(t, "the fast path is on again", func() bool { return d.Status().FastPath == "active" })
		}
		for _, name := range []string{"t0", "tunx"} {
			out, err := d.Run("print", name)
			if err != nil || !strings.Contains(out, "name: tunx\n") || !strings.Contains(out, "renamed-from: t0\n") {
				t.Errorf("print %s: %v\n%s", name, err, out)
			}
		}
		d.LogsOnce(`msg="the interface was renamed" name=tunx was=t0`)
		if out, err := d.Run("down", "tunx"); err != nil {
			t.Errorf("down tunx: %v\n%s", err, out)
		}
		if out, err := a.Try("ip", "link", "show", "tunx"); err == nil {
			t.Errorf("it is still there: %s", out)
		}
		shows(t, a, "mtu 1450", "ip", "link", "show", "t0")
	})
}

func TestAMovedInterfaceIsFollowed(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		inside := netlab.New(t)
		d := c.upA(t, a, "--route", "10.9.0.0/16")
		c.upB(t, b)
		ping(t, a, innerB)
		a.Run("ip", "link", "set", "t0", "netns", inside.Path(), "name", "uplink")
		a.Run("ip", "tuntap", "add", "mode", "tun", "name", "uplink")
		inside.Run("ip", "address", "add", innerA+"/24", "dev", "uplink")
		inside.Run("ip", "link", "set", "uplink", "up")
		pingsAgain(t, inside, "it was moved")
		d.LogsOnce("the interface was moved to another network namespace: set its addresses, routes and MTU there")
		a.Run("ip", "link", "set", "veth0", "mtu", "1400")
		pingsAgain(t, inside, "its underlay has another MTU")
		for _, ns := range []*netlab.NS{inside, a} {
			if out := ns.Run("ip", "link", "show", "uplink"); strings.Contains(out, "mtu 1380") {
				t.Errorf("an MTU was set by name or in another namespace: %s", out)
			}
		}
		if out := inside.Run("ip", "route"); strings.Contains(out, "10.9.0.0/16") {
			t.Errorf("the route of the command line came along: %s", out)
		}
		if s := d.Status(); !s.Running || s.FastPath == "active" {
			t.Errorf("running %v, fast-path %s", s.Running, s.FastPath)
		}

		inside.Run("ip", "link", "set", "uplink", "netns", a.Path(), "name", "t0")
		a.Run("ip", "link", "set", "t0", "up")
		shows(t, a, "10.9.0.0/16 dev t0", "ip", "route")
		shows(t, a, "mtu 1380", "ip", "link", "show", "t0")
		pingsAgain(t, a, "it is back")
	})
}

func TestWhatTheInterfaceLosesIsPutBack(t *testing.T) {
	t.Parallel()
	const route = "198.51.100.0/24"
	setup := func(t *testing.T) (*netlab.NS, *netlab.Daemon) {
		a, _ := hosts(t)
		d := upA(t, a, "--route", route)
		a.Run("ip", "address", "add", "10.77.0.1/24", "dev", "t0") // the operator's
		return a, d
	}
	t.Run("down-up", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "link", "set", "t0", "down")
		a.Run("ip", "link", "set", "t0", "up")
		shows(t, a, route+" dev t0", "ip", "route")
		d.LogsOnce("what the interface had lost is put back")
	})
	t.Run("flushed", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "address", "flush", "dev", "t0")
		shows(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		shows(t, a, route+" dev t0", "ip", "route")
		if out := a.Run("ip", "address", "show", "dev", "t0"); strings.Contains(out, "10.77.0.1") {
			t.Errorf("what the operator had is not ours to put back: %s", out)
		}
		netlab.Eventually(t, "the log says so", func() bool { return strings.Contains(d.Log(), "put back") })
	})
	t.Run("leads-elsewhere", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "route", "replace", route, "dev", "veth0")
		a.Run("ip", "route", "delete", "10.255.0.0/24", "dev", "t0") // nobody asked for that one
		a.Run("ip", "address", "delete", innerA+"/24", "dev", "t0")
		shows(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		netlab.Eventually(t, "the log says so", func() bool { return strings.Contains(d.Log(), "addresses=[10.255.0.1/24] routes=[]") })
		if out := a.Run("ip", "route", "show", route); !strings.Contains(out, "dev veth0") || strings.Contains(out, "t0") {
			t.Errorf("the operator's route is now %s", out)
		}
	})
	t.Run("taken-away-again-and-again", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		netlab.Eventually(t, "it is left alone", func() bool {
			_, _ = a.Try("ip", "route", "delete", route, "dev", "t0")
			return strings.Contains(d.Log(), "left alone from now on")
		})
		d.LogsOnce("left alone from now on")
		_, _ = a.Try("ip", "route", "delete", route, "dev", "t0")
		a.Run("ip", "address", "delete", innerA+"/24", "dev", "t0") // the next look puts back this
		shows(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		if out := a.Run("ip", "route", "show", route); out != "" {
			t.Errorf("it is back: %s", out)
		}
	})
}

// awayA is where a's local address is until it comes: on another host.
func awayA(t *testing.T) (a, b *netlab.NS) {
	t.Helper()
	a, b = netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.11/24"}, netlab.End{Name: "veth0", Address: outerB + "/24"})
	mac := strings.Fields(a.Run("ip", "-o", "link", "show", "veth0"))
	// What is for that address passes a, as on the way to another host.
	b.Run("ip", "neigh", "replace", outerA, "lladdr", mac[slices.Index(mac, "link/ether")+1], "dev", "veth0", "nud", "permanent")
	return a, b
}

// A VRRP backup has its tunnel ready before the address comes.
func TestNothingIsSentFromAnAddressThatIsElsewhere(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"on the underlay", "on the loopback", "AnyIP"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := awayA(t)
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
				da.LogsOnce("local-address is not on this host: nothing is sent until it is")

				come := map[string][]string{
					"on the underlay": {"address", "add", outerA + "/24", "dev", "veth0"},
					"on the loopback": {"address", "add", outerA + "/32", "dev", "lo"},
					"AnyIP":           {"route", "add", "local", outerA + "/32", "dev", "lo"},
				}[where]
				a.Run("ip", come...)
				netlab.Eventually(t, "both run", func() bool {
					return da.Status().KeepaliveState == "up" && db.Status().KeepaliveState == "up" && !noCarrier(a)
				})
				pingsAgain(t, a, "the address came")
				da.LogsOnce("local-address is on this host: the tunnel is taken up")
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

func TestNoIKEFromAnAddressThatIsElsewhere(t *testing.T) {
	t.Parallel()
	a, b := awayA(t)
	wire, asked := outgoing(t, a, "veth0"), outgoing(t, b, "veth0")
	da := sealedUpA(t, a)
	db := sealedUpB(t, b)
	const udp, twice = 17, 2
	asked.AwaitN(twice, netlab.Protocol(udp), netlab.Destination(outerA))
	if got := wire.Matching(netlab.Source(outerA)); len(got) != 0 {
		t.Errorf("sent: %s", netlab.Describe(got[0].Packet))
	}
	if s := da.Status().IPsec; s != "not established: local-address 192.0.2.1, which is not on this host" {
		t.Errorf("ipsec: %s", s)
	}
	a.Run("ip", "address", "add", outerA+"/24", "dev", "veth0")
	running(t, da, db)
	ping(t, a, innerB)
	a.Run("ip", "address", "delete", outerA+"/24", "dev", "veth0")
	netlab.Eventually(t, "it is not running", func() bool { return !da.Status().Running })
	sent, before := len(wire.Matching(netlab.Source(outerA))), len(asked.Matching(netlab.Protocol(udp)))
	db.Stop(syscall.SIGKILL)
	db.Again()
	asked.AwaitN(before+twice, netlab.Protocol(udp))
	if now := len(wire.Matching(netlab.Source(outerA))); now != sent {
		t.Errorf("%d packets were sent since the address has gone", now-sent)
	}
}

// The name is the operator's, and the interface that had it is not used any more.
func TestTheUnderlayDeviceIsFollowedByItsName(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		d := c.upA(t, a, "--underlay-device", "veth0")
		c.upB(t, b)
		ping(t, a, innerB)
		wire := outgoing(t, a, "veth0")
		a.Run("ip", "link", "set", "veth0", "down")
		a.Run("ip", "link", "set", "veth0", "name", "veth9")
		a.Run("ip", "link", "set", "veth9", "up")
		d.LogsOnce("no way to the remote; it is looked for")
		into := inject(t, a, "t0", nil, "")
		netlab.Eventually(t, "packets are counted under no-path", func() bool {
			into.send(datagram(aToB(1), 100))
			return d.Drops("no-path") > 0
		})
		// Of another size, since some of the others left before the tunnel knew.
		const n, size = 20, 200
		before := d.Drops("no-path")
		for range n {
			into.send(datagram(aToB(1), size))
		}
		netlab.Eventually(t, "each of them is counted", func() bool { return d.Drops("no-path") >= before+n })
		if got := wire.Matching(netlab.Protocol(4), netlab.TotalLen(20+20+8+size)); len(got) != 0 {
			t.Errorf("packets leave by the interface that had the name: %s", netlab.Describe(got[0].Packet))
		}
		a.Run("ip", "link", "set", "veth9", "down")
		a.Run("ip", "link", "set", "veth9", "name", "veth0")
		a.Run("ip", "link", "set", "veth0", "up")
		pingsAgain(t, a, "the interface has its name again")
	})
}
