package main

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// stream sends numbered packets, on an idle machine 2,000 a second, until stop is closed, and reports how many arrive and
// the longest gap between two.
type stream struct {
	from, to net.Conn
	sent     uint32
	all      atomic.Bool // sent is final
	seen     map[uint32]int
	gap      time.Duration
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
	// Room for the burst after a gap; SetReadBuffer stays below net.core.rmem_max.
	if c, err := listener.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) })
	}
	from.Do(func() { s.from, err = net.DialUDP("udp4", local, remote) })
	if err != nil {
		t.Fatal(err)
	}
	s.to = listener
	interval := 500 * time.Microsecond
	if keptRestarts() == 1 {
		interval = netlab.Scale(interval)
	}
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
				// After the last packet no others come for long; before it they may be on their way, on a busy machine.
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
				}
				last = now
			}
		}
	})
	return s
}

// queueDrops returns how many packets the queues of near and far have had no room for.
func queueDrops(t *testing.T, a, b *netlab.NS) (near, far int) {
	t.Helper()
	drops := func(ns *netlab.NS, name string) int {
		var links []struct {
			Stats struct {
				TX struct{ Dropped int }
			} `json:"stats64"`
		}
		if out := ns.Run("ip", "-s", "-j", "link", "show", name); json.Unmarshal([]byte(out), &links) != nil || len(links) != 1 {
			t.Fatal(out)
		}
		return links[0].Stats.TX.Dropped
	}
	return drops(a, "near"), drops(b, "far")
}

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

// keptTunnel is an ipipd keep in namespace a, whose process has the tunnel near, and its other end in b, far.
type keptTunnel struct {
	*kept
	a, b *netlab.NS
	dir  string // of runtime-dirs
}

func newKeptTunnel(t *testing.T, a, b *netlab.NS, program string, near ...string) *keptTunnel {
	t.Helper()
	return keepTunnel(t, a, b, "ipipd", program, near, nil)
}

