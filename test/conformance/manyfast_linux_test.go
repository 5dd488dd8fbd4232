package conformance

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// The tests of many remotes run over the fast path as a variant; these are about which packets it carries.

// fastMesh is a mesh whose hub and spokes have the fast path, and routes to each other.
func fastMesh(t *testing.T, spokes int) (hub *netlab.NS, spoke []*netlab.NS, daemons []*netlab.Daemon) {
	t.Helper()
	hub, spoke = mesh(t, spokes)
	daemons = append(daemons, fast.upAny(t, hub, 1))
	for i, s := range spoke {
		daemons = append(daemons, fast.upAny(t, s, 11+i))
		routeTo(s, "10.10.0.0/16", 1)
		routeTo(hub, fmt.Sprintf("10.%d.0.0/16", 11+i), 11+i)
	}
	for i := range spoke {
		ping(t, hub, "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", 11+i))
	}
	if s := daemons[0].Status().FastPath; s != "active" && !strings.Contains(s, "gateway") {
		t.Skipf("no fast path here: %s", s)
	}
	netlab.Eventually(t, "the fast path is active", func() bool {
		for _, d := range daemons {
			if d.Status().FastPath != "active" {
				return false
			}
		}
		return true
	})
	return hub, spoke, daemons
}

// inUserspace returns how many packets t0's process has read from the interface and written to it.
func inUserspace(t *testing.T, ns *netlab.NS) (n uint64) {
	t.Helper()
	var links []struct {
		Stats64 struct{ Rx, Tx struct{ Packets uint64 } }
	}
	if err := json.Unmarshal([]byte(ns.Run("ip", "-j", "-s", "link", "show", "dev", "t0")), &links); err != nil || len(links) != 1 {
		t.Fatal(err)
	}
	return links[0].Stats64.Rx.Packets + links[0].Stats64.Tx.Packets
}

// awaitBypassed waits until pings of the hub bypass userspace there, or do not if want is false.
func awaitBypassed(t *testing.T, hub *netlab.NS, want bool, to string) {
	t.Helper()
	netlab.Eventually(t, fmt.Sprintf("the fast path carries what goes to %s: %v", to, want), func() bool {
		before := inUserspace(t, hub)
		return answered2(hub, to) && (inUserspace(t, hub) == before) == want
	})
}

func answered2(hub *netlab.NS, to string) bool {
	_, err := hub.Try("ping", "-c", "2", "-i", "0.2", "-W", "1", "-I", "10.10.0.1", to)
	return err == nil
}

// The fast path carries packets of several remotes, in both directions, and counts them. Those of a route with
// several next hops go through userspace.
func TestManyFast_carries(t *testing.T) {
	t.Parallel()
	hub, spoke, daemons := fastMesh(t, 3)
	for _, to := range []string{"10.11.0.1", "10.12.0.1", "10.13.0.1"} {
		awaitBypassed(t, hub, true, to)
	}
	before, after := daemons[0].Status(), netlab.Status{}
	_ = answered2(hub, "10.11.0.1")
	netlab.Eventually(t, "it is counted", func() bool {
		after = daemons[0].Status()
		return after.TxPacket == before.TxPacket+2 && after.RxPacket == before.RxPacket+2
	})
	for _, s := range spoke[:2] {
		s.Run("ip", "address", "add", "10.20.0.1/32", "dev", "lo")
	}
	hub.Run("ip", "route", "add", "10.20.0.0/16", "nexthop", "via", outerOf(11), "dev", "t0", "onlink", "nexthop", "via", outerOf(12), "dev", "t0", "onlink")
	awaitBypassed(t, hub, false, "10.20.0.1")
	hub.Run("ip", "route", "replace", "10.20.0.0/16", "via", outerOf(12), "dev", "t0", "onlink")
	awaitBypassed(t, hub, true, "10.20.0.1")
}

