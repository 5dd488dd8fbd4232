package main

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// wire is what an encrypted tunnel sends, in both directions.
type wire struct {
	mu    sync.Mutex
	esp   map[[16]byte]int // packets by addresses, SPI and sequence number
	spis  map[uint32]bool
	plain int
	ike   map[byte]int // messages by exchange
}

func watchWire(t *testing.T, ns *netlab.NS, device string) *wire {
	w := &wire{esp: map[[16]byte]int{}, spis: map[uint32]bool{}, ike: map[byte]int{}}
	netlab.Capture(t, ns, device, func(f netlab.Frame) bool {
		p := f.Packet
		if len(p) < 28 {
			return false
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		switch b := p[20:]; p[9] {
		case 50:
			w.spis[binary.BigEndian.Uint32(b)] = true
			w.esp[[16]byte(append(append([]byte(nil), p[12:20]...), b[:8]...))]++
		case 4:
			w.plain++
		case 17:
			if len(b) >= 8+28 && binary.BigEndian.Uint16(b[2:]) == 500 {
				w.ike[b[8+18]]++
			}
		}
		return false
	})
	return w
}

// repeated is how many packets have the SPI and sequence number of another one.
func (w *wire) repeated() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, times := range w.esp {
		n += times - 1
	}
	return n
}

func (w *wire) count() (esp, plain, negotiating int, spis int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for exchange, n := range w.ike {
		if exchange != 5 && exchange != 37 { // informational: DPD
			negotiating += n
		}
	}
	return len(w.esp), w.plain, negotiating, len(w.spis)
}

// keptRestarts is how often a process ends in the tests of its SAs.
func keptRestarts() int {
	n, _ := strconv.Atoi(os.Getenv("IPIPD_TEST_RESTARTS"))
	return cmp.Or(n, 2)
}

// The SAs outlive the process that has them: no packet is lost but those that a killed one has read, none is
// plain, none repeats a sequence number, and nothing is negotiated but what is due.
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
		{"ike2", "ike2", "30m", one, []unix.Signal{unix.SIGUSR2, unix.SIGKILL}},
		{"rekey", "ike2", "10s,10s", one, []unix.Signal{unix.SIGKILL}},
		{"many", "ike2", "30m", many, []unix.Signal{unix.SIGUSR2, unix.SIGKILL}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := netlab.New(t), netlab.New(t)
			netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
			w := watchWire(t, b, "eth0")
			dir := shortDir(t)
			secret := []string{"--ipsec-exchange", c.exchange, "--ipsec-lifetime", c.lifetime, "--ipsec-secret", "correct horse battery staple"}
			// With many remotes it begins no negotiation: there is one, and not one of each end at once.
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
			_, _, begun, first := w.count()
			netlab.Eventually(t, "the negotiations of both ends are over", func() bool {
				before := begun
				time.Sleep(2 * time.Second)
				_, _, begun, first = w.count()
				return begun == before
			})
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
				netlab.Eventually(t, "there is a third pair of SAs", func() bool { _, _, _, spis := w.count(); return spis >= 6 })
			}
			close(stop)
			for name, s := range map[string]*stream{"out": out, "in": in} {
				lost, twice := s.lost()
				t.Logf("%s: %d sent, %d lost, %d twice, gap %v, %d restarts, %d of them kill -9", name, s.sent, lost, twice, s.gap, n-1, killed)
				if lost > killed*10+s.overflow() || s.sent < 500 {
					t.Errorf("%s: %d of %d are lost", name, lost, s.sent)
				}
			}
			esp, plain, negotiating, spis := w.count()
			t.Logf("%d ESP packets, %d SPIs, %d messages of IKE that negotiate, %d of them at the start", esp, spis, negotiating, begun)
			if repeated := w.repeated(); repeated != 0 || plain != 0 || esp < 1000 {
				t.Errorf("of %d packets %d repeat a sequence number, %d are plain", esp, repeated, plain)
			}
			if c.name != "rekey" && (negotiating != begun || spis != first) {
				t.Errorf("%d messages negotiate, %d at the start; %d SPIs, %d at the start", negotiating, begun, spis, first)
			}
			if got := strings.Count(k.log.String(), "by the SAs of the process before"); got != n-1 {
				t.Errorf("%d processes go on with SAs, want %d", got, n-1)
			}
			// A real end is one for the peer, too.
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
