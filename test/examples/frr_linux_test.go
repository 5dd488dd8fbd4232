package examples

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// frrSite is a site of the example: its router, and a host in its LAN.
type frrSite struct {
	*netlab.NS
	host  *netlab.NS
	dir   string // with its files
	run   string // where FRR, which is not root, may write
	ipipd *netlab.Daemon
	ospfd *process
}

func needFRR(t *testing.T) {
	t.Helper()
	need(t, "zebra", "frr")
	if testing.Short() {
		t.Skip("most of what runs is FRR: see the run without -short")
	}
}

// newFRR returns the two sites of the example on their underlay: a provider's router between 192.0.2.1 and
// 198.51.100.1, a line between 203.0.113.1 and .2.
func newFRR(t *testing.T) (a, b *frrSite, u *underlay) {
	t.Helper()
	needFRR(t)
	u = newUnderlay(t)
	a, b = &frrSite{dir: example(t, "frr/a")}, &frrSite{dir: example(t, "frr/b")}
	for _, x := range []struct {
		*frrSite
		provider, line, router, host string
	}{{a, "192.0.2.1", "203.0.113.1", "10.1.0.1", "10.1.0.9"}, {b, "198.51.100.1", "203.0.113.2", "10.2.0.1", "10.2.0.9"}} {
		x.NS, _ = u.node(t, x.provider)
		u.join(t, x.NS, "eth1", x.line)
		x.lan(t, x.router, x.host)
	}
	return a, b, u
}

// lan gives a site its host, and the network between.
func (s *frrSite) lan(t *testing.T, router, host string) {
	t.Helper()
	s.host = netlab.New(t)
	netlab.Veth(t, s.NS, s.host, netlab.End{Name: "lan", Address: router + "/16"}, netlab.End{Name: "eth0", Address: host + "/16"})
	s.host.Run("ip", "route", "add", "default", "via", router)
	s.Sysctl("net.ipv4.ip_forward", "1")
}

