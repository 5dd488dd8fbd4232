package examples

import (
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// pinger counts the answers to echo requests that are sent all the time.
type pinger struct {
	*process
	interval time.Duration
}

// seen returns the number of answers so far, and the sequence number of the last one.
func (p *pinger) seen() (n, last int) {
	for line := range strings.Lines(p.log.String()) {
		if _, rest, ok := strings.Cut(line, "icmp_seq="); ok && strings.Contains(line, "bytes from") {
			seq, _, _ := strings.Cut(rest, " ")
			last, _ = strconv.Atoi(seq)
			n++
		}
	}
	return n, last
}

// await waits until so many more answers have arrived.
func (p *pinger) await(t *testing.T, what string, more int) {
	t.Helper()
	before, _ := p.seen()
	netlab.Eventually(t, what, func() bool {
		n, _ := p.seen()
		return n >= before+more
	})
}

// A tunnel follows its VRRP address from one gateway to the other, back, and away from one that dies.
func TestKeepalived(t *testing.T) {
	t.Parallel()
	keepalived := need(t, "keepalived", "keepalived")
	u, lan := newUnderlay(t), netlab.New(t)
	lan.Run("sh", "-ec", "ip link add br0 type bridge; ip link set br0 up")
	join := func(ns *netlab.NS, port, device, address string) {
		netlab.Veth(t, lan, ns, netlab.End{Name: port}, netlab.End{Name: device, Address: address})
		lan.Run("ip", "link", "set", port, "master", "br0")
	}
	host := netlab.New(t)
	join(host, "host", "eth0", "10.1.0.9/24")
	host.Run("ip", "route", "add", "default", "via", "10.1.0.254")
	remote, _ := u.node(t, "198.51.100.1")
	remote.Run("ip", "address", "add", "10.2.0.1/16", "dev", "lo")
	dir := example(t, "keepalived")
	netlab.UpConfig(t, remote, "ipip1", filepath.Join(dir, "remote.yaml"))

	type gateway struct {
		*netlab.NS
		port, conf string
		vrrp       *process
		tunnel     *netlab.Daemon
	}
	var gateways []*gateway
	vrrp := func(g *gateway) *process {
		own := t.TempDir()
		return start(t, g.NS, keepalived, "--dont-fork", "--log-console", "--vrrp", "--use-file", g.conf, "--pid", filepath.Join(own, "pid"), "--vrrp_pid", filepath.Join(own, "vrrp"))
	}
	for _, n := range []string{"1", "2"} {
		g := &gateway{conf: filepath.Join(dir, "keepalived.conf")}
		g.NS, g.port = u.node(t, "192.0.2."+n)
		g.Sysctl("net.ipv4.ip_forward", "1")
		join(g.NS, "gateway"+n, "eth1", "10.1.0."+n+"/24")
		if n == "2" {
			g.conf += "2"
			replace(t, filepath.Join(dir, "keepalived.conf"), g.conf, "priority 150", "priority 100")
		}
		g.tunnel = netlab.UpConfig(t, g.NS, "ipip1", filepath.Join(dir, "ipipd.yaml"))
		g.vrrp = vrrp(g)
		gateways = append(gateways, g)
	}
	has := func(g *gateway) func() bool {
		return func() bool { return g.tunnel.Status().Running }
	}
	first, second := gateways[0], gateways[1]
	netlab.Eventually(t, "gateway 1 has the tunnel", has(first))
	netlab.Eventually(t, "and gateway 2 waits", func() bool { return strings.Contains(second.tunnel.Status().WaitingFor, "192.0.2.100") })

	const interval = 50 * time.Millisecond
	p := &pinger{start(t, remote, "ping", "-n", "-i", strconv.FormatFloat(interval.Seconds(), 'f', -1, 64), "-I", "10.2.0.1", "10.1.0.9"), interval}
	move := func(what string, to *gateway, do func()) {
		t.Helper()
		p.await(t, "pings are answered before "+what, 5)
		n0, last0 := p.seen()
		do()
		netlab.Eventually(t, what+": the other gateway has the tunnel", has(to))
		p.await(t, "pings are answered after "+what, 10)
		n, last := p.seen()
		lost := (last - last0) - (n - n0)
		t.Logf("%s: %d of %d packets are lost, some %v", what, lost, last-last0, time.Duration(lost)*interval)
	}
	move("keepalived is stopped", second, func() {
		if err := first.vrrp.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	})
	netlab.Eventually(t, "gateway 1 waits", func() bool { return !has(first)() })
	move("gateway 1 is back", first, func() { first.vrrp = vrrp(first) })
	move("gateway 1 dies", second, func() {
		u.router.Run("ip", "link", "set", first.port, "down")
		lan.Run("ip", "link", "set", "gateway1", "down")
	})
}
