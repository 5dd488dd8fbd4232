package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// stream sends numbered packets, 2,000 a second on an idle machine, until stop is closed, and reports how many arrive
// and the longest gap between two.
type stream struct {
	from, to net.Conn
	sent     uint32
	all      atomic.Bool // sent is what is sent
	seen     map[uint32]int
	gap      time.Duration
	over     int // see overflow
	done     sync.WaitGroup
}

func newStream(t *testing.T, from, to *netlab.NS, source, destination string, stop <-chan struct{}) *stream {
	t.Helper()
	s := &stream{seen: map[uint32]int{}}
	var err error
	local, _ := net.ResolveUDPAddr("udp4", source)
	remote, _ := net.ResolveUDPAddr("udp4", destination)
	var listener *net.UDPConn
	to.Do(func() { listener, err = net.ListenUDP("udp4", remote) })
	if err != nil {
		t.Fatal(err)
	}
	// Room for what comes at once after a gap; SetReadBuffer stays below net.core.rmem_max.
	if c, err := listener.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) })
	}
	from.Do(func() { s.from, err = net.DialUDP("udp4", local, remote) })
	if err != nil {
		t.Fatal(err)
	}
	s.to = listener
	interval := netlab.Scale(500 * time.Microsecond)
	s.done.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for begin := time.Now(); ; {
			select {
			case <-stop:
				s.all.Store(true)
				return
			case <-tick.C:
			}
			for due := uint32(time.Since(begin) / interval); s.sent < due; s.sent++ {
				_, _ = s.from.Write(binary.BigEndian.AppendUint32(nil, s.sent))
			}
		}
	})
	s.done.Go(func() {
		b := make([]byte, 10)
		var last time.Time
		for read := time.Now(); ; {
			_ = listener.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := listener.Read(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				// Behind the last one no other comes for long; without it they may still be on their way, on a busy machine.
				idle := time.Since(read)
				if all := s.all.Load(); all && (len(s.seen) == int(s.sent) || s.seen[s.sent-1] > 0 && idle > time.Second) || idle > netlab.Timeout() {
					return
				}
				continue
			}
			read = time.Now()
			if now := time.Now(); n == 4 {
				s.seen[binary.BigEndian.Uint32(b)]++
				if !last.IsZero() {
					s.gap = max(s.gap, now.Sub(last))
					s.over += max(0, int(now.Sub(last)/interval)-1500)
				}
				last = now
			}
		}
	})
	return s
}

// overflow is how many packets came while there was no process, on a machine that starts one slowly, beyond what an
// interface queues (txqueuelen, 2,000). A gap is seen a little shorter than it was. It is known after lost.
func (s *stream) overflow() int { return s.over }

func (s *stream) lost() (lost, twice int) {
	s.done.Wait()
	s.from.Close()
	s.to.Close()
	for i := range s.sent {
		switch s.seen[i] {
		case 0:
			lost++
		case 1:
		default:
			twice++
		}
	}
	return lost, twice
}

// keptTunnel is an ipipd keep in namespace a, whose process has a tunnel, near, to one that is in b, far.
type keptTunnel struct {
	*kept
	a, b *netlab.NS
	dir  string // of runtime-dirs
}

func newKeptTunnel(t *testing.T, a, b *netlab.NS, program string, near ...string) *keptTunnel {
	t.Helper()
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	dir := shortDir(t)
	far := exec.Command("ipipd", "up", "--remote-address", "192.0.2.1", "--name", "far", "--address", "10.255.0.2/30", "--runtime-dir", filepath.Join(dir, "far"))
	b.Start(far)
	k := startKept(t, func(cmd *exec.Cmd) (err error) { a.Do(func() { err = cmd.Start() }); return err },
		append([]string{program, "up", "--name", "near", "--runtime-dir", filepath.Join(dir, "near")}, near...)...)
	return &keptTunnel{k, a, b, dir}
}

// ready waits for the nth process, and returns its PID.
func (k *keptTunnel) ready(n int) (pid int) {
	k.t.Helper()
	return awaitProcess(k.t, k.kept, n)
}

