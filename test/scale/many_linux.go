package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// One interface with many remotes beside one with one remote, in turns, both in userspace or both on the fast path:
//
//	hub: u0 192.0.2.1, ipipd ─── veth pair, MTU 1500 ─── far: u1 192.0.2.254, ipipd with accept-to
//
// The routes of the interface are the same; to the one with one remote their gateways mean nothing. far has
// the addresses of all remotes, 198.18.0.1 to as many as there are, and of all inner destinations, 10.0.0.0/9; its answers go to
// the hub outside the tunnel. The small packets end as they arrive there: on a veth pair the receiver's work is done
// in the sender's time, and 1,000 addresses of one host cost it more than one, which no remote has. So what differs is the
// hub's way of sending.

const (
	hubUnderlay = `link set lo up
link add u0 type veth peer name u1 netns %d
address add 192.0.2.1/24 dev u0
link set u0 up
route add 198.18.0.0/16 via 192.0.2.254
`
	farUnderlay = `link set lo up
address add 192.0.2.254/24 dev u1
link set u1 up
route add local 10.0.0.0/9 dev lo
route add 10.255.0.1 via 192.0.2.1
`
	sinkPort = 9
	streams  = 8
)

// manySetting is what -many measures.
type manySetting struct {
	Binary            string
	Prefixes, Remotes int
	Fast              bool // the fast path
	Rounds            int
	For               time.Duration
}

// figures are the results for one tunnel in one round.
type figures struct {
	packets, bits, cpu float64       // packets and bits a second; processor time of a packet, in seconds
	usable             time.Duration // from the last route added until packets to all prefixes are sent
	memory             float64       // bytes for each prefix
	own, others        float64       // processor seconds for a change of a route out of the interface, of another route
}

// many measures both, in a network namespace of its own, and prints the medians.
func many(s manySetting) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	cmd := inNamespace("hub", string(text))
	cmd.Stdout = os.Stdout
	return cmd.Run()
}