// tcpdump sees the packets: they go through userspace while it runs. ipipd's own capture sees them on the fast path.
func TestManyFast_capture(t *testing.T) {
	t.Parallel()
	hub, _, daemons := fastMesh(t, 1)
	awaitBypassed(t, hub, true, "10.11.0.1")
	stop := capturing(t, hub)
	awaitBypassed(t, hub, false, "10.11.0.1")
	// Routes go on being followed.
	routeTo(hub, "10.11.0.0/24", 11)
	hub.Run("ip", "route", "del", "10.11.0.0/16")
	stop()
	awaitBypassed(t, hub, true, "10.11.0.1")
	c := startCapture(t, daemons[0])
	awaitBypassed(t, hub, true, "10.11.0.1")
	netlab.Eventually(t, "the packets are captured", func() bool {
		f := c.read()
		return len(found(f, "inner out", netlab.Destination("10.11.0.1"))) > 0 && len(found(f, "inner in", netlab.Source("10.11.0.1"))) > 0
	})
	_ = c.cmd.Process.Kill()
	awaitBypassed(t, hub, true, "10.11.0.1")
}

// Routes change a thousand times a second: packets of another route arrive, each once, where they should.
func TestManyFast_storm(t *testing.T) {
	t.Parallel()
	hub, spoke, daemons := fastMesh(t, 3)
	awaitBypassed(t, hub, true, "10.11.0.1")
	// Prefixes of other remotes that overlap the stream's, longer and shorter ones.
	var batch strings.Builder
	const changes = 30000
	for i := range changes {
		verb, remote := []string{"replace", "replace", "del"}[i%3], 12+i%2
		prefix := []string{"10.11.0.0/30", "10.8.0.0/13", "10.11.128.0/17", "10.11.1.0/24", "0.0.0.0/1", "10.40.0.0/16"}[i/3%6]
		if i%3 == 0 {
			remote = 11
		}
		if prefix == "10.11.0.0/30" { // it has the stream's
			remote = 11
		}
		if verb == "del" {
			fmt.Fprintf(&batch, "route del %s dev t0\n", prefix)
		} else {
			fmt.Fprintf(&batch, "route replace %s via %s dev t0 onlink\n", prefix, outerOf(remote))
		}
	}
	file := filepath.Join(t.TempDir(), "storm")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	server := listenUDP(t, spoke[0], "10.11.0.1:7")
	_ = server.(*net.UDPConn).SetReadBuffer(8 << 20)
	var arrived atomic.Int64
	go func() {
		buf := make([]byte, 64)
		for {
			if _, _, err := server.ReadFrom(buf); err != nil {
				return
			}
			arrived.Add(1)
		}
	}()
	client := listenUDP(t, hub, "10.10.0.1:7")
	to := &net.UDPAddr{IP: net.IPv4(10, 11, 0, 1), Port: 7}
	done := make(chan string, 1)
	before := inUserspace(t, hub)
	go func() {
		out, err := hub.Try("ip", "-batch", file)
		if err != nil {
			out += err.Error()
		} else {
			out = ""
		}
		done <- out
	}()
	var sent int64
	for storming := true; storming; {
		for range 10 {
			if _, err := client.WriteTo([]byte("stream"), to); err != nil {
				t.Fatal(err)
			}
			sent++
		}
		time.Sleep(2 * time.Millisecond)
		select {
		case out := <-done:
			if storming = false; out != "" {
				t.Error(out)
			}
		default:
		}
	}
	if sent < 50 || !netlab.WaitFor(func() bool { return arrived.Load() >= sent }) {
		t.Errorf("%d of %d arrived", arrived.Load(), sent)
	}
	if now := inUserspace(t, hub); now-before > uint64(sent)/2 {
		t.Errorf("%d of %d packets went through userspace", now-before, sent)
	}
	for _, d := range daemons {
		for why, n := range d.Status().AllDrops() {
			if n != 0 {
				t.Errorf("%d dropped: %s", n, why)
			}
		}
	}
	t.Logf("%d packets beside %d changes", sent, changes)
}

