package conformance

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// peerConfig returns what peer-config prints for d's tunnel, without the lines on standard error.
func peerConfig(t *testing.T, d *netlab.Daemon, system string) string {
	t.Helper()
	out, err := d.Run("peer-config", "t0", "--for", system, "--show-sensitive")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var b strings.Builder
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "ipipd: ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// The other end comes up with the output of peer-config, as YAML and in RouterOS's syntax, and answers a ping
// and the keepalive, encrypted or not.
func TestPeerConfig_otherEnd(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{
		"plain":          {"--address", innerA + "/30"},
		"point-to-point": {"--address", innerA + " peer " + innerB, "--keepalive-probe", "echo", "--keepalive-target", innerB},
		"subnet":         {"--address", innerA + "/24", "--keepalive-probe", "echo", "--keepalive-target", innerB, "--mtu", "1300"},
		"encrypted":      {"--address", innerA + "/30", "--ipsec-secret", `mellon "mellon" #mellon`},
	} {
		for system, file := range map[string]string{"ipipd": "t0.yaml", "mikrotik": "t0.rsc"} {
			t.Run(name+"-"+system, func(t *testing.T) {
				t.Parallel()
				a, b := hosts(t)
				d := netlab.Up(t, a, "t0", append([]string{"--remote-address", outerB, "--keepalive", "1s,5"}, flags...)...)
				file := filepath.Join(t.TempDir(), file)
				if err := os.WriteFile(file, []byte(peerConfig(t, d, system)), 0o600); err != nil {
					t.Fatal(err)
				}
				other := netlab.UpConfig(t, b, "t0", file)
				netlab.Eventually(t, "both ends hear each other", func() bool {
					return d.Status().KeepaliveState == "up" && other.Status().KeepaliveState == "up"
				})
				ping(t, a, innerB)
				ping(t, b, innerA)
			})
		}
	}
}

// iproute2 and nftables take each command: only those that need the ipip module, or the interface that it
// makes, may fail where there is none.
func TestPeerConfig_linux(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	for name, flags := range map[string][]string{
		"plain":   {"--address", innerA + "/30", "--mtu", "1400"},
		"inherit": {"--address", innerA + " peer " + innerB, "--ttl", "inherit", "--dscp", "46"},
	} {
		t.Run(name, func(t *testing.T) {
			d := netlab.Up(t, a, "t0", append([]string{"--remote-address", outerB}, flags...)...)
			defer d.Stop(os.Interrupt)
			for line := range strings.Lines(peerConfig(t, d, "linux")) {
				if strings.HasPrefix(line, "#") {
					continue
				}
				if strings.HasPrefix(line, "nft ") {
					if _, err := exec.LookPath("nft"); err != nil {
						continue
					}
				}
				out, err := b.Try("sh", "-c", line)
				if err != nil && !strings.Contains(out, "No such device") && !strings.Contains(out, "Cannot find device") {
					t.Errorf("%s: %v: %s", line, err, out)
				}
			}
		})
	}
}

// systemd-networkd takes both files without a complaint about a key or a value.
func TestPeerConfig_networkd(t *testing.T) {
	t.Parallel()
	const networkd = "/lib/systemd/systemd-networkd"
	if _, err := os.Stat(networkd); err != nil {
		t.Skipf("needs systemd-networkd: %v", err)
	}
	a, b := hosts(t)
	d := netlab.Up(t, a, "t0", "--remote-address", outerB, "--address", innerA+" peer "+innerB, "--mtu", "1400", "--ttl", "inherit", "--dscp", "46")
	dir := t.TempDir()
	netdev, network, ok := strings.Cut(peerConfig(t, d, "networkd"), "# /etc/systemd/network/25-t0.network\n")
	if !ok {
		t.Fatalf("no .network: %s", netdev)
	}
	for name, text := range map[string]string{"25-t0.netdev": netdev, "25-t0.network": network} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// A /run and an /etc/systemd/network of its own, and no bus.
	const script = `mount -t tmpfs none /run && mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp &&
		cp "$0"/* /run/systemd/network/ && chmod -R a+rX /run/systemd && mount -t tmpfs none /etc/systemd/network || exit
		SYSTEMD_LOG_LEVEL=debug exec ` + networkd
	var log netlab.Buffer
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, dir)
	cmd.Stdout, cmd.Stderr = &log, &log
	b.Start(cmd)
	if !netlab.WaitFor(func() bool { return strings.Contains(log.String(), "Enumeration completed") }) {
		t.Skipf("systemd-networkd does not run here:\n%s", log.String())
	}
	out := log.String()
	if !strings.Contains(out, `t0: loaded "ipip"`) {
		t.Errorf("no netdev t0 of kind ipip:\n%s", out)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "/25-t0.") && !strings.Contains(line, "found") {
			t.Errorf("%s", line)
		}
	}
}
