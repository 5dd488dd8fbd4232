package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// peerRoutes returns the routes of `ip route show proto 94`.
func peerRoutes(ns *netlab.NS) string {
	return strings.Join(strings.Split(strings.ReplaceAll(strings.TrimSpace(ns.Run("ip", "route", "show", "proto", "94")), " dev t0 onlink", ""), " \n"), "\n")
}

// The peers of a file are routes with a protocol of their own. A reload changes those that differ, loses no
// packet of the others, and leaves the routes of other protocols alone.
func TestPeers_reload(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 2)
	for i, s := range spoke {
		netlab.Up(t, s, "t0", "--local-address", outerOf(11+i), "--remote-address", outerOf(1), "--address", fmt.Sprintf("10.255.0.%d/32", 11+i), "--keepalive", "off", "--route", "10.10.0.0/16", "--route", "10.255.0.1/32")
	}
	spoke[1].Run("ip", "address", "add", "10.11.7.1/32", "dev", "lo")
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	write := func(peers string) {
		t.Helper()
		text := "tunnels:\n- {name: t0, local-address: 192.0.2.1, remote-address: any, address: [10.255.0.1/32], peers: {" + peers + "}}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("10.11.0.0/16: 192.0.2.11, 10.12.0.0/16: 192.0.2.12, 10.13.0.0/16: 192.0.2.13")
	d := netlab.UpConfig(t, hub, "t0", file)
	want := func(routes string) {
		t.Helper()
		netlab.Eventually(t, "the routes are "+routes, func() bool { return strings.ReplaceAll(peerRoutes(hub), "\n", ", ") == routes })
	}
	want("10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12, 10.13.0.0/16 via 192.0.2.13")
	hub.Run("ip", "route", "add", "10.14.0.0/16", "via", "192.0.2.14", "dev", "t0", "onlink", "proto", "bird")
	ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	ping(t, hub, "-I", "10.10.0.1", "10.12.0.1")

	stop := netlab.Stream(t, hub, "10.10.0.1", spoke[0], "10.11.0.1")
	for i := range 10 {
		write([]string{
			"10.11.0.0/16: 192.0.2.11, 10.12.0.0/16: 192.0.2.11, 10.11.7.0/24: 192.0.2.12",
			"10.11.0.0/16: 192.0.2.11, 10.12.0.0/16: 192.0.2.12",
		}[i%2])
		if out, err := d.Run("reload"); err != nil {
			t.Fatal(err, out)
		}
		want([]string{
			"10.11.0.0/16 via 192.0.2.11, 10.11.7.0/24 via 192.0.2.12, 10.12.0.0/16 via 192.0.2.11",
			"10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12",
		}[i%2])
		if i%2 == 0 {
			ping(t, hub, "-I", "10.10.0.1", "10.11.7.1")
		}
	}
	stop()
	if out := hub.Run("ip", "route", "show", "10.14.0.0/16"); out == "" {
		t.Error("the route of another program is gone")
	}

	// A route that somebody removes comes back; one that somebody puts in its place is left alone until it is removed.
	hub.Run("ip", "route", "del", "10.12.0.0/16")
	want("10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12")
	hub.Run("ip", "route", "replace", "10.12.0.0/16", "via", "192.0.2.13", "dev", "t0", "onlink", "proto", "bird")
	time.Sleep(100 * time.Millisecond)
	if out := hub.Run("ip", "route", "show", "10.12.0.0/16"); !strings.Contains(out, "via 192.0.2.13") {
		t.Error(out)
	}
	hub.Run("ip", "route", "del", "10.12.0.0/16")
	want("10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12")
	hub.Run("sh", "-ec", "ip link set t0 down; ip link set t0 up")
	want("10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12")

	// A peer whose prefix has a route elsewhere is an error, which changes nothing.
	hub.Run("ip", "route", "add", "10.15.0.0/16", "via", "192.0.2.13")
	write("10.11.0.0/16: 192.0.2.12, 10.15.0.0/16: 192.0.2.13")
	if out, err := d.Run("reload"); err == nil || !strings.Contains(out, "add route 10.15.0.0/16 via 192.0.2.13 to t0: there is one that leads elsewhere") {
		t.Error(err, out)
	}
	want("10.11.0.0/16 via 192.0.2.11, 10.12.0.0/16 via 192.0.2.12")
	write("10.16.0.0/16: 192.0.2.1")
	if out, err := d.Run("reload"); err == nil || !strings.Contains(out, "want a remote other than local-address") {
		t.Error(err, out)
	}
	for _, c := range []struct{ set, want string }{
		{"peers=10.11.0.0/16=192.0.2.11,10.13.0.0/16=192.0.2.13", "10.11.0.0/16 via 192.0.2.11, 10.13.0.0/16 via 192.0.2.13"},
		{"peers=", ""},
	} {
		if out, err := d.Run("set", "t0", c.set); err != nil {
			t.Error(err, out)
		}
		want(c.want)
	}
	if out, err := d.Run("diff"); err == nil && !strings.Contains(out, "t0: in place: peers") {
		t.Error(out)
	}
}