// A tunnel with one remote keeps the packets of that remote, though it is carried in userspace, and though another
// tunnel of the process, with many remotes, would accept them, too.
func TestManyFast_besideOne(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 2)
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	text := fmt.Sprintf("tunnels:\n- {name: t0, local-address: %s, remote-address: any, address: 10.255.0.1/32}\n- {name: t1, local-address: %s, remote-address: %s, address: 10.254.0.1/24, keepalive: off, allow-fast-path: no}\n",
		outerOf(1), outerOf(1), outerOf(11))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := netlab.UpConfig(t, hub, "t0", file)
	for i, s := range spoke {
		netlab.Up(t, s, "t0", "--local-address", outerOf(11+i), "--remote-address", outerOf(1), "--address", fmt.Sprintf("10.254.0.%d/24", 11+i), "--keepalive", "off", "--route", "10.10.0.0/16")
		routeTo(hub, fmt.Sprintf("10.%d.0.0/16", 11+i), 11+i)
	}
	ping(t, hub, "-I", "10.10.0.1", "10.12.0.1")
	netlab.Eventually(t, "the fast path is active", func() bool { return d.Status().FastPath == "active" })
	// Packets from 192.0.2.11 are t1's, whatever is inside: the answers come in by t1, where rp_filter would drop them.
	hub.Sysctl("net.ipv4.conf.all.rp_filter", "0")
	hub.Sysctl("net.ipv4.conf.t1.rp_filter", "0")
	t0, t1 := inUserspace(t, hub), received(t, hub, "t1")
	ping(t, hub, "-c", "3", "-i", "0.2", "-I", "10.10.0.1", "10.11.0.1")
	if got := received(t, hub, "t1") - t1; got < 3 {
		t.Errorf("t1 has received %d packets of its remote; %d went through t0's process", got, inUserspace(t, hub)-t0)
	}
}

// Packets of a stranger do not reach the process, and are counted.
func TestManyFast_refuses(t *testing.T) {
	t.Parallel()
	hub, spoke, daemons := fastMesh(t, 2)
	hub.Run("ip", "route", "del", "10.12.0.0/16")
	// The first packets after the route are refused by userspace.
	netlab.Eventually(t, "the fast path refuses", func() bool {
		before := daemons[0].Drops("reverse-path")
		daemons[0].Signal(syscall.SIGSTOP)
		_, err := spoke[1].Try("ping", "-c", "3", "-i", "0.2", "-W", "1", "-I", "10.12.0.1", "10.10.0.1")
		queued := hub.Run("sh", "-c", "awk '$2 ~ /:0004$/ && $5 !~ /:00000000$/' /proc/self/net/raw")
		daemons[0].Signal(syscall.SIGCONT)
		return err != nil && queued == "" && daemons[0].Drops("reverse-path") >= before+3
	})
	awaitBypassed(t, hub, true, "10.11.0.1")
}

// A tunnel of another process with the same local address keeps its packets: refused ones reach it.
func TestManyFast_besideProcess(t *testing.T) {
	t.Parallel()
	hub, spoke, _ := fastMesh(t, 1)
	other := netlab.New(t)
	netlab.Veth(t, hub, other, netlab.End{Name: "port9"}, netlab.End{Name: "veth0", Address: "192.0.2.99/24"})
	hub.Run("ip", "link", "set", "port9", "master", "br0", "up")
	variants[0].upAs(t, hub, "t9", "--local-address", outerOf(1), "--remote-address", outerOf(99), "--address", "10.253.0.1/24")
	variants[0].upAs(t, other, "t9", "--local-address", outerOf(99), "--remote-address", outerOf(1), "--address", "10.253.0.99/24")
	netlab.Eventually(t, "the other tunnel carries packets", func() bool { return answered(hub, "10.253.0.99") })
	awaitBypassed(t, hub, true, "10.11.0.1")
	ping(t, spoke[0], "-I", "10.11.0.1", "10.10.0.1")
}

// received returns how many packets an interface's process has written to it.
func received(t *testing.T, ns *netlab.NS, name string) uint64 {
	t.Helper()
	var n uint64
	if _, err := fmt.Sscan(ns.Run("sh", "-c", "ip -s link show dev "+name+" | awk '/RX:/{getline; print $2}'"), &n); err != nil {
		t.Fatal(err)
	}
	return n
}