// awaitProcess waits until the nth process has its tunnel, and returns its PID.
func awaitProcess(t *testing.T, k *kept, n int) (pid int) {
	t.Helper()
	netlab.Eventually(t, "the process is ready", func() bool {
		ready := regexp.MustCompile(`tunnel is ready`).FindAllString(k.log.String(), -1)
		started := regexp.MustCompile(`is started" pid=(\d+)`).FindAllStringSubmatch(k.log.String(), -1)
		if len(ready) == n && len(started) == n {
			pid, _ = strconv.Atoi(started[n-1][1])
		}
		return pid != 0
	})
	return pid
}

func (k *keptTunnel) pings() {
	k.t.Helper()
	netlab.Eventually(k.t, "a ping is answered", func() bool {
		_, err := k.a.Try("ping", "-c", "1", "-W", "1", "10.255.0.2")
		return err == nil
	})
}

// status is what `ipipd print` says of near or far.
func (k *keptTunnel) status(name string) (s netlab.Status) {
	k.t.Helper()
	ns := map[string]*netlab.NS{"near": k.a, "far": k.b}[name]
	netlab.Eventually(k.t, "the process answers", func() bool {
		out, err := ns.Try("ipipd", "print", name, "--json", "--runtime-dir", filepath.Join(k.dir, name))
		var list []netlab.Status
		if err == nil && json.Unmarshal([]byte(out), &list) == nil && len(list) == 1 {
			s = list[0]
		}
		return s.Name != ""
	})
	return s
}

// No packet is lost, in either direction, while the process ends by SIGUSR2 and the next one starts, and
// none but what it had just read while it is killed.
func TestKeeper_stream(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	one := []string{"--remote-address", "192.0.2.2", "--address", "10.255.0.1/30", "--route", "10.20.0.0/16"}
	many := []string{"--remote-address", "any", "--local-address", "192.0.2.1", "--address", "10.255.0.1/32", "--peers", "10.255.0.2/32=192.0.2.2"}
	for _, c := range []struct {
		remotes string
		near    []string
		fast    string
		end     unix.Signal
	}{
		{"one", one, "no", unix.SIGUSR2}, {"one", one, "no", unix.SIGKILL}, // the fast path: TestKeeper_fastPath
		{"many", many, "no", unix.SIGUSR2}, {"many", many, "yes", unix.SIGKILL},
	} {
		t.Run(fmt.Sprintf("%s-fast-path-%s-%v", c.remotes, c.fast, c.end), func(t *testing.T) {
			a, b := netlab.New(t), netlab.New(t)
			k := newKeptTunnel(t, a, b, "ipipd", append([]string{"--allow-fast-path", c.fast}, c.near...)...)
			pid := k.ready
			pid(1)
			k.pings()
			show := func() string { return a.Run("ip", "-o", "link", "show", "near") + a.Run("ip", "route") }
			before := show()
			stop := make(chan struct{})
			out := newStream(t, a, b, "10.255.0.1:5000", "10.255.0.2:5001", stop)
			in := newStream(t, b, a, "10.255.0.2:6000", "10.255.0.1:6001", stop)
			const restarts = 5
			for n := 1; n <= restarts; n++ {
				time.Sleep(steady + 200*time.Millisecond) // so that it is started again at once
				if c.end == unix.SIGUSR2 {
					k.signal(c.end)
				} else {
					_ = unix.Kill(pid(n), c.end)
				}
				pid(n + 1)
				if got := show(); got != before {
					t.Errorf("the interface is\n%s, was\n%s", got, before)
				}
			}
			close(stop)
			for name, s := range map[string]*stream{"out": out, "in": in} {
				lost, twice := s.lost()
				t.Logf("%s: %d sent, %d lost, %d twice, gap %v", name, s.sent, lost, twice, s.gap)
				most := 0
				if c.end == unix.SIGKILL && c.fast == "no" { // what it has read and not sent yet: a batch
					most = restarts * 10
				}
				if lost > most+s.overflow() || s.sent < 500 {
					t.Errorf("%s: %d of %d are lost", name, lost, s.sent)
				}
			}
			k.signal(unix.SIGTERM)
			k.ends(0)
			netlab.Eventually(t, "the interface is gone", func() bool { _, err := a.Try("ip", "link", "show", "near"); return err != nil })
		})
	}
}
