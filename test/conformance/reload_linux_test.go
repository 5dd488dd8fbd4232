package conformance

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// Reloads that change one tunnel, in place or by making it again, remove it and add it, lose no packet
// of the other.
func TestReload_otherTunnel(t *testing.T) {
	for _, fastPath := range []string{"no", "yes"} {
		t.Run("fast-path-"+fastPath, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			file := filepath.Join(t.TempDir(), "ipipd.yaml")
			write := func(other string) {
				t.Helper()
				t0 := fmt.Sprintf("- {name: t0, local-address: %s, remote-address: %s, address: %s/24, allow-fast-path: %s}\n", outerA, outerB, innerA, fastPath)
				if err := os.WriteFile(file, []byte("tunnels:\n"+t0+other), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			other := func(more string) string {
				return "- {name: t1, remote-address: 192.0.2.9, address: 10.9.0.1/24" + more + "}\n"
			}
			write(other(""))
			da := netlab.UpConfig(t, a, "t0", file)
			upB(t, b)
			ping(t, a, innerB)

			stop := netlab.Stream(t, a, innerA, b, innerB)
			for round := range 3 {
				for _, step := range []struct{ other, want string }{
					{other(", dscp: 46, ttl: 9"), "t0: nothing\nt1: in place: dscp, ttl\n"},
					{other(", tun-queues: 2"), "t0: nothing\nt1: again: tun-queues, dscp, ttl (tun-queues always: the queues are made with the interface)\n"},
					{"", "t0: nothing\nt1: remove\n"},
					{other(""), "t0: nothing\nt1: add\n"},
				} {
					write(step.other)
					if out, err := da.Run("diff"); err != nil || out != step.want {
						t.Errorf("diff: %v, got\n%swant\n%s", err, out, step.want)
					}
					if out, err := da.Run("reload"); err != nil || out != "" {
						t.Errorf("round %d, reload to %q: %v\n%s", round, step.other, err, out)
					}
				}
			}
			stop()
		})
	}
}

var (
	reloads    = flag.Int("reloads", 60, "random reloads of TestReload_random, on each path")
	reloadSeed = flag.Uint64("reload-seed", 1, "seed of the random configurations")
)

// Random reloads, errors among them, lose no packet of a tunnel that does not change, and those with an
// error change nothing.
func TestReload_random(t *testing.T) {
	for _, fastPath := range []string{"no", "yes"} {
		t.Run("fast-path-"+fastPath, func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(*reloadSeed, 1))
			a, b := reloadHosts(t)
			dir := t.TempDir()
			file, last := filepath.Join(dir, "ipipd.yaml"), filepath.Join(dir, "last.yaml")
			t0 := fmt.Sprintf("- {name: t0, local-address: %s, remote-address: %s, address: %s/24, allow-fast-path: %s}\n", outerA, outerB, innerA, fastPath)
			writeTunnels(t, file, t0)
			writeTunnels(t, last, t0)
			da := netlab.UpConfig(t, a, "t0", file)
			upB(t, b)
			ping(t, a, innerB)
			stop := netlab.Stream(t, a, innerA, b, innerB)
			for i := range *reloads {
				tunnels := t0 + randomTunnels(random)
				var wrong string
				if random.IntN(4) == 0 {
					wrong = wrongTunnels[random.IntN(len(wrongTunnels))]
				}
				writeTunnels(t, file, tunnels+wrong)
				out, err := da.Run("reload")
				if (err != nil) != (wrong != "") {
					t.Errorf("reload %d: %v\n%s\nof\n%s%s", i, err, out, tunnels, wrong)
				}
				if err == nil {
					writeTunnels(t, last, tunnels)
				}
				out, err = da.Run("diff", last)
				for line := range strings.Lines(out) {
					if !strings.HasSuffix(line, ": nothing\n") || err != nil {
						t.Errorf("after reload %d: %v, %s", i, err, line)
					}
				}
				if t.Failed() {
					break
				}
			}
			stop()
		})
	}
}

