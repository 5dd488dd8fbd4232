package interop

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// newStrongSwanLab returns a kernelLab whose guest runs strongSwan with the example of
// docs/encryption.md, changed by edit, and has its end of the tunnel.
func newStrongSwanLab(t *testing.T, edit *strings.Replacer) (*kernelLab, *netlab.StrongSwan) {
	t.Helper()
	ours, spare := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, spare, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "guest0"})
	s := netlab.StartStrongSwan(t, spare, "guest0", peerOuter+"/24", edit.Replace(example(t, "connections {")))
	l := &kernelLab{ours: ours, guest: s.Guest}
	l.tunnel(t, "ttl 255")
	s.MustRun("ip link set t0 mtu 1438") // Linux does not see that ESP takes its share
	return l, s
}

// example returns the code block of docs/encryption.md that begins so, with the test's
// addresses.
func example(t *testing.T, beginning string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/encryption.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(text), "```text by TestIPsec_strongSwan\n"+beginning)
	block, _, closed := strings.Cut(block, "\n```")
	if !ok || !closed {
		t.Fatalf("docs/encryption.md has no example that begins with %q", beginning)
	}
	return strings.ReplaceAll(beginning+block, "198.51.100.1", peerOuter)
}

// secretFile writes the secret of that example to a file.
func secretFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("the line in /etc/ipipd/secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The example of docs/encryption.md and RouterOS's proposals: pings of every size, bulk TCP,
// rekeying under load, and a peer that crashes. No cleartext is ever on the wire.
func TestIPsec_strongSwan(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		edit  *strings.Replacer
		flags []string
		mtu   int
	}{
		{"docs", strings.NewReplacer(),
			[]string{"--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256"}, 1446},
		{"RouterOS's", strings.NewReplacer("version = 2", "version = 1", "aes256-sha256-ecp256", "aes128-sha1-modp2048", "aes256gcm16-ecp256", "aes256-sha1-modp1024"),
			nil, 1438},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l, s := newStrongSwanLab(t, tt.edit)
			netlab.DisableOffload(l.ours, "eth0") // the guest's driver takes no superpackets
			wire := netlab.Capture(t, l.ours, "eth0", func(f netlab.Frame) bool { return f.Packet[9] == 4 })
			d := up(t, l.ours, append([]string{"--ipsec-secret-file", secretFile(t), "--ipsec-lifetime", "1h," + netlab.Seconds(netlab.Scale(10*time.Second)) + "s", "--ipsec-dpd", "2s,3",
				"--keepalive", "1s,3", "--keepalive-probe", "echo", "--keepalive-target", peerInner}, tt.flags...)...)
			awaitRunning(t, d, true, "up")
			netlab.Eventually(t, "the MTU is what the SA leaves", func() bool { return d.Status().ActualMTU == tt.mtu })
			ours := inNamespace(l.ours)
			for _, size := range []int{0, 56, 1438 - 28, manyFrags} {
				ping(t, ours, peerInner, size, "")
				ping(t, s.Run, ourInner, size, "")
			}
			first := d.Status().IPsecSPI
			bulk(t, ours, s.Run, peerInner, false)
			bulk(t, ours, s.Run, peerInner, true)
			for end := time.Now().Add(netlab.Timeout()); d.Status().IPsecSPI == first && time.Now().Before(end); {
				bulk(t, s.Run, ours, ourInner, false)
			}
			if d.Status().IPsecSPI == first {
				t.Error("the keys were not replaced")
			}
			bulk(t, s.Run, ours, ourInner, false)

			s.Crash()
			awaitRunning(t, d, false, "")
			s.Charon()
			awaitRunning(t, d, true, "up")
			ping(t, ours, peerInner, 56, "")
			for reason, n := range d.Status().AllDrops() {
				if strings.HasPrefix(reason, "esp-") && reason != "esp-no-sa" {
					t.Errorf("%d packets are dropped: %s", n, reason)
				}
			}
			if cleartext := wire.Matching(); len(cleartext) > 0 {
				t.Errorf("on the wire: %s", netlab.Describe(cleartext[0].Packet))
			}
		})
	}
}