// keepTunnel is newKeptTunnel with a binary for the keeper, and flags for far.
func keepTunnel(t *testing.T, a, b *netlab.NS, keeper, program string, near, far []string) *keptTunnel {
	t.Helper()
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	dir := shortDir(t)
	b.Start(exec.Command("ipipd", append([]string{"up", "--remote-address", "192.0.2.1", "--name", "far", "--address", "10.255.0.2/30", "--runtime-dir", filepath.Join(dir, "far")}, far...)...))
	k := startKept(t, func(cmd *exec.Cmd) (err error) {
		if keeper != "ipipd" {
			cmd.Path, cmd.Env = keeper, append(os.Environ(), "PATH="+filepath.Dir(keeper)+":"+os.Getenv("PATH"))
		}
		a.Do(func() { err = cmd.Start() })
		return err
	}, append([]string{program, "up", "--name", "near", "--runtime-dir", filepath.Join(dir, "near")}, near...)...)
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

// status returns what `ipipd print` says of near or far.
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

// keptRestarts returns how often a process ends in each way in the tests of what outlives it.
func keptRestarts() int {
	n, _ := strconv.Atoi(os.Getenv("IPIPD_TEST_RESTARTS"))
	return cmp.Or(n, 1)
}

// aBatch is how many packets a process can have read from a queue, and not sent or counted yet, when it is killed.
const aBatch = 128

// keptWay is how a process ends, and what is installed before.
type keptWay struct {
	name   string
	times  int
	kill   bool     // by SIGKILL; else by SIGUSR2 to the keeper
	run    []string // the process's binaries, in turn
	keeper string   // the keeper's binary
	anew   bool     // the counters of the fast path begin anew
}

// keptPath is what carries the packets.
type keptPath struct {
	name      string
	near, far []string
	fast, esp bool
	ways      []keptWay
}

// Through restarts, kill -9, upgrades between two binaries, one with another layout of the fast path's maps, and one of
// the keeper, no packet is lost in either direction, but those that userspace has just read when it is killed (there, a
// few may come twice, by two sockets). The interface, its addresses and routes, and an OSPF adjacency over it stay, and
// the counters go on. With ESP no packet is plain, none repeats a sequence number, and nothing is negotiated.
// IPIPD_TEST_RESTARTS is how many restarts, and how many kill -9, there are; there are a fourth as many upgrades.
func TestKeeper_stream(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	restarts := keptRestarts()
	first, err := exec.LookPath("ipipd")
	if err != nil {
		t.Fatal(err)
	}
	layout := build(t, "main.version=v3", "ipipd/internal/fastpath.otherLayout=v3")
	two := []keptWay{{name: "restart", times: restarts}, {name: "kill -9", times: restarts, kill: true}}
	all := slices.Clone(two)
	if restarts >= 4 {
		all = append(all, keptWay{name: "upgrade", times: restarts / 4, run: []string{build(t, "main.version=v2"), first}})
	}
	all = append(all, keptWay{name: "upgrade to another layout", times: 1, run: []string{layout}, anew: true}, keptWay{name: "upgrade of the keeper", times: 1, keeper: layout})
	one := []string{"--remote-address", "192.0.2.2", "--address", "10.255.0.1/30", "--route", "10.20.0.0/16"}
	many := []string{"--remote-address", "any", "--local-address", "192.0.2.1", "--address", "10.255.0.1/32", "--peers", "10.255.0.2/32=192.0.2.2"}
	userspace := []string{"--allow-fast-path", "no"}
	secret := []string{"--ipsec-exchange", "ike2", "--ipsec-secret", "correct horse battery staple"}
	for _, path := range []keptPath{
		{name: "userspace", near: slices.Concat(one, userspace), ways: all},
		{name: "fast-path", near: one, fast: true, ways: all},
		{name: "esp", near: slices.Concat(one, secret), far: secret, esp: true, ways: all},
		{name: "many-userspace", near: slices.Concat(many, userspace), ways: two},
		{name: "many-fast-path", near: many, fast: true, ways: two},
	} {
		t.Run(path.name, func(t *testing.T) { testKeptPath(t, &path, first) })
	}
}

// keptSum adds up all streams and floods of a test.
type keptSum struct {
	sent, flooded, lost int
	full                int // packets of lost that the queues of the interfaces had no room for
	gap                 time.Duration
}

// testKeptPath tests all ways of a path; first is the binary of the first process.
func testKeptPath(t *testing.T, path *keptPath, first string) {
	a, b := netlab.New(t), netlab.New(t)
	program, keeper := filepath.Join(t.TempDir(), "ipipd"), filepath.Join(t.TempDir(), "ipipd")
	run := func(binary string) {
		script := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(script, []byte("#!/bin/sh\nexec "+binary+" \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		install(t, script, program)
	}
	run(first)
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	install(t, own, keeper)
	k := keepTunnel(t, a, b, keeper, program, path.near, path.far)
	var wire *netlab.ESPWire
	if path.esp {
		wire = netlab.WatchESP(t, b, "eth0", "192.0.2.2")
	}
	pid, n := k.ready(1), 1
	k.pings()
	if path.fast {
		for _, name := range []string{"near", "far"} {
			var why string
			if !netlab.WaitFor(func() bool { why = k.status(name).FastPath; return why == "active" }) {
				t.Skipf("no fast path here: %s", why)
			}
		}
	}
	var negotiated netlab.ESPSeen
	if path.esp {
		negotiated = awaitNegotiated(t, wire)
	}
	ospf := newAdjacency(t, k)
	show := func() string {
		return a.Run("ip", "-o", "link", "show", "near") + a.Run("ip", "-o", "address", "show", "near") + a.Run("ip", "route")
	}
	was := show()
	var events netlab.Buffer
	monitor := exec.Command("ip", "monitor", "link", "dev", "near")
	monitor.Stdout = &events
	a.Start(monitor)
	sum := keptSum{}
	for _, w := range path.ways {
		for i := range w.times {
			before := k.status("near")
			nearDrops, farDrops := queueDrops(t, a, b)
			stop := make(chan struct{})
			streams := []*stream{newStream(t, a, b, "10.255.0.1:5000", "10.255.0.2:5001", stop), newStream(t, b, a, "10.255.0.2:6000", "10.255.0.1:6001", stop)}
			var floods []*flood
			if path.fast {
				floods = []*flood{newFlood(t, a, b, "10.255.0.1:7000", "10.255.0.2:7001", stop), newFlood(t, b, a, "10.255.0.2:8000", "10.255.0.1:8001", stop)}
			}
			time.Sleep(steady + 200*time.Millisecond) // so that it is started again at once
			if w.run != nil {
				run(w.run[i%len(w.run)])
			}
			if w.keeper != "" {
				install(t, w.keeper, keeper)
			}
			if w.kill {
				_ = unix.Kill(pid, unix.SIGKILL)
			} else {
				k.signal(unix.SIGUSR2)
			}
			n++
			pid = k.ready(n)
			time.Sleep(100 * time.Millisecond)
			close(stop)
			after, sent, full := k.status("near"), [2]uint64{}, [2]int{}
			lost, twice := [2]int{}, [2]int{}
			for i, s := range streams {
				lost[i], twice[i] = s.lost()
			}
			full[0], full[1] = queueDrops(t, a, b)
			full[0], full[1] = full[0]-nearDrops, full[1]-farDrops
			for i, way := range []string{"out", "in"} {
				sent[i] = uint64(streams[i].sent)
				line, flooded := fmt.Sprintf("%s, %s: %d sent, %d lost, %d of them by a full queue, %d twice, gap %v", w.name, way, streams[i].sent, lost[i], full[i], twice[i], streams[i].gap), 0
				if path.fast {
					flooded = floods[i].lost(t)
					sent[i] += floods[i].sent
					line += fmt.Sprintf("; flood: %d sent, %d lost", floods[i].sent, flooded)
				}
				t.Log(line)
				sum.sent, sum.lost, sum.flooded, sum.gap = sum.sent+int(streams[i].sent), sum.lost+lost[i]+flooded, sum.flooded+int(sent[i])-int(streams[i].sent), max(sum.gap, streams[i].gap)
				sum.full += full[i]
				allowed := 0
				if !path.fast {
					if allowed = full[i]; w.kill { // a batch that it has read and not sent yet
						allowed += aBatch
					}
				}
				if lost[i] > allowed || twice[i] > 0 && (path.fast || path.esp) || flooded != 0 || streams[i].sent < 50 || path.fast && floods[i].sent < 1000 {
					t.Errorf("want %d lost at most: %s", allowed, line)
				}
			}
			if now := show(); now != was {
				t.Errorf("%s: the interface is\n%s, was\n%s", w.name, now, was)
			}
			if fast := after.FastPath == "active"; fast != path.fast {
				t.Errorf("%s: fast-path: %s", w.name, after.FastPath)
			}
			if w.run != nil && w.run[i%len(w.run)] != first {
				if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe != w.run[i%len(w.run)] {
					t.Errorf("%s: %s runs, %v", w.name, exe, err)
				}
			}
			if w.keeper != "" && !sameFile(t, fmt.Sprintf("/proc/%d/exe", k.cmd.Process.Pid), keeper) {
				t.Errorf("%s: it is not executed", w.name)
			}
			ospf.check(w.name)
			if path.fast && w.anew {
				continue
			}
			after = k.status("near") // all is counted
			// Packets of OSPF, and those that a killed process has read, or sent, and not counted.
			few := uint64(2*aBatch + full[0] + full[1])
			if tx, rx := after.TxPacket-before.TxPacket, after.RxPacket-before.RxPacket; tx+few < sent[0] || tx > sent[0]+few || rx+few < sent[1] || rx > sent[1]+few {
				t.Errorf("%s: counted are %d packets out and %d in, want %d and %d and few more or less", w.name, tx, rx, sent[0], sent[1])
			}
		}
	}
	for _, event := range regexp.MustCompile(`mtu \d+`).FindAllString(events.String(), -1) {
		if !strings.Contains(was, event+" ") { // with a lower MTU full packets would be refused for a moment
			t.Errorf("the interface has had %s, and had\n%s", event, was)
			break
		}
	}
	t.Logf("%s: %d times another process: of %d packets and %d of a flood %d are lost, %d of them by full queues, the longest gap is %v; OSPF: %s", path.name, n-1, sum.sent, sum.flooded, sum.lost, sum.full, sum.gap, ospf)
	if path.esp {
		seen := wire.Seen()
		t.Logf("%+v, at the start %+v", seen, negotiated)
		// Both ends may have negotiated at the start, and the next process may use the other pair of SAs.
		if seen.Repeated != 0 || seen.Plain != 0 || seen.ESP < 100 || seen.Negotiating != negotiated.Negotiating || seen.SPIs > 4 {
			t.Errorf("%+v, at the start %+v", seen, negotiated)
		}
	}
	k.signal(unix.SIGTERM)
	k.ends(0)
	netlab.Eventually(t, "the interface is gone", func() bool { _, err := a.Try("ip", "link", "show", "near"); return err != nil })
}

// install replaces path by a link to a file, or a copy of it, in one step.
func install(t *testing.T, file, path string) {
	t.Helper()
	err := os.Link(file, path+".new")
	if err != nil { // another file system
		var text []byte
		if text, err = os.ReadFile(file); err == nil {
			err = os.WriteFile(path+".new", text, 0o755)
		}
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func sameFile(t *testing.T, a, b string) bool {
	t.Helper()
	one, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.Stat(b)
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(one, other)
}

// adjacency is an OSPF adjacency of two BIRDs over a kept tunnel; nil without BIRD.
type adjacency struct {
	k    *keptTunnel
	logs []*netlab.Buffer
	lost bool
}

func newAdjacency(t *testing.T, k *keptTunnel) *adjacency {
	t.Helper()
	if _, err := exec.LookPath("bird"); err != nil || strings.Contains(k.cmd.String(), "--peers") {
		return nil
	}
	o := &adjacency{k: k}
	for i, ns := range []*netlab.NS{k.a, k.b} {
		name := []string{"near", "far"}[i]
		ns.Run("ip", "address", "add", fmt.Sprintf("10.77.0.%d/32", i+1), "dev", "lo")
		file := filepath.Join(k.dir, name+".conf")
		if err := os.WriteFile(file, fmt.Appendf(nil, `log stderr all;
router id 10.255.0.%d;
protocol device {}
protocol kernel { ipv4 { export all; }; }
protocol ospf v2 {
	debug { events };
	area 0 { interface "%s" { type ptp; hello 1; dead %d; }; interface "lo" { stub; }; };
}
`, i+1, name, int(netlab.Scale(20*time.Second).Seconds())), 0o600); err != nil {
			t.Fatal(err)
		}
		bird := exec.Command("bird", "-f", "-c", file, "-s", filepath.Join(k.dir, name+".ctl"), "-P", filepath.Join(k.dir, name+".pid"))
		log := &netlab.Buffer{}
		bird.Stderr = log
		ns.Start(bird)
		o.logs = append(o.logs, log)
	}
	netlab.Eventually(t, "both ends have a route by OSPF", func() bool {
		return strings.Contains(k.a.Run("ip", "route"), "10.77.0.2 via 10.255.0.2 dev near proto bird") && strings.Contains(k.b.Run("ip", "route"), "10.77.0.1 via 10.255.0.1 dev far proto bird")
	})
	return o
}

// check fails the test if either end has left the state Full.
func (o *adjacency) check(when string) {
	if o == nil || o.lost {
		return
	}
	for _, log := range o.logs {
		if text := log.String(); !strings.Contains(text, " to Full") || strings.Contains(text, "from Full") {
			o.lost = true
			o.k.t.Errorf("%s: the adjacency has not stayed: %s", when, text)
		}
	}
}

func (o *adjacency) String() string {
	if o == nil {
		return "not watched: there is no BIRD, or no neighbour by multicast"
	}
	if o.lost {
		return "the adjacency has not stayed"
	}
	return "the adjacency has stayed"
}