// wrongTunnels are tunnels that no configuration with t0 may have.
var wrongTunnels = []string{
	"- {name: bad, remote-address: 192.0.2.19, no-such-property: yes}\n",
	"- {name: bad, remote-address: 192.0.2.19, dscp: 64}\n",
	"- {name: t0, remote-address: 192.0.2.19}\n",                                 // a name twice
	"- {name: bad, local-address: 192.0.2.1, remote-address: 192.0.2.2}\n",       // a pair twice
	"- {name: bad, remote-address: 192.0.2.1}\n",                                 // this host
	"- {name: bad, remote-address: 192.0.2.19, route: [10.255.0.0/24]}\n",        // the connected route of t0
	"- {name: bad, remote-address: 192.0.2.19, route: [192.0.2.19/32]}\n",        // a loop
	"- {name: veth0, remote-address: 192.0.2.19}\n",                              // an interface of the host
	"- {name: bad, remote-address: 192.0.2.19, ipsec-secret-file: /nowhere/x}\n", // cannot be read
}

// From one random configuration to another, a reload leaves the host, and print --json, as a start with
// the second one does.
func TestReload_likeStart(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(*reloadSeed, 2))
	a, _ := reloadHosts(t)
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	const t0 = "- {name: t0, remote-address: 192.0.2.2, keepalive: off}\n"
	empty := hostState(t, a)
	configs := make([]string, max(2, *reloads/5))
	started := make([]string, len(configs))
	for i := range configs {
		configs[i] = t0 + randomTunnels(random)
		writeTunnels(t, file, configs[i])
		d := netlab.UpConfig(t, a, "t0", file)
		started[i] = settledState(t, a, d)
		d.Stop(os.Interrupt)
		if left := hostState(t, a); left != empty {
			t.Fatalf("left by\n%s\n%s\nbefore\n%s", configs[i], left, empty)
		}
	}
	writeTunnels(t, file, configs[0])
	d := netlab.UpConfig(t, a, "t0", file)
	for i := range configs[1:] {
		from, to := configs[i], configs[i+1]
		writeTunnels(t, file, to)
		if out, err := d.Run("reload"); err != nil {
			t.Fatalf("reload: %v\n%s\nfrom\n%sto\n%s", err, out, from, to)
		}
		var got string
		if !netlab.WaitFor(func() bool { got = settledState(t, a, d); return got == started[i+1] }) {
			t.Fatalf("from\n%sto\n%s%s", from, to, lineDiff(started[i+1], got))
		}
	}
}

// reloadHosts is hosts, with outer addresses for the tunnels of randomTunnels.
func reloadHosts(t *testing.T) (a, b *netlab.NS) {
	t.Helper()
	a, b = hosts(t)
	a.Run("ip", "address", "add", "192.0.2.101/24", "dev", "veth0")
	for i := range 4 {
		b.Run("ip", "address", "add", fmt.Sprintf("192.0.2.1%d/24", i), "dev", "veth0")
	}
	return a, b
}

func writeTunnels(t *testing.T, file, tunnels string) {
	t.Helper()
	if err := os.WriteFile(file, []byte("tunnels:\n"+tunnels), 0o600); err != nil {
		t.Fatal(err)
	}
}