// Peers come back with their interface, also if the tunnel was changed while it was down.
func TestPeers_down(t *testing.T) {
	t.Parallel()
	hub, _ := mesh(t, 1)
	d := variant{}.upAny(t, hub, 1, "--peers", "10.11.0.0/16=192.0.2.11")
	there := func(want bool) {
		t.Helper()
		netlab.Eventually(t, fmt.Sprintf("the route is there: %v", want), func() bool { return peerRoutes(hub) != "" == want })
	}
	there(true)
	prefixes := func(n int) {
		t.Helper()
		netlab.Eventually(t, fmt.Sprintf("the tunnel knows of %d prefixes", n), func() bool {
			out, err := d.Run("print", "t0", "--json")
			return err == nil && strings.Contains(out, fmt.Sprintf(`"prefixes": %d`, n))
		})
	}
	prefixes(1)
	netlab.Eventually(t, "the kernel carries packets, if it can", func() bool { return d.Status().FastPath != "no route out of the interface has a gateway yet" })
	was := d.Status().FastPath
	hub.Run("ip", "link", "set", "t0", "down")
	there(false)
	prefixes(0)
	netlab.Eventually(t, "control knows, which then leaves the fast path", func() bool { return was != "active" || d.Status().FastPath == "the interface is down" })
	if out, err := d.Run("set", "t0", "mtu=1400"); err != nil {
		t.Error(err, out)
	}
	hub.Run("ip", "link", "set", "t0", "up")
	there(true)
}

// Peers may be given by flags, and come back with an interface that is made again.
func TestPeers_flags(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 1)
	variant{}.upAny(t, spoke[0], 11, "--peers", "10.10.0.0/16=192.0.2.1,10.255.0.1=192.0.2.1")
	d := variant{}.upAny(t, hub, 1, "--peers", "10.11.0.0/16=192.0.2.11", "--peers", "10.255.0.11=192.0.2.11")
	ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	ping(t, hub, "10.255.0.11")
	if got := d.Status().Drops; got["reverse-path"] != 0 {
		t.Error(got)
	}
	hub.Run("ip", "link", "del", "t0")
	netlab.Eventually(t, "they are routes of the interface that is made again", func() bool { return answered(hub, "10.11.0.1") })
}

// print says of each remote whether it can be reached, and how many prefixes it has.
func TestPeers_print(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 1)
	hub.Run("ip", "address", "add", "192.0.2.9/32", "dev", "br0")
	variant{}.upAny(t, spoke[0], 11, "--peers", "10.10.0.0/16=192.0.2.1")
	d := variant{}.upAny(t, hub, 1, "--metrics-address", "127.0.0.1:9000", "--metrics-remotes", "3", "--peers", "10.11.0.0/16=192.0.2.11,10.255.0.11=192.0.2.11,10.12.0.0/16=192.0.2.12,10.13.0.0/16=198.51.100.7,10.14.0.0/16=203.0.113.7,203.0.113.0/24=192.0.2.11")
	hub.Run("ip", "route", "add", "unreachable", "198.51.100.0/24")
	ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	// An ICMP unreachable is believed for some seconds only: send packets again and again.
	shows := func(args, want string) {
		t.Helper()
		netlab.Eventually(t, "print shows "+want, func() bool {
			_, _ = hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "10.12.0.1")
			out, err := d.Run(strings.Fields(args)...)
			return err == nil && strings.Contains(out, want)
		})
	}
	for _, line := range []string{
		"192.0.2.11    3         ok           1500      ",
		"192.0.2.12    1         unreachable  1500      never",
		"198.51.100.7  1         no-path      -         never",
		"203.0.113.7   1         loop         -         never",
	} {
		shows("print t0", "\n"+line)
		shows("print --remotes t0", "\n"+line)
	}
	for _, c := range []struct{ args, want string }{
		{"print", "any (4 remotes, 3 not ok)"},
		{"print --json", `"remotes": {
      "count": 4,
      "not-ok": 3,
      "prefixes": 6
    }`},
		{"print --json --remotes t0", `"address": "203.0.113.7",
    "prefixes": 1,
    "state": "loop"`},
		{"monitor --json --count 1", `"remotes":{"count":4,"not-ok":3,"prefixes":6}`},
	} {
		shows(c.args, c.want)
	}
	if out, err := d.Run("print", "--remotes"); err == nil || !strings.Contains(out, "want its NAME") {
		t.Error(err, out)
	}
	scraped := hub.Run("curl", "-s", "http://127.0.0.1:9000/metrics")
	for _, want := range []string{
		`ipipd_tunnel_remotes{tunnel="t0"} 4`, `ipipd_tunnel_prefixes{tunnel="t0"} 6`,
		`reason="not-in-accept-to"`, `remote_address="any"`,
		`ipipd_tunnel_remote_ok{tunnel="t0",remote_address="203.0.113.7"} 0`, `ipipd_tunnel_remotes_omitted{tunnel="t0"} 1`,
	} {
		if !strings.Contains(scraped, want) {
			t.Errorf("no %s", want)
		}
	}
}
