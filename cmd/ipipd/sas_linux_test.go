package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// awaitNegotiated waits until no more messages of a negotiation come: both ends may begin one.
func awaitNegotiated(t *testing.T, w *netlab.ESPWire) (seen netlab.ESPSeen) {
	t.Helper()
	netlab.Eventually(t, "the negotiations of both ends are over", func() bool {
		before := w.Seen()
		time.Sleep(2 * time.Second)
		seen = w.Seen()
		return seen.Negotiating == before.Negotiating
	})
	return seen
}

// The SAs outlive their process (with one remote and IKEv2: TestKeeper_stream): no packet is lost but those that a killed
// process has read, none is plain, none repeats a sequence number, and nothing is negotiated but rekeyings that are due.
func TestKeeper_SAs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	one := []string{"--remote-address", "192.0.2.2", "--address", "10.255.0.1/30"}
	many := []string{"--remote-address", "any", "--local-address", "192.0.2.1", "--address", "10.255.0.1/32", "--peers", "10.255.0.2/32=192.0.2.2"}
	for _, c := range []struct {
		name, exchange, lifetime string
		near                     []string
		ends                     []unix.Signal
	}{
		{"main", "main", "30m", one, []unix.Signal{unix.SIGUSR2, unix.SIGKILL}},
		{"rekey", "ike2", "10s,10s", one, []unix.Signal{unix.SIGKILL}},
		{"many", "ike2", "30m", many, []unix.Signal{unix.SIGUSR2, unix.SIGKILL}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := netlab.New(t), netlab.New(t)
			netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
			w := netlab.WatchESP(t, b, "eth0", "192.0.2.2")
			dir := shortDir(t)
			secret := []string{"--ipsec-exchange", c.exchange, "--ipsec-lifetime", c.lifetime, "--ipsec-secret", "correct horse battery staple"}
			// With many remotes it begins no negotiation, so that there is one, and not one from each end at once.
			far := exec.Command("ipipd", append([]string{"up", "--remote-address", "any", "--local-address", "192.0.2.2", "--name", "far",
				"--address", "10.255.0.2/32", "--peers", "10.255.0.1/32=192.0.2.1", "--runtime-dir", filepath.Join(dir, "far")}, secret...)...)
			b.Start(far)
			command := append([]string{"ipipd", "up", "--name", "near", "--runtime-dir", filepath.Join(dir, "near")}, c.near...)
			k := startKept(t, func(cmd *exec.Cmd) (err error) { a.Do(func() { err = cmd.Start() }); return err }, append(command, secret...)...)
			awaitProcess(t, k, 1)
			netlab.Eventually(t, "a ping is answered", func() bool {
				_, err := a.Try("ping", "-c", "1", "-W", "1", "10.255.0.2")
				return err == nil
			})
			first := awaitNegotiated(t, w)
			stop := make(chan struct{})
			out := newStream(t, a, b, "10.255.0.1:5000", "10.255.0.2:5001", stop)
			in := newStream(t, b, a, "10.255.0.2:6000", "10.255.0.1:6001", stop)
			killed, n := 0, 1
			for _, end := range c.ends {
				for range keptRestarts() {
					time.Sleep(steady + 200*time.Millisecond) // so that it is started again at once
					if end == unix.SIGKILL {
						_ = unix.Kill(awaitProcess(t, k, n), end)
						killed++
					} else {
						k.signal(end)
					}
					n++
					awaitProcess(t, k, n)
				}
			}
			if c.name == "rekey" {
				netlab.Eventually(t, "there is a third pair of SAs", func() bool { return w.Seen().SPIs >= 6 })
			}
			close(stop)
			for name, s := range map[string]*stream{"out": out, "in": in} {
				lost, twice := s.lost()
				near, far := queueDrops(t, a, b)
				t.Logf("%s: %d sent, %d lost, %d twice, gap %v, %d restarts, %d of them kill -9", name, s.sent, lost, twice, s.gap, n-1, killed)
				if lost > killed*aBatch+near+far || s.sent < 500 {
					t.Errorf("%s: %d of %d are lost", name, lost, s.sent)
				}
			}
			seen := w.Seen()
			t.Logf("%+v, %d messages of IKE at the start", seen, first.Negotiating)
			if seen.Repeated != 0 || seen.Plain != 0 || seen.ESP < 1000 {
				t.Errorf("%+v", seen)
			}
			if c.name != "rekey" && (seen.Negotiating != first.Negotiating || seen.SPIs != first.SPIs) {
				t.Errorf("%+v, at the start %+v", seen, first)
			}
			if got := strings.Count(k.log.String(), "by the SAs of the process before"); got != n-1 {
				t.Errorf("%d processes go on with SAs, want %d", got, n-1)
			}
			// A process that ends for good deletes its SAs at the peer, too.
			k.signal(unix.SIGTERM)
			k.ends(0)
			netlab.Eventually(t, "the peer has no SA", func() bool {
				text, err := b.Try("ipipd", "print", "far", "--runtime-dir", filepath.Join(dir, "far"))
				return err == nil && strings.Contains(text, "SAs with 0 of 1 remotes")
			})
		})
	}
}

// With another secret, or after damage, new SAs are negotiated, and a line says why.
func TestKeeper_SAsNotRestored(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	t.Parallel()
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	dir := shortDir(t)
	secret := []string{"--ipsec-exchange", "ike2", "--ipsec-secret", "correct horse battery staple"}
	far := exec.Command("ipipd", append([]string{"up", "--remote-address", "192.0.2.1", "--name", "far", "--address", "10.255.0.2/30", "--runtime-dir", filepath.Join(dir, "far")}, secret...)...)
	b.Start(far)
	config := filepath.Join(dir, "near.yaml")
	write := func(phase2 string) {
		text := fmt.Sprintf("tunnels:\n  - name: near\n    remote-address: 192.0.2.2\n    address: 10.255.0.1/30\n    ipsec-exchange: ike2\n    ipsec-secret: correct horse battery staple\n    ipsec-phase2: %s\n", phase2)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("aes256gcm16")
	k := startKept(t, func(cmd *exec.Cmd) (err error) { a.Do(func() { err = cmd.Start() }); return err },
		"ipipd", "up", "--config", config, "--runtime-dir", filepath.Join(dir, "near"))
	pid := awaitProcess(t, k, 1)
	established := func(n int) {
		netlab.Eventually(t, "SAs are established", func() bool {
			return len(regexp.MustCompile(`packets are encrypted: `).FindAllString(k.log.String(), -1)) == n
		})
	}
	established(1)
	time.Sleep(steady)
	write("aes128gcm16")
	_ = unix.Kill(pid, unix.SIGKILL)
	awaitProcess(t, k, 2)
	established(2)
	k.logs(`level=WARN msg="the SAs of the process before are not used, and new ones are negotiated: ipsec-phase2 was another one"`)
	k.signal(unix.SIGTERM)
	k.ends(0)
}
