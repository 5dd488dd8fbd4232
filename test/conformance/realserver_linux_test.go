package conformance

import (
	"maps"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// vip is on the link of server and balancer, so that ARP matters.
const vip = "192.0.2.5"

// realServer returns a server, and a balancer that is its router and sends health checks through the tunnel
// to the server. Clients are behind the balancer: 10.11.0.0/16.
func realServer(t *testing.T) (server, balancer *netlab.NS) {
	t.Helper()
	server, spoke := mesh(t, 1)
	balancer = spoke[0]
	server.Run("ip", "route", "add", "default", "via", outerOf(11))
	netlab.Up(t, balancer, "t0", "--local-address", outerOf(11), "--remote-address", outerOf(1), "--keepalive", "off")
	balancer.Run("ip", "route", "add", vip, "dev", "t0", "src", "10.11.0.1")
	return server, balancer
}

// upRealServer starts the server's tunnel.
func upRealServer(t *testing.T, server *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return netlab.Up(t, server, "ipip0", realServerFlags(more...)...)
}

func realServerFlags(more ...string) []string {
	return append([]string{"--remote-address", "any", "--accept-from", outerOf(11) + ",172.16.0.0/12", "--accept-to", vip}, more...)
}

// The address that a real server serves is on lo or on the interface. Answers leave by the underlay, and the
// host answers health checks that come through the tunnel.
func TestRealServer_answers(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"lo", "ipip0"} {
		t.Run(where, func(t *testing.T) {
			server, balancer := realServer(t)
			var more []string
			if where == "lo" {
				server.Run("ip", "address", "add", vip+"/32", "dev", "lo")
			} else {
				more = []string{"--address", vip + "/32"}
			}
			server.Sysctl("net.ipv4.conf.br0.arp_ignore", "1")
			server.Sysctl("net.ipv4.conf.br0.arp_announce", "2")
			server.Run("ip", "route", "change", "default", "via", outerOf(11), "advmss", "1440")
			for _, of := range []string{"all", "default"} {
				server.Sysctl("net.ipv4.conf."+of+".rp_filter", map[string]string{"lo": "0", "ipip0": "2"}[where])
			}
			server.Run("ethtool", "-K", "br0", "tx", "off")
			server.Run("ethtool", "-K", "port0", "tx", "off")
			d := upRealServer(t, server, more...)
			answers := netlab.Capture(t, balancer, "veth0", func(f netlab.Frame) bool { return !f.Outgoing })
			ping(t, balancer, vip)
			answers.Await(netlab.Protocol(1), netlab.Source(vip), netlab.ICMP(0, 0))

			// A check by TCP, with a SYN-ACK of that MSS.
			listener := exec.Command("socat", "TCP-LISTEN:80,fork,reuseaddr", "SYSTEM:echo alive")
			server.Start(listener)
			netlab.Eventually(t, "a TCP check is answered", func() bool {
				out, _ := balancer.Try("sh", "-c", "socat -T5 - TCP:"+vip+":80 </dev/null")
				return strings.Contains(out, "alive")
			})
			answers.Await(netlab.Source(vip), syn(0x12, 1440))
			if n := len(answers.Matching(netlab.Protocol(4))); n > 0 {
				t.Errorf("%d answers are encapsulated", n)
			}
			s := d.Status()
			if s.TxPacket != 0 {
				t.Errorf("%d packets are sent", s.TxPacket)
			}
			if len(s.Warnings) > 0 {
				t.Errorf("%+v", s.Warnings)
			}
		})
	}
}

// sysctls returns all of net.ipv4.conf that --manage-sysctls may set, but for those of tunnels.
func sysctls(t *testing.T, ns *netlab.NS) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(ns.Run("sysctl", "-a", "-r", `^net\.ipv4\.conf\..*\.(rp_filter|arp_ignore|arp_announce)$`)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " = "); ok && !strings.Contains(name, ".ipip") {
			all[name] = value
		}
	}
	return all
}

