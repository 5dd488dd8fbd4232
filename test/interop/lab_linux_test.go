package interop

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// The outer and inner addresses of the two ends, in every test.
const (
	ourOuter  = "192.0.2.1"
	peerOuter = "192.0.2.2"
	ourInner  = "10.255.0.1"
	peerInner = "10.255.0.2"
	narrowMTU = 1400          // of the link between the routers of newNarrowLab
	innerMTU  = 1480          // of a tunnel over an underlay of 1500
	fullSize  = innerMTU - 28 // bytes of a ping that fills the MTU
	manyFrags = 8000          // bytes of a ping that needs several fragments
	bulkBytes = 32 << 20
)

// bulkTimeout is the timeout of a transfer.
func bulkTimeout() time.Duration { return 2 * netlab.Timeout() }

func TestMain(m *testing.M) { netlab.Main(m, 2) }

// shell runs a shell script at one end of the tunnel, in a namespace or a guest, and returns
// its standard output.
type shell func(script string) (stdout string, err error)

func inNamespace(ns *netlab.NS) shell {
	return func(script string) (string, error) {
		out, err := ns.Try("timeout", netlab.Seconds(4*netlab.Timeout()), "sh", "-c", script)
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return out, err
	}
}

// kernelLab is a link between our end, a namespace, and a guest, whose kernel is the other end
// of the tunnel:
//
//	ours                         spare namespace       guest
//	eth0 192.0.2.1/24 ── veth ── guest0 ══════════════ vec0 192.0.2.2/24
//	t0   10.255.0.1/30           IP-in-IP              t0   10.255.0.2/30
type kernelLab struct {
	ours  *netlab.NS
	guest *netlab.Guest
}

func newKernelLab(t testing.TB) *kernelLab {
	t.Helper()
	ours, spare := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, spare, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "guest0"})
	guest := netlab.StartGuest(t, spare, "guest0", netlab.GuestOptions{Address: peerOuter + "/24", Modules: netlab.ModulesIPIP})
	return &kernelLab{ours: ours, guest: guest}
}

// newTapLab returns a kernelLab without a veth: eth0 is a TAP that is the guest's NIC.
func newTapLab(t *testing.T) *kernelLab {
	t.Helper()
	ours := netlab.New(t)
	if out, err := ours.Try("ip", "tuntap", "add", "dev", "eth0", "mode", "tap", "vnet_hdr"); err != nil {
		t.Skipf("needs /dev/net/tun: %s", out)
	}
	ours.Run("ip", "address", "add", ourOuter+"/24", "dev", "eth0")
	ours.Run("ip", "link", "set", "dev", "eth0", "up")
	guest := netlab.StartGuest(t, ours, "eth0", netlab.GuestOptions{Address: peerOuter + "/24", Transport: "tap", Modules: netlab.ModulesIPIP})
	return &kernelLab{ours: ours, guest: guest}
}

// newNarrowLab returns a kernelLab with two routers and a link of a lower MTU between them:
//
//	ours 192.0.2.1 ── .11 near .12 ──1400── .13 far .14 ── spare ══ 192.0.2.2 guest
func newNarrowLab(t *testing.T) *kernelLab {
	t.Helper()
	ours, near, far, spare := netlab.New(t), netlab.New(t), netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, near, netlab.End{Name: "eth0", Address: ourOuter + "/32"}, netlab.End{Name: "eth0", Address: "192.0.2.11/32"})
	netlab.Veth(t, near, far, netlab.End{Name: "eth1", Address: "192.0.2.12/32", MTU: narrowMTU}, netlab.End{Name: "eth1", Address: "192.0.2.13/32", MTU: narrowMTU})
	netlab.Veth(t, far, spare, netlab.End{Name: "eth0", Address: "192.0.2.14/32"}, netlab.End{Name: "guest0"})
	route := func(ns *netlab.NS, to, via, device string) {
		ns.Run("ip", "route", "add", to, "via", via, "dev", device, "onlink")
	}
	route(ours, "default", "192.0.2.11", "eth0")
	route(near, ourOuter, ourOuter, "eth0")
	route(near, peerOuter, "192.0.2.13", "eth1")
	route(far, ourOuter, "192.0.2.12", "eth1")
	route(far, peerOuter, peerOuter, "eth0")
	near.Sysctl("net.ipv4.ip_forward", "1")
	far.Sysctl("net.ipv4.ip_forward", "1")
	guest := netlab.StartGuest(t, spare, "guest0", netlab.GuestOptions{Address: peerOuter + "/32", Modules: netlab.ModulesIPIP})
	guest.MustRun("ip route add default via 192.0.2.14 dev vec0 onlink")
	return &kernelLab{ours: ours, guest: guest}
}

// record captures eth0, without bulk TCP in the tunnel.
func (l *kernelLab) record(t *testing.T) *netlab.Recorder {
	t.Helper()
	return netlab.Capture(t, l.ours, "eth0", func(f netlab.Frame) bool {
		return netlab.Match(f.Packet, netlab.Inner(netlab.Protocol(ipv4.ProtocolTCP))) != nil
	})
}

// tunnel creates or replaces the guest's end of the tunnel, with more options of `ip link add type ipip`.
func (l *kernelLab) tunnel(t testing.TB, options string) {
	t.Helper()
	_, err := l.guest.Run(fmt.Sprintf(`ip link delete t0 2>/dev/null
		set -e
		ip link add t0 type ipip local %s remote %s %s
		ip address add %s/30 dev t0
		ip link set t0 up`, peerOuter, ourOuter, options, peerInner))
	if err != nil {
		t.Fatal(err)
	}
}