// inNamespace returns a command that runs this program in a network namespace of its own.
func inNamespace(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// hub is the process of the hub, which sends.
func hub(text string) (err error) {
	var s manySetting
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ipipd-scale-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	far := inNamespace("far", text, dir)
	end, err := startFar(far)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, end()) }()
	if err := noReversePath(); err != nil {
		return err
	}
	results := map[string][]figures{}
	for range s.Rounds {
		for _, remote := range []string{"198.18.0.1", "any"} {
			f, err := s.measure(dir, remote)
			if err != nil {
				return fmt.Errorf("remote-address %s: %w", remote, err)
			}
			results[remote] = append(results[remote], f)
		}
	}
	path, whose := "in userspace", ""
	if s.Fast {
		path, whose = "by the fast path", ", with the senders'"
	}
	fmt.Printf("%d prefixes, %s, medians of %d rounds of %v\n\n", s.Prefixes, path, s.Rounds, s.For)
	fmt.Printf("| remotes | kpps, 64 bytes | processor%s, µs a packet | TCP, Gb/s | usable, s | memory, B a prefix |\n", whose)
	fmt.Println("| ---: | ---: | ---: | ---: | ---: | ---: |")
	median := func(remote string, of func(figures) float64) float64 {
		var all []float64
		for _, f := range results[remote] {
			all = append(all, of(f))
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	packets := func(f figures) float64 { return f.packets }
	bits := func(f figures) float64 { return f.bits }
	for _, row := range [][2]string{{"198.18.0.1", "1"}, {"any", strconv.Itoa(s.Remotes)}} {
		remote, name := row[0], row[1]
		fmt.Printf("| %s | %.1f | %.2f | %.2f | %.2f | %.0f |\n", name, median(remote, packets)/1e3, median(remote, func(f figures) float64 { return f.cpu })*1e6,
			median(remote, bits)/1e9, median(remote, func(f figures) float64 { return f.usable.Seconds() }), median(remote, func(f figures) float64 { return f.memory }))
	}
	ratios := func(of func(figures) float64) float64 { // each round's
		var all []float64
		for i, f := range results["any"] {
			all = append(all, of(f)/of(results["198.18.0.1"][i]))
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	fmt.Printf("\nA change of a route out of the interface takes %.1f µs of a processor, of another one %.1f µs.\n",
		median("any", func(f figures) float64 { return f.own })*1e6, median("any", func(f figures) float64 { return f.others })*1e6)
	fmt.Printf("Many remotes by one: rate %.2f, goodput %.2f, processor %.2f.\n", ratios(packets), ratios(bits), ratios(func(f figures) float64 { return f.cpu }))
	return nil
}

// startFar starts the process of the far end, and returns once it is ready. end ends it, and removes the wire to it.
func startFar(far *exec.Cmd) (end func() error, err error) {
	stdin, err := far.StdinPipe()
	if err != nil {
		return nil, err
	}
	ready, err := far.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := far.Start(); err != nil {
		return nil, err
	}
	end = func() error {
		stdin.Close()
		err := far.Wait()
		_ = ip("link del u0\n") // it may have gone with the other end
		return err
	}
	if err := ip(fmt.Sprintf(hubUnderlay, far.Process.Pid)); err != nil {
		return nil, cmp.Or(err, end())
	}
	fmt.Fprintln(stdin)
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return nil, cmp.Or(end(), fmt.Errorf("the far end has failed: %w", err))
	}
	return end, nil
}

// fill writes to a connection, and counts, until that is closed.
func fill(conn net.Conn, count *atomic.Int64) {
	b := make([]byte, 128<<10)
	for {
		n, err := conn.Write(b)
		if count.Add(int64(n)); err != nil {
			return
		}
	}
}

// measure measures one tunnel in one round.
func (s *manySetting) measure(dir, remote string) (f figures, err error) {
	d, err := startDaemon(s.Binary, filepath.Join(dir, "hub"), "--name", "t0", "--local-address", "192.0.2.1", "--remote-address", remote,
		"--address", "10.255.0.1/32", "--keepalive", "off", "--allow-fast-path", s.allowFastPath())
	if err != nil {
		return f, err
	}
	defer d.end()
	before, err := d.resident()
	if err != nil {
		return f, err
	}
	var routes strings.Builder
	for i := range s.Prefixes {
		n := i%s.Remotes + 1
		fmt.Fprintf(&routes, "route add %v/24 via 198.18.%d.%d onlink dev t0\n", prefix(i), n>>8, n&0xff)
	}
	if err := ip(routes.String()); err != nil {
		return f, err
	}
	began := time.Now()
	conn, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return f, err
	}
	defer conn.Close()
	for {
		was, err := d.status()
		if err != nil {
			return f, err
		}
		for i := range s.Prefixes {
			if _, err := conn.WriteToUDPAddrPort(nil, destination(i)); err != nil {
				return f, err
			}
			if i%100 == 0 { // the interface's queue is short
				time.Sleep(time.Millisecond)
			}
		}
		time.Sleep(20 * time.Millisecond)
		now, err := d.status()
		if err != nil {
			return f, err
		}
		if now.TxPacket-was.TxPacket >= uint64(s.Prefixes) && s.Fast == (now.FastPath == "active") {
			break
		}
		if time.Since(began) > time.Minute {
			return f, fmt.Errorf("of %d prefixes %d can be reached: %v; fast-path: %s", s.Prefixes, now.TxPacket-was.TxPacket, now.Drops, now.FastPath)
		}
	}
	f.usable = time.Since(began)
	time.Sleep(time.Second) // until the answers about the remotes are there (netstate.Query)
	after, err := d.resident()
	if err != nil {
		return f, err
	}
	f.memory = float64(after-before) / float64(s.Prefixes)
	if f.packets, f.cpu, err = s.rate(d); err != nil {
		return f, err
	}
	if f.bits, err = s.goodput(); err != nil {
		return f, err
	}
	if remote != "any" {
		return f, nil
	}
	if f.own, err = storm(d, "via 198.18.0.2 dev t0 onlink"); err != nil {
		return f, err
	}
	f.others, err = storm(d, "via 192.0.2.254 dev u0")
	return f, err
}

// storm returns the processor time that the process takes for one change of a route that no packet goes by, in seconds.
func storm(d *daemon, by string) (each float64, err error) {
	const routes = 5000
	var add, remove strings.Builder
	for i := range routes {
		fmt.Fprintf(&add, "route add 172.%d.%d.0/24 %s\n", 16+i>>8, i&0xff, by)
		fmt.Fprintf(&remove, "route del 172.%d.%d.0/24\n", 16+i>>8, i&0xff)
	}
	before := d.processor()
	for range 4 {
		if err := ip(add.String() + remove.String()); err != nil {
			return 0, err
		}
	}
	time.Sleep(200 * time.Millisecond)
	return (d.processor() - before).Seconds() / (4 * 2 * routes), nil
}

// rate sends small packets to all prefixes in turns, and returns how many the tunnel sends in a second, and
// the processor time of one, in seconds.
func (s *manySetting) rate(d *daemon) (packets, cpu float64, err error) {
	stop, senders := atomic.Bool{}, sync.WaitGroup{}
	for sender := range 2 {
		conn, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return 0, 0, err
		}
		senders.Go(func() {
			defer conn.Close()
			p := make([]byte, 64)
			for i := sender; !stop.Load(); i++ {
				_, _ = conn.WriteToUDPAddrPort(p, destination(i*7919%s.Prefixes))
			}
		})
	}
	defer senders.Wait()
	defer stop.Store(true)
	time.Sleep(s.For / 8)
	before, err := d.status()
	if err != nil {
		return 0, 0, err
	}
	user, cpuBefore, began := inUserspace(), s.processor(d), time.Now()
	time.Sleep(s.For)
	took, cpuAfter := time.Since(began), s.processor(d)
	after, err := d.status()
	if err != nil {
		return 0, 0, err
	}
	sent := float64(after.TxPacket - before.TxPacket)
	if user = inUserspace() - user; s.Fast && float64(user) > sent/100 {
		return 0, 0, fmt.Errorf("%d of %.0f packets went through userspace", user, sent)
	}
	return sent / took.Seconds(), (cpuAfter - cpuBefore).Seconds() / sent, nil
}