// randomTunnels returns tunnels of a configuration, each property of which may be set.
func randomTunnels(random *rand.Rand) string {
	var out strings.Builder
	remotes := random.Perm(4)
	routes := []string{"10.20.0.0/16", "10.21.0.0/16 metric 200", "10.22.0.0/16 table 100", "0.0.0.0/0 metric 300 table 100", "10.23.0.0/16", "10.23.0.0/16 metric 50"}
	random.Shuffle(len(routes), func(i, j int) { routes[i], routes[j] = routes[j], routes[i] })
	for i, name := range []string{"t1", "t2", "t3", "branch office 4 (fibre)"} {
		if random.IntN(10) < 3 {
			continue
		}
		fmt.Fprintf(&out, "- {name: %q, remote-address: 192.0.2.1%d", name, remotes[i])
		set := func(property string, values ...string) {
			if k := random.IntN(2 * len(values)); k < len(values) {
				fmt.Fprintf(&out, ", %s: %q", property, values[k])
			}
		}
		list := func(property string, values []string) {
			random.Shuffle(len(values), func(i, j int) { values[i], values[j] = values[j], values[i] })
			if values = values[:random.IntN(len(values)+1)]; len(values) > 0 {
				fmt.Fprintf(&out, ", %s: [%q", property, values[0])
				for _, v := range values[1:] {
					fmt.Fprintf(&out, ", %q", v)
				}
				out.WriteString("]")
			}
		}
		n := 1 + remotes[(i+1)%4]
		list("address", []string{fmt.Sprintf("10.9.%d.1/24", n), fmt.Sprintf("10.9.%d.2/24", n), fmt.Sprintf("10.9.%d.3/32", i), fmt.Sprintf("10.10.%d.1 peer 10.10.%d.2", n, n)})
		split := random.IntN(len(routes) + 1)
		list("route", slices.Clone(routes[:split]))
		routes = routes[split:]
		set("local-address", "192.0.2.1", "192.0.2.101")
		set("dscp", "46", "0")
		set("ttl", "9", "inherit")
		set("dont-fragment", "inherit")
		set("clamp-tcp-mss", "no")
		set("mtu", "1400", "1300")
		set("keepalive", "off", "10s,10", "20s,5")
		set("comment", "x", "no")
		set("tun-queues", "2")
		set("allow-fast-path", "no")
		set("underlay-device", "veth0")
		set("disabled", "yes")
		out.WriteString("}\n")
		if len(routes) == 0 {
			routes = []string{fmt.Sprintf("10.3%d.0.0/16", i)}
		}
	}
	return out.String()
}

// settledState returns hostState, and what print --json shows, once no fast path is being attached.
func settledState(t *testing.T, ns *netlab.NS, d *netlab.Daemon) string {
	t.Helper()
	var status []map[string]any
	netlab.Eventually(t, "the fast path of each tunnel is attached or refused", func() bool {
		out, err := d.Run("print", "--json")
		status = nil
		if err == nil {
			err = json.Unmarshal([]byte(out), &status)
		}
		return err == nil && !slices.ContainsFunc(status, func(s map[string]any) bool { return s["fast-path"] == "starting" })
	})
	for _, s := range status {
		for _, past := range []string{"last-heard", "drops", "process-drops", "rx-packet", "rx-byte", "tx-packet", "tx-byte", "warnings", "restored"} {
			delete(s, past)
		}
	}
	return hostState(t, ns) + jsonLines(t, status)
}

// hostState returns the kernel's interfaces, IPv4 addresses and routes.
func hostState(t *testing.T, ns *netlab.NS) string {
	t.Helper()
	var all string
	for _, command := range []string{"-d link show", "-4 address show", "-4 route show table all"} {
		var entries []map[string]any
		out := ns.Run("ip", append([]string{"-j"}, strings.Fields(command)...)...)
		if err := json.Unmarshal([]byte(out), &entries); err != nil {
			t.Fatalf("ip -j %s: %v\n%s", command, err, out)
		}
		for _, e := range entries {
			delete(e, "ifindex")
			// Addresses that stay keep their place, before those that are new: another one in their
			// subnet is the secondary then, and not the source of its route.
			if e["protocol"] == "kernel" {
				delete(e, "prefsrc")
			}
			if addresses, ok := e["addr_info"].([]any); ok {
				for _, a := range addresses {
					delete(a.(map[string]any), "secondary")
				}
				slices.SortFunc(addresses, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
			}
		}
		all += jsonLines(t, entries)
	}
	return all
}

// jsonLines returns one line for each entry, sorted.
func jsonLines(t *testing.T, entries []map[string]any) string {
	t.Helper()
	var lines []string
	for _, e := range entries {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, string(line)+"\n")
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// lineDiff returns the lines that only one of two texts has.
func lineDiff(want, got string) string {
	w, g := slices.Collect(strings.Lines(want)), slices.Collect(strings.Lines(got))
	var out strings.Builder
	for _, l := range w {
		if !slices.Contains(g, l) {
			out.WriteString("want " + l)
		}
	}
	for _, l := range g {
		if !slices.Contains(w, l) {
			out.WriteString("got  " + l)
		}
	}
	return out.String()
}
