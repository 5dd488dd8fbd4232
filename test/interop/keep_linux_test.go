package interop

import (
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"ipipd/test/netlab"
)

// nameOfSA matches what identifies an SA in `swanctl --list-sas --raw`.
var nameOfSA = regexp.MustCompile(`(?:uniqueid|initiator-spi|responder-spi|spi-in|spi-out)=[0-9a-f]+`)

// The SAs with strongSwan outlive a process that SIGUSR2 replaces, and one that is killed: strongSwan sees no negotiation, no packet
// is cleartext, none repeats a sequence number, and pings go on.
func TestKeep_strongSwan(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		edit  *strings.Replacer
		flags []string
	}{
		{"ike2", strings.NewReplacer(), []string{"--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256"}},
		{"main", strings.NewReplacer("version = 2", "version = 1", "aes256-sha256-ecp256", "aes128-sha1-modp2048", "aes256gcm16-ecp256", "aes256-sha1-modp1024"),
			[]string{"--ipsec-exchange", "main"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l, s := newStrongSwanLab(t, tt.edit)
			w := netlab.WatchESP(t, l.ours, "eth0", peerOuter)
			d := netlab.Keep(t, l.ours, "t0", append([]string{"--local-address", ourOuter, "--remote-address", peerOuter, "--address", ourInner + "/30",
				"--keepalive", "off", "--ipsec-secret-file", secretFile(t)}, tt.flags...)...)
			awaitRunning(t, d, true, "")
			ping(t, inNamespace(l.ours), peerInner, 56, "")
			sas := func() string { return strings.Join(nameOfSA.FindAllString(s.Swanctl("--list-sas --raw"), -1), " ") }
			before := sas()
			begun := w.Seen().Negotiating
			if strings.Count(before, "spi-in") != 1 || begun < 4 {
				t.Fatalf("strongSwan has the SAs %q, after %d messages", before, begun)
			}

			var out netlab.Buffer
			pings := exec.Command("ping", "-n", "-i", "0.05", peerInner)
			pings.Stdout = &out
			l.ours.Start(pings)
			replies := func() int { return strings.Count(out.String(), "icmp_seq=") }
			child, killed := d.Child(), 0
			for _, end := range []syscall.Signal{syscall.SIGUSR2, syscall.SIGKILL, syscall.SIGUSR2, syscall.SIGKILL} {
				n := replies()
				netlab.Eventually(t, "pings are answered", func() bool { return replies() > n+20 })
				if end == syscall.SIGKILL {
					_ = syscall.Kill(child, end)
					killed++
				} else {
					d.Signal(end)
				}
				child = d.AwaitSuccessor(child)
			}
			n := replies()
			netlab.Eventually(t, "pings are answered by the last process", func() bool { return replies() > n+20 })
			_ = pings.Process.Signal(syscall.SIGINT)
			netlab.Eventually(t, "ping says what it has sent", func() bool { return strings.Contains(out.String(), "packets transmitted") })

			answered := map[int]bool{}
			for _, m := range regexp.MustCompile(`icmp_seq=(\d+)`).FindAllStringSubmatch(out.String(), -1) {
				n, _ := strconv.Atoi(m[1])
				answered[n] = true
			}
			last := 0
			for n := range answered {
				last = max(last, n)
			}
			var lost []int // the last ones may be on their way
			for n := 1; n <= last; n++ {
				if !answered[n] {
					lost = append(lost, n)
				}
			}
			seen := w.Seen()
			t.Logf("%d pings, %d lost: %v; %+v, %d messages of IKE at the start", last, len(lost), lost, seen, begun)
			if len(lost) > 2*killed { // what a killed process has read and not sent yet
				t.Errorf("%d pings are lost: %v", len(lost), lost)
			}
			if seen.ESP < last || seen.Repeated != 0 || seen.Plain != 0 || seen.Negotiating != begun {
				t.Errorf("%+v, after %d messages of IKE at the start", seen, begun)
			}
			if after := sas(); after != before {
				t.Errorf("strongSwan has the SAs %q, had %q", after, before)
			}
			for reason, n := range d.Status().AllDrops() {
				if strings.HasPrefix(reason, "esp-") {
					t.Errorf("%d packets are dropped: %s", n, reason)
				}
			}
			replayed, err := s.Run("cat /proc/net/xfrm_stat")
			if m := regexp.MustCompile(`XfrmInStateSeqError\s+(\d+)`).FindStringSubmatch(replayed); err != nil || m == nil || m[1] != "0" {
				t.Errorf("strongSwan's kernel has dropped packets as replayed: %v, %v", m, err)
			}
		})
	}
}
