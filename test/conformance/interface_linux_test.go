package conformance

import (
	"maps"
	"strings"
	"testing"

	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// awaitOutput waits until a command's output has the text.
func awaitOutput(t *testing.T, ns *netlab.NS, want string, command ...string) {
	t.Helper()
	netlab.Eventually(t, strings.Join(command, " ")+" shows "+want, func() bool {
		out, _ := ns.Try(command[0], command[1:]...)
		return strings.Contains(out, want)
	})
}

// A renamed interface is followed, also when another interface takes the old name.
func TestInterface_renamed(t *testing.T) {
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
		awaitOutput(t, a, "mtu 1380", "ip", "link", "show", "tunx")
		awaitOutput(t, a, "mtu 1450", "ip", "link", "show", "t0")
		awaitPing(t, a, "it was renamed")
		if c.fast {
			netlab.Eventually(t, "the fast path is on again", func() bool { return d.Status().FastPath == "active" })
		}
		for _, name := range []string{"t0", "tunx"} {
			out, err := d.Run("print", name)
			if err != nil || !strings.Contains(out, "name: tunx\n") || !strings.Contains(out, "renamed-from: t0\n") {
				t.Errorf("print %s: %v\n%s", name, err, out)
			}
		}
		if out, err := d.Run("down", "tunx"); err != nil {
			t.Errorf("down tunx: %v\n%s", err, out)
		}
		if out, err := a.Try("ip", "link", "show", "tunx"); err == nil {
			t.Errorf("it is still there: %s", out)
		}
		awaitOutput(t, a, "mtu 1450", "ip", "link", "show", "t0")
	})
}

// An interface that was moved to another network namespace is left to its operator there.
func TestInterface_moved(t *testing.T) {
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
		awaitPing(t, inside, "it was moved")
		d.AwaitWarning(warning.InterfaceMoved)
		a.Run("ip", "link", "set", "veth0", "mtu", "1400")
		awaitPing(t, inside, "its underlay has another MTU")
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
		awaitOutput(t, a, "10.9.0.0/16 dev t0", "ip", "route")
		awaitOutput(t, a, "mtu 1380", "ip", "link", "show", "t0")
		awaitPing(t, a, "it is back")
		d.AwaitNoWarning(warning.InterfaceMoved)
	})
}

// As on the kernel's ipip, the interface has no IPv6 link-local address.
func TestInterface_noLinkLocal(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	for _, which := range []string{"all", "default"} {
		a.Sysctl("net.ipv6.conf."+which+".disable_ipv6", "0")
	}
	variants[0].upB(t, b)
	variants[0].upA(t, a)
	awaitPing(t, a, "both ends are up")
	if out := a.Run("ip", "-6", "address", "show", "dev", "t0"); out != "" {
		t.Error(out)
	}
}

// Addresses and routes that the interface loses are restored, up to a limit.
func TestInterface_restored(t *testing.T) {
	t.Parallel()
	const route = "198.51.100.0/24"
	setup := func(t *testing.T) (*netlab.NS, *netlab.Daemon) {
		a, _ := hosts(t)
		d := upA(t, a, "--route", route)
		a.Run("ip", "address", "add", "10.77.0.1/24", "dev", "t0") // added by the operator
		return a, d
	}
	t.Run("down-up", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "link", "set", "t0", "down")
		a.Run("ip", "link", "set", "t0", "up")
		awaitOutput(t, a, route+" dev t0", "ip", "route")
		netlab.Eventually(t, "it is counted", func() bool { return maps.Equal(d.Status().Restored, map[string]uint64{"route": 1}) })
	})
	t.Run("flushed", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "address", "flush", "dev", "t0")
		awaitOutput(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		awaitOutput(t, a, route+" dev t0", "ip", "route")
		if out := a.Run("ip", "address", "show", "dev", "t0"); strings.Contains(out, "10.77.0.1") {
			t.Errorf("what the operator had is not ours to put back: %s", out)
		}
		netlab.Eventually(t, "both are counted", func() bool { r := d.Status().Restored; return r["address"] > 0 && r["route"] > 0 })
	})
	t.Run("leads-elsewhere", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		a.Run("ip", "route", "replace", route, "dev", "veth0")
		a.Run("ip", "route", "delete", "10.255.0.0/24", "dev", "t0") // the connected route, not one of --route
		a.Run("ip", "address", "delete", innerA+"/24", "dev", "t0")
		awaitOutput(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		netlab.Eventually(t, "it is counted", func() bool { return maps.Equal(d.Status().Restored, map[string]uint64{"address": 1}) })
		if out := a.Run("ip", "route", "show", route); !strings.Contains(out, "dev veth0") || strings.Contains(out, "t0") {
			t.Errorf("the operator's route is now %s", out)
		}
	})
	t.Run("taken-away-again-and-again", func(t *testing.T) {
		t.Parallel()
		a, d := setup(t)
		netlab.Eventually(t, "it is left alone", func() bool {
			_, _ = a.Try("ip", "route", "delete", route, "dev", "t0")
			s := d.Status()
			return s.Warning(warning.LeftAlone).Detail == route
		})
		_, _ = a.Try("ip", "route", "delete", route, "dev", "t0")
		a.Run("ip", "address", "delete", innerA+"/24", "dev", "t0") // the next check restores this
		awaitOutput(t, a, innerA+"/24", "ip", "address", "show", "dev", "t0")
		if out := a.Run("ip", "route", "show", route); out != "" {
			t.Errorf("it is back: %s", out)
		}
	})
}