// inUserspace returns how many packets the process has read from its interface so far.
func inUserspace() (n uint64) {
	b, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		const packets = 10 // sent ones, after the name
		if f := strings.Fields(line); len(f) > packets && f[0] == "t0:" {
			n, _ = strconv.ParseUint(f[packets], 10, 64)
		}
	}
	return n
}

func (s *manySetting) allowFastPath() string {
	if s.Fast {
		return "yes"
	}
	return "no"
}

// processor returns the processor time of the tunnel's process and, with the fast path, that of this one, in whose
// system calls the fast path's programs run.
func (s *manySetting) processor(d *daemon) time.Duration {
	var own syscall.Rusage
	if !s.Fast || syscall.Getrusage(syscall.RUSAGE_SELF, &own) != nil {
		return d.processor()
	}
	return d.processor() + time.Duration(own.Utime.Nano()+own.Stime.Nano())
}

// goodput returns the goodput of some TCP connections together, each to another prefix, in bits a second.
func (s *manySetting) goodput() (bits float64, err error) {
	var bytes atomic.Int64
	var writers sync.WaitGroup
	defer writers.Wait()
	for i := range streams {
		conn, err := net.DialTimeout("tcp4", destination(i*s.Prefixes/streams).String(), 10*time.Second)
		if err != nil {
			return 0, err
		}
		defer conn.Close() // before Wait
		writers.Go(func() { fill(conn, &bytes) })
	}
	time.Sleep(s.For / 4)
	before, began := bytes.Load(), time.Now()
	time.Sleep(s.For)
	return float64(bytes.Load()-before) * 8 / time.Since(began).Seconds(), nil
}

// prefix is the network address of one of the prefixes, and destination the sink in it.
func prefix(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}) }

func destination(i int) netip.AddrPort { return netip.AddrPortFrom(prefix(i).Next(), sinkPort) }

// far is the process of the far end.
func far(text, dir string) error {
	var s manySetting
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil { // until u1 is there
		return err
	}
	underlay := farUnderlay
	for i := range s.Remotes {
		underlay += fmt.Sprintf("address add 198.18.%d.%d/32 dev lo\n", (i+1)>>8, (i+1)&0xff)
	}
	if err := ip(underlay); err != nil {
		return err
	}
	if err := noReversePath(); err != nil {
		return err
	}
	d, err := startDaemon(s.Binary, filepath.Join(dir, "far"), "--name", "t0", "--remote-address", "any", "--accept-from", "192.0.2.1", "--accept-to", "10.0.0.0/9",
		"--allow-fast-path", s.allowFastPath())
	if err != nil {
		return err
	}
	defer d.end()
	discard, err := discardUDP("u1")
	if err != nil {
		return err
	}
	defer discard.Close()
	return sink()
}

// sink reads and discards what is sent by TCP to sinkPort until standard input ends.
func sink() error {
	tcp, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: sinkPort})
	if err != nil {
		return err
	}
	defer tcp.Close()
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
				conn.Close()
			}()
		}
	}()
	fmt.Println()
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the hub ends
	return nil
}

func ip(batch string) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// noReversePath turns rp_filter off: answers arrive by another interface.
func noReversePath() error {
	for _, of := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+of+"/rp_filter", []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}