// socat starts socat as an end of the tunnel in a namespace, and returns a function that kills
// it.
func socat(t testing.TB, ns *netlab.NS, local, remote, inner string) (end func()) {
	t.Helper()
	if _, err := exec.LookPath("socat"); err != nil {
		t.Skip("needs socat (package socat)")
	}
	cmd := exec.Command("socat", fmt.Sprintf("TUN:%s/30,tun-name=t0,iff-up,iff-no-pi", inner), fmt.Sprintf("IP4-DATAGRAM:%s:4,bind=%s", remote, local))
	ns.Start(cmd)
	netlab.Eventually(t, "socat has made its interface", func() bool {
		out, err := ns.Try("ip", "address", "show", "dev", "t0", "up")
		return err == nil && strings.Contains(out, inner)
	})
	ns.Run("ip", "link", "set", "dev", "t0", "mtu", fmt.Sprint(innerMTU))
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// up starts our end of the tunnel. Keepalive and the fast path are off unless args turn them
// on.
func up(t testing.TB, ns *netlab.NS, args ...string) *netlab.Daemon {
	t.Helper()
	args = append([]string{"--local-address", ourOuter, "--remote-address", peerOuter, "--address", ourInner + "/30", "--keepalive", "off"}, args...)
	if !slices.Contains(args, "--allow-fast-path") {
		args = append(args, "--allow-fast-path", "no")
	}
	return netlab.Up(t, ns, "t0", args...)
}

// awaitRunning waits until the tunnel is running, or not, and its keepalive-state has a text.
func awaitRunning(t *testing.T, d *netlab.Daemon, running bool, state string) {
	t.Helper()
	netlab.Eventually(t, fmt.Sprintf("running is %v and keepalive-state has %q", running, state), func() bool {
		s := d.Status()
		return s.Running == running && strings.Contains(s.KeepaliveState, state)
	})
}

// sent and received match outer packets from and to our end.
func sent(checks ...netlab.Check) netlab.Check {
	return netlab.Outer(append([]netlab.Check{netlab.Source(ourOuter), netlab.Destination(peerOuter)}, checks...)...)
}

func received(checks ...netlab.Check) netlab.Check {
	return netlab.Outer(append([]netlab.Check{netlab.Source(peerOuter), netlab.Destination(ourOuter)}, checks...)...)
}

// request and reply match the inner packets of pings.
func request(checks ...netlab.Check) netlab.Check {
	return netlab.Inner(append([]netlab.Check{netlab.ICMP(8, 0)}, checks...)...)
}

func reply(checks ...netlab.Check) netlab.Check {
	return netlab.Inner(append([]netlab.Check{netlab.ICMP(0, 0)}, checks...)...)
}

// ping fails the test unless three echo requests with size bytes of data are answered, each repeated every second until it
// is: a kernel drops a reply now and then, see netlab.Stream. A small one before resolves the neighbour.
func ping(t *testing.T, from shell, to string, size int, options string) {
	t.Helper()
	script := fmt.Sprintf(`ping -n -c 1 -w %[4]s %[1]s >/dev/null
		for i in 1 2 3; do ping -n -c 1 -w %[4]s -s %[2]d %[3]s %[1]s || exit 1; done`, to, size, options, netlab.Seconds(netlab.Timeout()))
	if out, err := from(script); err != nil {
		t.Errorf("ping %s -s %d %s: %v\n%s", to, size, options, err, out)
	}
}

// bulk transfers bulkBytes by TCP from client to server, or back if reverse is set, and
// returns the goodput in Gb/s. It takes a second or two; with a PMTU black hole it stalls
// until bulkTimeout.
func bulk(t testing.TB, client, server shell, serverAddress string, reverse bool) (gbps float64) {
	t.Helper()
	requireIperf(t)
	direction := ""
	if reverse {
		direction = "-R"
	}
	// A new port each time: the previous server may still listen. In /proc/net/tcp ports are
	// hexadecimal, and state 0A is LISTEN.
	port := 5200 + bulkCount.Add(1)
	serve := fmt.Sprintf(`timeout %s iperf3 -s -1 -B %s -p %d >/dev/null 2>&1 </dev/null &
		until grep -q ':%04X .* 0A ' /proc/net/tcp; do sleep 0.05; done`, netlab.Seconds(bulkTimeout()+netlab.Timeout()), serverAddress, port, port)
	if _, err := server(serve); err != nil {
		t.Fatal(err)
	}
	out, err := client(fmt.Sprintf("timeout %s iperf3 --json -c %s -p %d -n %d %s", netlab.Seconds(bulkTimeout()), serverAddress, port, bulkBytes, direction))
	var result struct {
		Error string
		End   struct {
			Received struct {
				Bytes int64
				Bits  float64 `json:"bits_per_second"`
			} `json:"sum_received"`
			Sent struct{ Retransmits int } `json:"sum_sent"`
		}
	}
	if jsonErr := json.Unmarshal([]byte(out), &result); jsonErr != nil || err != nil || result.Error != "" {
		t.Fatalf("bulk TCP to %s %s stalled or failed: %v %v\n%s", serverAddress, direction, err, jsonErr, out[max(0, len(out)-500):])
	}
	// iperf3 does not count bytes that are still in the socket buffers (up to 6 MiB each).
	if got := result.End.Received.Bytes; got < bulkBytes/2 {
		t.Errorf("bulk TCP to %s %s: %d of %d bytes arrived", serverAddress, direction, got, bulkBytes)
	}
	gbps = result.End.Received.Bits / 1e9
	t.Logf("bulk TCP to %s %s: %.2f Gb/s, %d retransmissions", serverAddress, direction, gbps, result.End.Sent.Retransmits)
	return gbps
}

// bulkCount counts the transfers, to choose ports.
var bulkCount atomic.Uint32

func requireIperf(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Skip("needs iperf3 (package iperf3)")
	}
}