// start starts ipipd, and FRR with zebra and these daemons, with the site's files.
func (s *frrSite) start(t *testing.T, tunnel string, daemons ...string) {
	t.Helper()
	s.ipipd = netlab.UpConfig(t, s.NS, tunnel, filepath.Join(s.dir, "ipipd.yaml"))
	run, err := os.MkdirTemp("", "frr-")
	if err == nil {
		t.Cleanup(func() { os.RemoveAll(run) })
		_, err = s.Try("chown", "frr:frr", run)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.run = run
	for _, daemon := range append([]string{"mgmtd", "zebra"}, daemons...) {
		path, err := exec.LookPath("/usr/lib/frr/" + daemon)
		if err != nil && daemon == "mgmtd" { // since FRR 9
			continue
		}
		args := []string{"-f", "/dev/null", "-i", filepath.Join(s.run, daemon+".pid"), "-z", filepath.Join(s.run, "zserv.api"),
			"--vty_socket", s.run, "-P", "0", "--log", "stdout"}
		if daemon == "bfdd" {
			args = append(args, "--bfdctl", filepath.Join(s.run, "bfdd.sock"))
		}
		started := start(t, s.NS, path, args...)
		if daemon == "ospfd" {
			s.ospfd = started
		}
		netlab.Eventually(t, daemon+" is there", func() bool {
			_, err := s.Try("vtysh", "--vty_socket", s.run, "-d", daemon, "-c", "show version")
			return err == nil
		})
	}
	s.Run("vtysh", "--vty_socket", s.run, "-f", filepath.Join(s.dir, "frr.conf"))
}

// vtysh returns the output of a command of FRR.
func (s *frrSite) vtysh(command string) string {
	return s.Run("vtysh", "--vty_socket", s.run, "-c", command)
}

// full reports whether OSPF has a neighbour in state Full over a tunnel.
func (s *frrSite) full(tunnel string) bool {
	return regexp.MustCompile(`Full/.*` + tunnel + `:`).MatchString(s.vtysh("show ip ospf neighbor"))
}

// leads reports whether the route to a prefix leads into a tunnel.
func (s *frrSite) leads(prefix, tunnel string) bool {
	return strings.Contains(s.Run("ip", "route", "show", prefix), "dev "+tunnel+" proto ospf")
}

// failover makes the provider drop everything, waits until both sites have moved to the backup, and, once the
// provider forwards again, until they are back. It logs how long the move took.
func failover(t *testing.T, a, b *frrSite, u *underlay, by string) {
	t.Helper()
	on := func(tunnel string) func() bool {
		return func() bool { return a.leads("10.2.0.0/16", tunnel) && b.leads("10.1.0.0/16", tunnel) }
	}
	netlab.Eventually(t, "both tunnels have a neighbour", func() bool {
		return a.full("ipip1") && a.full("ipip2") && b.full("ipip1") && b.full("ipip2")
	})
	netlab.Eventually(t, "packets take the tunnel of the lower cost", on("ipip1"))
	netlab.Eventually(t, "and arrive", func() bool { return answered(a.host, "10.2.0.9") })

	const interval = 100 * time.Millisecond
	var out netlab.Buffer
	pings := exec.Command("ping", "-n", "-q", "-i", "0.1", "10.2.0.9")
	pings.Stdout = &out
	a.host.Start(pings)
	cut := time.Now()
	u.router.Run("ip", "rule", "add", "pref", "1", "to", "198.51.100.0/24", "blackhole")
	u.router.Run("ip", "rule", "add", "pref", "1", "to", "192.0.2.0/24", "blackhole")
	netlab.Eventually(t, "packets take the backup", on("ipip2"))
	moved := time.Since(cut)
	netlab.Eventually(t, "and arrive", func() bool { return answered(a.host, "10.2.0.9") })
	_ = pings.Process.Signal(os.Interrupt)
	_ = pings.Wait()
	m := regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`).FindStringSubmatch(out.String())
	if m == nil {
		t.Fatalf("ping says: %s", out.String())
	}
	sent, _ := strconv.Atoi(m[1])
	received, _ := strconv.Atoi(m[2])
	t.Logf("by %s traffic moved to the other tunnel after %.1f s; %d of %d pings, one in %v, were lost", by, moved.Seconds(), sent-received, sent, interval)

	u.router.Run("ip", "rule", "del", "pref", "1", "to", "198.51.100.0/24", "blackhole")
	u.router.Run("ip", "rule", "del", "pref", "1", "to", "192.0.2.0/24", "blackhole")
	netlab.Eventually(t, "and come back", on("ipip1"))
}

// Without BFD ipipd's keepalive detects that a path is dead, long before OSPF's dead interval of 40 s: the
// interface loses its carrier.
func TestFRR_keepalive(t *testing.T) {
	t.Parallel()
	a, b, u := newFRR(t)
	for _, s := range []*frrSite{a, b} {
		conf := filepath.Join(s.dir, "frr.conf")
		replace(t, conf, conf, " ip ospf bfd\n", "", " ip ospf bfd profile tunnel\n", "")
		s.start(t, "ipip1", "ospfd", "bfdd")
	}
	failover(t, a, b, u, "keepalive")
	a.ipipd.Stop(os.Interrupt)
	a.ipipd.Restart()
	netlab.Eventually(t, "FRR follows the interfaces when they are made anew", func() bool {
		return a.leads("10.2.0.0/16", "ipip1") && b.leads("10.1.0.0/16", "ipip1") && answered(a.host, "10.2.0.9")
	})
}

// BFD goes through the tunnel, and is faster.
func TestFRR_bfd(t *testing.T) {
	t.Parallel()
	a, b, u := newFRR(t)
	for _, s := range []*frrSite{a, b} {
		yaml := filepath.Join(s.dir, "ipipd.yaml")
		replace(t, yaml, yaml, `keepalive: "1s,5"`, "keepalive: off")
		s.start(t, "ipip1", "ospfd", "bfdd")
	}
	failover(t, a, b, u, "BFD")
}

// Two ends with different MTUs do not become OSPF neighbours. The MTUs are the same unless an operator sets them.
func TestFRR_mtu(t *testing.T) {
	t.Parallel()
	a, b, _ := newFRR(t)
	a.start(t, "ipip1", "ospfd", "bfdd")
	b.start(t, "ipip1", "ospfd", "bfdd")
	netlab.Eventually(t, "the two ends are neighbours", func() bool { return a.full("ipip1") && b.full("ipip1") })
	if out, err := b.ipipd.Run("set", "ipip1", "mtu=1400"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	a.vtysh("clear ip ospf neighbor")
	netlab.Eventually(t, "ends of different MTUs become no neighbours", func() bool {
		return a.full("ipip2") && !a.full("ipip1") && strings.Contains(b.ospfd.log.String(), "MTU 1480 is larger than [ipip1:10.255.0.2]'s MTU 1400")
	})
	if out, err := b.ipipd.Run("set", "ipip1", "mtu=auto"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	netlab.Eventually(t, "the same MTU makes them neighbours", func() bool { return a.full("ipip1") && b.full("ipip1") })
}

// Three nodes with one interface each, whose BGP sessions are in the tunnel.
func TestFRR_mesh(t *testing.T) {
	t.Parallel()
	needFRR(t)
	u := newUnderlay(t)
	var nodes [4]*frrSite
	var ports [4]string
	for n := 1; n <= 3; n++ {
		s := &frrSite{dir: example(t, "frr-mesh")}
		s.NS, ports[n] = u.node(t, fmt.Sprint("192.0.2.", n))
		s.lan(t, fmt.Sprintf("10.%d.0.1", n), fmt.Sprintf("10.%d.0.9", n))
		if n > 1 {
			conf, yaml := filepath.Join(s.dir, "frr.conf"), filepath.Join(s.dir, "ipipd.yaml")
			swap := func(word string) []string { // node 1 takes the place of this one
				me, one := fmt.Sprintf(word, n), fmt.Sprintf(word, 1)
				return []string{me, one, one, me}
			}
			outer, inner := swap("192.0.2.%d"), swap("10.255.0.%d")
			replace(t, yaml, yaml, append(outer[2:], inner[2:]...)...)
			replace(t, conf, conf, slices.Concat(outer[:2], inner, swap("6500%d"), []string{"10.1.0.0/16", fmt.Sprintf("10.%d.0.0/16", n)})...)
		}
		nodes[n] = s
		s.start(t, "ipip0", "staticd", "bgpd", "bfdd")
	}
	leads := func(from, to int) bool {
		return strings.Contains(nodes[from].Run("ip", "route", "show", fmt.Sprintf("10.%d.0.0/16", to)), fmt.Sprintf("via 192.0.2.%d dev ipip0 proto bgp", to))
	}
	for from := 1; from <= 3; from++ {
		for to := 1; to <= 3; to++ {
			if from != to {
				netlab.Eventually(t, fmt.Sprintf("the hosts of node %d reach those of node %d", from, to), func() bool {
					return leads(from, to) && answered(nodes[from].host, fmt.Sprintf("10.%d.0.9", to))
				})
			}
		}
	}
	netlab.Eventually(t, "BFD is up", func() bool { return strings.Count(nodes[1].vtysh("show bfd peers"), "Status: up") == 2 })
	cut := time.Now()
	u.router.Run("ip", "link", "set", ports[3], "down")
	netlab.Eventually(t, "the route to a dead node leaves the others", func() bool { return !leads(1, 3) && !leads(2, 3) })
	t.Logf("the routes of the node have left the other two after %.1f s", time.Since(cut).Seconds())
	netlab.Eventually(t, "the others reach each other", func() bool { return leads(1, 2) && answered(nodes[1].host, "10.2.0.9") })
}
