package examples

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"ipipd/test/netlab"
)

const birdNodes = 10

// birdAddress returns the underlay address of a node of the example: they are on two segments.
func birdAddress(n int) string {
	if n <= birdNodes/2 {
		return fmt.Sprintf("192.0.2.%d", n)
	}
	return fmt.Sprintf("198.51.100.%d", n)
}

// birdFiles returns a folder with the files of node n, made of the example's, which are node 1's.
func birdFiles(t *testing.T, n int) (dir string) {
	t.Helper()
	dir = example(t, "bird")
	if n == 1 {
		return dir
	}
	session := func(n int) string {
		return fmt.Sprintf("protocol bgp node%d from mesh { neighbor %s as %d; }", n, birdAddress(n), 65000+n)
	}
	remote := func(n int) string { return fmt.Sprintf("route %s/32 via %[1]s%%ipip0 onlink;", birdAddress(n)) }
	conf, yaml := filepath.Join(dir, "bird.conf"), filepath.Join(dir, "ipipd.yaml")
	replace(t, conf, conf,
		"ADDRESS = "+birdAddress(1), "ADDRESS = "+birdAddress(n), "AS = 65001", fmt.Sprint("AS = ", 65000+n), "10.1.0.0/16", fmt.Sprintf("10.%d.0.0/16", n),
		session(n), session(1), remote(n), remote(1))
	replace(t, yaml, yaml, birdAddress(1), birdAddress(n), "10.1.0.1", fmt.Sprintf("10.%d.0.1", n))
	return dir
}

// Ten nodes reach each other by the routes that BIRD adds. One that dies is not routed to until it is back.
func TestBird_mesh(t *testing.T) {
	t.Parallel()
	bird := need(t, "bird", "bird2")
	u := newUnderlay(t)
	nodes, ports := make([]*netlab.NS, birdNodes+1), make([]string, birdNodes+1)
	for n := 1; n <= birdNodes; n++ {
		nodes[n], ports[n] = u.node(t, birdAddress(n))
	}
	dirs, ipipd := make([]string, birdNodes+1), make([]*process, birdNodes+1)
	up := func(n int) { // ipipd may be ready before BIRD, or after it
		ipipd[n] = start(t, nodes[n], netlab.Binary(t), "up", "--config", filepath.Join(dirs[n], "ipipd.yaml"), "--runtime-dir", dirs[n])
	}
	for n := 1; n <= birdNodes; n++ {
		dir := birdFiles(t, n)
		dirs[n] = dir
		up(n)
		start(t, nodes[n], bird, "-f", "-c", filepath.Join(dir, "bird.conf"), "-s", filepath.Join(dir, "bird.ctl"), "-P", filepath.Join(dir, "bird.pid"))
	}

	// peers returns the nodes to whose prefix node n has a route out of the interface.
	route := regexp.MustCompile(`(?m)^10\.(\d+)\.0\.0/16 via (\S+) proto bird .*onlink`)
	peers := func(n int) (list string) {
		out, _ := nodes[n].Try("ip", "route", "show", "dev", "ipip0") // no interface, no route
		for _, m := range route.FindAllStringSubmatch(out, -1) {
			list += m[1] + " via " + m[2] + "\n"
		}
		return list
	}
	others := func(n int, without int) (list string) {
		for i := 1; i <= birdNodes; i++ {
			if i != n && i != without {
				list += fmt.Sprintf("%d via %s\n", i, birdAddress(i))
			}
		}
		return list
	}
	converged := func(without int) func() bool {
		return func() bool {
			for n := 1; n <= birdNodes; n++ {
				if n != without && peers(n) != others(n, without) {
					return false
				}
			}
			return true
		}
	}
	netlab.Eventually(t, "each node has a route to every other one", converged(0))
	for n := 1; n <= birdNodes; n++ {
		netlab.Eventually(t, fmt.Sprintf("node %d reaches all", n), func() bool {
			_, err := nodes[n].Try("sh", "-c", fmt.Sprintf(`for i in $(seq %d); do
				ping -n -c 1 -W 2 10.$i.0.1 >/dev/null & all="$all $!"; done; for p in $all; do wait $p || exit; done`, birdNodes))
			return err == nil
		})
	}

	// Nodes 2 and 8 have one more prefix, the same.
	anycast := []int{2, 8}
	for _, n := range anycast {
		nodes[n].Run("ip", "address", "add", "10.99.0.1/32", "dev", "lo")
		nodes[n].Run("sh", "-c", "echo 'protocol static anycast { ipv4; route 10.99.0.0/16 blackhole; }' >>"+filepath.Join(dirs[n], "bird.conf"))
		nodes[n].Run("birdc", "-s", filepath.Join(dirs[n], "bird.ctl"), "configure")
	}
	netlab.Eventually(t, "a prefix of two nodes has both as gateways", func() bool {
		route := nodes[1].Run("ip", "route", "show", "10.99.0.0/16")
		return strings.Contains(route, "via "+birdAddress(2)+" dev ipip0") && strings.Contains(route, "via "+birdAddress(8)+" dev ipip0")
	})
	netlab.Eventually(t, "which answer", func() bool { return answered(nodes[1], "10.99.0.1") })

	const dead = 7
	cut := time.Now()
	u.router.Run("ip", "link", "set", ports[dead], "down")
	netlab.Eventually(t, "the routes of a dead node have left the others", converged(dead))
	t.Logf("the routes of the node have left the other nine after %.1f s", time.Since(cut).Seconds())
	if out, err := nodes[1].Try("ip", "route", "get", fmt.Sprintf("10.%d.0.1", dead)); err == nil || !strings.Contains(out, "No route to host") {
		t.Errorf("packets for it leave without the tunnel: %s", out)
	}
	u.router.Run("ip", "link", "set", ports[dead], "up")
	netlab.Eventually(t, "they are there again", converged(0))
	netlab.Eventually(t, "and lead there", func() bool { return answered(nodes[1], fmt.Sprintf("10.%d.0.1", dead)) })

	if err := ipipd[1].Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = ipipd[1].Wait()
	netlab.Eventually(t, "no packet leaves without the tunnel", func() bool {
		return strings.Contains(nodes[1].Run("ip", "route"), "unreachable 10.2.0.0/16 proto bird")
	})
	up(1)
	netlab.Eventually(t, "BIRD follows the interface when it is made anew", converged(0))
	netlab.Eventually(t, "and packets go", func() bool { return answered(nodes[1], "10.2.0.1") })
}