// A host as distributions set it up says at the start what is wrong, with commands that mend it.
func TestRealServer_warnings(t *testing.T) {
	t.Parallel()
	server, balancer := realServer(t)
	for _, of := range []string{"all", "default"} {
		server.Sysctl("net.ipv4.conf."+of+".rp_filter", "2")
	}
	d := upRealServer(t, server)
	d.AwaitWarning(warning.VIPMissing)
	server.Run("ip", "address", "add", vip+"/32", "dev", "lo")
	for _, code := range []warning.Code{warning.RPFilterTunnel, warning.VIPAnswered, warning.SYNACKMSS} {
		remedy := d.AwaitWarning(code).Remedy
		command := remedy[max(strings.LastIndex(remedy, "sysctl -w"), 0):]
		if code == warning.SYNACKMSS {
			command, _, _ = strings.Cut(command, "; or")
		}
		command, _, _ = strings.Cut(command, ", which")
		if answered(balancer, vip) && code == warning.RPFilterTunnel {
			t.Error("it is answered without: the warning is wrong")
		}
		server.Run("sh", "-ec", command)
		d.AwaitNoWarning(code)
	}
	d.AwaitNoWarning(warning.VIPMissing)
	ping(t, balancer, vip)
}

// With --manage-sysctls ipipd sets the sysctls that a real server needs, and sets them back, however it ends.
func TestRealServer_manageSysctls(t *testing.T) {
	t.Parallel()
	server, balancer := realServer(t)
	server.Run("ip", "address", "add", vip+"/32", "dev", "lo")
	for _, of := range []string{"all", "default"} {
		server.Sysctl("net.ipv4.conf."+of+".rp_filter", "1")
	}
	before := sysctls(t, server)
	back := func() bool { return maps.Equal(sysctls(t, server), before) }
	d := upRealServer(t, server, "--manage-sysctls")
	ping(t, balancer, vip)
	for _, code := range []warning.Code{warning.RPFilterTunnel, warning.VIPAnswered, warning.SysctlNotSet} {
		d.AwaitNoWarning(code)
	}
	if got := sysctls(t, server); got["net.ipv4.conf.br0.arp_ignore"] != "1" || got["net.ipv4.conf.br0.rp_filter"] != "1" {
		t.Errorf("%v: want br0 without ARP for %s, and with its filter", got, vip)
	}
	// If the process is killed, the next one sets them back.
	d.Stop(syscall.SIGKILL)
	if back() {
		t.Error("nothing was set")
	}
	d = d.Restart()
	ping(t, balancer, vip)
	d.Stop(syscall.SIGTERM)
	if !back() {
		t.Errorf("%v: want %v", sysctls(t, server), before)
	}
	// So does a process that manages none.
	d = d.Restart()
	d.Stop(syscall.SIGKILL)
	dir := filepath.Dir(d.Socket())
	cmd := exec.Command(netlab.Binary(t), "up", "--name", "ipip9", "--remote-address", outerOf(11), "--runtime-dir", dir)
	server.Start(cmd)
	netlab.Eventually(t, "they are set back", back)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// A sysctl that somebody else has changed stays.
	d = d.Restart()
	server.Sysctl("net.ipv4.conf.br0.arp_ignore", "2")
	d.Stop(syscall.SIGTERM)
	before["net.ipv4.conf.br0.arp_ignore"] = "2"
	if !back() {
		t.Errorf("%v: want %v", sysctls(t, server), before)
	}
}

// In a container /proc/sys is read-only: ipipd logs one line, and the tunnel runs.
func TestRealServer_readOnly(t *testing.T) {
	t.Parallel()
	server, _ := realServer(t)
	server.Run("ip", "address", "add", vip+"/32", "dev", "lo")
	dir := t.TempDir()
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-ec", `mount -t proc -o ro none /proc; exec "$@"`, "sh", netlab.Binary(t), "up",
		"--name", "ipip0", "--runtime-dir", dir, "--manage-sysctls"}, realServerFlags()...)...)
	server.Start(cmd)
	netlab.Eventually(t, "it says so", func() bool {
		out, _ := server.Try(netlab.Binary(t), "print", "--json", "--runtime-dir", dir, "ipip0")
		return strings.Count(out, "sysctl-not-set") == 1 && strings.Contains(out, "/proc/sys is read-only here") && strings.Contains(out, "vip-answered")
	})
}
