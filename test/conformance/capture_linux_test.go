package conformance

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// runningCapture is a running `ipipd capture t0 -w FILE`.
type runningCapture struct {
	t      *testing.T
	file   string
	cmd    *exec.Cmd
	stderr bytes.Buffer
	ended  chan struct{}
}

// startCapture starts a capture, and returns once it captures packets, whole unless the flags say otherwise.
func startCapture(t *testing.T, d *netlab.Daemon, flags ...string) *runningCapture {
	t.Helper()
	c := &runningCapture{t: t, file: filepath.Join(t.TempDir(), "t.pcapng"), ended: make(chan struct{})}
	c.cmd = exec.Command(netlab.Binary(t), append([]string{"capture", "t0", "-w", c.file, "--runtime-dir", filepath.Dir(d.Socket()), "--snaplen", "65535"}, flags...)...)
	c.cmd.Stderr = &c.stderr
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = c.cmd.Wait()
		close(c.ended)
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.ended
	})
	netlab.Eventually(t, "the capture has begun", func() bool {
		select {
		case <-c.ended:
			t.Fatalf("ipipd capture has ended: %v\n%s", c.cmd.ProcessState, c.stderr.String())
		default:
		}
		info, err := os.Stat(c.file)
		return err == nil && info.Size() > 0
	})
	return c
}

// read reads the file as it is by now.
func (c *runningCapture) read() *netlab.CaptureFile {
	c.t.Helper()
	b, err := os.ReadFile(c.file)
	if err != nil {
		c.t.Fatal(err)
	}
	f, err := netlab.ReadCapture(b)
	if err != nil {
		c.t.Fatal(err)
	}
	return f
}

// end interrupts the capture, and reads the whole file.
func (c *runningCapture) end() *netlab.CaptureFile {
	c.t.Helper()
	_ = c.cmd.Process.Signal(syscall.SIGINT)
	return c.await()
}

// await waits for the end of the capture, and reads the whole file.
func (c *runningCapture) await() *netlab.CaptureFile {
	c.t.Helper()
	select {
	case <-c.ended:
	case <-time.After(netlab.Timeout()):
		c.t.Fatal("ipipd capture does not end")
	}
	f := c.read()
	if said := fmt.Sprintf("%d packet", len(f.Packets)); c.cmd.ProcessState.ExitCode() != 0 || !strings.HasPrefix(c.stderr.String(), said) || !f.Ended {
		c.t.Errorf("ipipd capture: %v, %q, and there are %d packets in the file; whole: %v", c.cmd.ProcessState, c.stderr.String(), len(f.Packets), f.Ended)
	}
	return f
}

// found returns the packets with an interface and direction, such as "inner out", that pass checks.
func found(f *netlab.CaptureFile, where string, checks ...netlab.Check) (packets []netlab.CapturedPacket) {
	iface, direction, _ := strings.Cut(where, " ")
	for _, p := range f.Packets {
		if strings.HasSuffix(p.Interface, "("+iface+")") && p.Direction == direction && netlab.Match(p.Packet, checks...) == nil {
			packets = append(packets, p)
		}
	}
	return packets
}

// one returns the only packet that found returns, and fails the test if there are none or several.
func one(t *testing.T, f *netlab.CaptureFile, where string, checks ...netlab.Check) (p netlab.CapturedPacket) {
	t.Helper()
	packets := found(f, where, checks...)
	if len(packets) != 1 {
		t.Fatalf("%d packets %s as wanted, want one, among %s", len(packets), where, listed(f))
	}
	return packets[0]
}

// listed lists the packets of a file.
func listed(f *netlab.CaptureFile) string {
	var b strings.Builder
	for _, p := range f.Packets {
		fmt.Fprintf(&b, "\n\t%s %s %d: %s %s", p.Interface, p.Direction, p.ID, netlab.Describe(p.Packet), p.Comment)
	}
	return b.String()
}

// Each packet is captured twice, inner and outer, under one ID; a dropped one once, with the reason as its comment.
func TestCapture(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		da := c.upA(t, a)
		c.upB(t, b)
		if c.fast {
			requireFastPath(t, da)
		}
		of := startCapture(t, da)
		if s := da.Status(); c.fast && s.FastPath != "active" {
			t.Errorf("fast-path is %q", s.FastPath)
		}
		inside, outside := newInjector(t, a, "t0", nil, ""), newInjector(t, b, "veth0", a, "veth0")
		inside.send(datagram(aToB(11), 100), withByte(datagram(aToB(12), 100), 8, 0))
		outside.send(outerBToA(datagram(bToA(13), 100)), outerBToA(withByte(datagram(bToA(14), 100), 8, 0)))
		ping(t, a, innerB)
		netlab.Eventually(t, "all are in the file", func() bool { return len(found(of.read(), "inner in")) >= 2 && len(of.read().Packets) >= 10 })
		f := of.end()
		for _, want := range []struct {
			id       uint16
			from, to string
		}{{11, "inner out", "outer out"}, {13, "outer in", "inner in"}} {
			check := map[string]netlab.Check{"inner": netlab.ID(want.id), "outer": carries(want.id)}
			first, second := one(t, f, want.from, check[want.from[:5]]), one(t, f, want.to, check[want.to[:5]])
			if first.ID == 0 || first.ID != second.ID || first.Comment+second.Comment != "" {
				t.Errorf("packet %d: %+v, %+v", want.id, first, second)
			}
		}
		if p := one(t, f, "inner out", netlab.ID(12)); !strings.HasPrefix(p.Comment, "dropped: inner-ttl-zero: ") || !strings.Contains(p.Comment, "; remedy: look for a routing loop") {
			t.Errorf("the comment is %q", p.Comment)
		}
		if p := one(t, f, "outer in", carries(14)); !strings.HasPrefix(p.Comment, "dropped: received-ttl-zero: ") {
			t.Errorf("the comment is %q", p.Comment)
		}
		if n := len(found(f, "outer out", carries(12))) + len(found(f, "inner in", netlab.ID(14))); n > 0 {
			t.Errorf("%d packets that were dropped are there again", n)
		}
		if c.fast {
			if !strings.Contains(f.Comment, "packets of the fast path are captured") {
				t.Errorf("the comment of the file is %q", f.Comment)
			}
			if s := da.Status().FastPath; s != "active" {
				t.Errorf("fast-path is %q", s)
			}
		}
	})
}

// descriptorsOf returns how many descriptors a process has.
func descriptorsOf(t *testing.T, d *netlab.Daemon) int {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// The fast path goes on while it is captured: a superpacket is one packet in the capture. The kernel's ring goes with the
// client, however that ends.
func TestCapture_fastPath(t *testing.T) {
	t.Parallel()
	a, b, da, _ := fastHosts(t)
	ping(t, a, innerB)
	descriptors := func() int { return descriptorsOf(t, da) }
	before := descriptors()
	of := startCapture(t, da, "--complete", "--snaplen", "200")
	transfer(t, a, b, innerB, 5<<20)
	transfer(t, b, a, innerA, 5<<20)
	if s := da.Status(); s.FastPath != "active" {
		t.Errorf("fast-path is %q", s.FastPath)
	}
	f := of.end()
	bytes, long := map[string]int{}, map[string]int{}
	for _, p := range f.Packets {
		where := p.Interface + " " + p.Direction
		if bytes[where] += p.Length; p.Length > 2000 && len(p.Packet) == 200 {
			long[where]++
		}
	}
	for _, where := range []string{"t0 (inner) out", "t0 (outer) out", "t0 (outer) in", "t0 (inner) in"} {
		if bytes[where] < 5<<20 || long[where] == 0 {
			t.Errorf("%s: packets of %d bytes in all, %d of them superpackets", where, bytes[where], long[where])
		}
	}
	pairs := map[uint64]int{}
	for _, p := range f.Packets {
		pairs[p.ID]++
	}
	for id, n := range pairs {
		if id == 0 || n != 2 {
			t.Errorf("%d packets have the ID %d", n, id)
			break
		}
	}
	netlab.Eventually(t, "the descriptors of the ring are closed", func() bool { return descriptors() <= before })

	of = startCapture(t, da)
	netlab.Eventually(t, "the ring is there", func() bool { return descriptors() > before })
	_ = of.cmd.Process.Kill()
	<-of.ended
	netlab.Eventually(t, "the ring of a client that was killed is gone", func() bool { return descriptors() <= before })
	ping(t, a, innerB)
	if s := da.Status(); s.FastPath != "active" {
		t.Errorf("fast-path is %q", s.FastPath)
	}
}

// ringBuffers returns how many ring buffers of the kernel a process has.
func ringBuffers(t *testing.T, pid int) (n int) {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	for _, file := range all {
		info, _ := os.ReadFile(file) // the file of a descriptor that is closed by now is gone
		for line := range strings.Lines(string(info)) {
			if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "map_type:" && fields[1] == strconv.Itoa(int(ebpf.RingBuf)) {
				n++
			}
		}
	}
	return n
}

// Under ipipd keep, whose process has no capability, the fast path goes on, too, while it is captured. The process has the
// ring during the capture only, and keep has none.
func TestCapture_keep(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	fast.upB(t, b)
	da := netlab.Keep(t, a, "t0", append([]string{"--keepalive", "off", "--local-address", outerA, "--remote-address", outerB, "--address", innerA + "/24"}, fast.flags...)...)
	requireFastPath(t, da)
	ping(t, a, innerB)
	child := da.Child()
	for round := range 2 {
		if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child)); err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000") {
			t.Fatalf("%v, the process has a capability: %s", err, status)
		}
		if n := ringBuffers(t, child) + ringBuffers(t, da.PID()); n > 0 {
			t.Errorf("%d ring buffers before a capture", n)
		}
		of := startCapture(t, da)
		if n := ringBuffers(t, child); n != 1 {
			t.Errorf("%d ring buffers of the process while a capture runs", n)
		}
		netlab.Eventually(t, "keep has closed its ring buffer", func() bool { return ringBuffers(t, da.PID()) == 0 })
		before := da.Status()
		inside, outside := newInjector(t, a, "t0", nil, ""), newInjector(t, b, "veth0", a, "veth0")
		inside.send(datagram(aToB(11), 100))
		outside.send(outerBToA(datagram(bToA(13), 100)))
		netlab.Eventually(t, "all are in the file", func() bool {
			f := of.read()
			return len(found(f, "outer out", carries(11))) > 0 && len(found(f, "inner in", netlab.ID(13))) > 0
		})
		if s := da.Status(); s.FastPath != "active" || s.TxPacket == before.TxPacket || s.RxPacket == before.RxPacket {
			t.Errorf("fast-path is %q, %d and %d packets, were %d and %d", s.FastPath, s.TxPacket, s.RxPacket, before.TxPacket, before.RxPacket)
		}
		f := of.end()
		for _, where := range []string{"inner out", "outer out", "outer in", "inner in"} {
			check := map[string]netlab.Check{"inner out": netlab.ID(11), "outer out": carries(11), "outer in": carries(13), "inner in": netlab.ID(13)}[where]
			if p := one(t, f, where, check); p.ID == 0 || p.Comment != "" {
				t.Errorf("%s: %+v", where, p)
			}
		}
		if !strings.Contains(f.Comment, "packets of the fast path are captured") {
			t.Errorf("the comment of the file is %q", f.Comment)
		}
		netlab.Eventually(t, "the ring buffer is gone", func() bool { return ringBuffers(t, child) == 0 })
		if round == 0 { // the next process asks another server of keep
			if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			child = da.AwaitSuccessor(child)
			netlab.Eventually(t, "the fast path is active again", func() bool { return da.Status().FastPath == "active" })
		}
	}
}

// Where the kernel gives no ring, here for lack of a descriptor, the fast path is left while the tunnel is captured.
func TestCapture_noRing(t *testing.T) {
	t.Parallel()
	a, _, da, _ := fastHosts(t)
	ping(t, a, innerB)
	e := exhaust(t, da)
	if _, err := e.conn.Write([]byte("GET /capture?name=t0 HTTP/1.1\r\nHost: t\r\n\r\n")); err != nil { // by a connection that is there
		t.Fatal(err)
	}
	response, err := http.ReadResponse(e.answer, nil)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response, err)
	}
	var file bytes.Buffer
	seen := func(where string) bool {
		f, err := netlab.ReadCapture(bytes.Clone(file.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		return len(found(f, where, netlab.Protocol(ipv4.ProtocolICMP))) > 0
	}
	ping(t, a, innerB)
	for b := make([]byte, 64<<10); !seen("inner out") || !seen("inner in"); {
		n, err := response.Body.Read(b)
		if file.Write(b[:n]); err != nil {
			t.Fatal(err)
		}
	}
	const why = "no file descriptor is left for a ring buffer"
	if f, _ := netlab.ReadCapture(file.Bytes()); !strings.HasPrefix(f.Comment, "the fast path is left while the capture runs") || !strings.Contains(f.Comment, why) {
		t.Errorf("the comment of the file is %q", f.Comment)
	}
	e.limit(false)
	if s := da.Status().FastPath; !strings.HasPrefix(s, "a capture runs: "+why) {
		t.Errorf("fast-path is %q", s)
	}
	e.conn.Close()
	netlab.Eventually(t, "the fast path is used again", func() bool { return da.Status().FastPath == "active" })
}

// In a capture of an encrypted tunnel inner packets are clear text, and outer ones ESP.
func TestCapture_ipsec(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := encryptedUpA(t, a), encryptedUpB(t, b)
	awaitRunning(t, da, db)
	of := startCapture(t, da)
	from := newInjector(t, b, "veth0", a, "veth0")
	from.send(outerBToA(datagram(bToA(14), 100)))
	ping(t, a, innerB)
	netlab.Eventually(t, "all are in the file", func() bool { return len(found(of.read(), "inner in", netlab.Protocol(ipv4.ProtocolICMP))) > 0 })
	f := of.end()
	out, in := one(t, f, "inner out", netlab.Protocol(ipv4.ProtocolICMP)), one(t, f, "inner in", netlab.Protocol(ipv4.ProtocolICMP))
	for where, id := range map[string]uint64{"outer out": out.ID, "outer in": in.ID} {
		esp := 0
		for _, p := range found(f, where, netlab.Protocol(ipv4.ProtocolESP)) {
			if p.ID == id && p.Comment == "" {
				esp++
			}
		}
		if esp != 1 {
			t.Errorf("%d ESP packets %s with the ID of the inner one, %d: %s", esp, where, id, listed(f))
		}
	}
	if p := one(t, f, "outer in", netlab.Protocol(ipv4.ProtocolIPIP)); !strings.HasPrefix(p.Comment, "dropped: esp-plain-text: ") {
		t.Errorf("the comment is %q", p.Comment)
	}
	for _, p := range f.Packets {
		if strings.Contains(p.Interface, "outer") && p.Comment == "" && p.Packet[9] != ipv4.ProtocolESP {
			t.Errorf("%s: %s", p.Interface, netlab.Describe(p.Packet))
		}
	}
	for _, i := range f.Interfaces {
		if strings.Contains(i.Description, secret) {
			t.Error("the secret is in the file")
		}
	}
}

// No packet is lost as captures of the fast path begin and end.
func TestCapture_lossless(t *testing.T) {
	t.Parallel()
	a, b, da, db := fastHosts(t)
	ping(t, a, innerB)
	stop := netlab.Stream(t, a, innerA, b, innerB)
	for range 3 {
		for _, d := range []*netlab.Daemon{da, db} { // the end that sends, and the one that receives
			startCapture(t, d).end()
			if s := d.Status().FastPath; s != "active" {
				t.Errorf("fast-path is %q", s)
			}
		}
	}
	stop()
}

// A client that does not read its capture makes nobody wait; one that goes away ends its capture, and leaves
// nothing behind in the process.
func TestCapture_client(t *testing.T) {
	t.Parallel()
	a, b, da, _ := fastHosts(t)
	ping(t, a, innerB)
	descriptors := func() int { return descriptorsOf(t, da) }
	before := descriptors()
	ask := func(query string) (net.Conn, *http.Response) {
		conn, err := net.Dial("unix", da.Socket())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "GET /capture?%s HTTP/1.1\r\nHost: t\r\n\r\n", query)
		response, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
		if err != nil {
			t.Fatal(err)
		}
		return conn, response
	}
	for query, want := range map[string]int{
		"name=t1": http.StatusNotFound, "": http.StatusNotFound, "name=t0&count=-1": http.StatusBadRequest, "name=t0&snaplen=65536": http.StatusBadRequest,
		"name=t0&inner=x": http.StatusBadRequest, "name=t0&frob=1": http.StatusBadRequest,
	} {
		if _, response := ask(query); response.StatusCode != want {
			t.Errorf("%s: %s, want %d", query, response.Status, want)
		}
	}
	var open []net.Conn
	for range 4 {
		conn, response := ask("name=t0")
		if response.StatusCode != http.StatusOK {
			t.Fatal(response.Status)
		}
		open = append(open, conn)
	}
	if _, response := ask("name=t0"); response.StatusCode != http.StatusUnprocessableEntity {
		t.Errorf("one more: %s", response.Status)
	}
	if out, err := da.Run("capture", "t0"); err == nil || !strings.Contains(out, "4 captures run") {
		t.Errorf("one more: %v: %s", err, out)
	}
	transfer(t, a, b, innerB, 20<<20) // more than the rings and the buffers of the sockets hold
	transfer(t, b, a, innerA, 20<<20)
	if s := da.Status(); len(s.Drops) > 0 {
		t.Errorf("dropped %v", s.Drops)
	}
	for _, conn := range open {
		conn.Close()
	}
	netlab.Eventually(t, "their descriptors are closed", func() bool { return descriptors() <= before })
	startCapture(t, da).end()
}

// A capture that is read slowly gets its end, which says how many packets are missing.
func TestCapture_slowReader(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da := fast.upA(t, a)
	fast.upB(t, b)
	ping(t, a, innerB)
	of := startCapture(t, da)
	_ = of.cmd.Process.Signal(syscall.SIGSTOP)
	transfer(t, a, b, innerB, 40<<20)
	if s := da.Status(); len(s.Drops) > 0 {
		t.Errorf("dropped %v", s.Drops)
	}
	_ = of.cmd.Process.Signal(syscall.SIGCONT)
	f := of.end()
	var missed uint64
	for _, i := range f.Interfaces {
		missed += i.Missed
	}
	if missed == 0 || strings.Contains(of.stderr.String(), " 0 not written") {
		t.Errorf("nothing is missing: %+v, %s", f.Interfaces, of.stderr.String())
	}
}

// A capture ends with its tunnel, and goes on over a reload.
func TestCapture_reload(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	file := filepath.Join(t.TempDir(), "tunnels.yaml")
	const t0, t1 = "- {name: t0, remote-address: 192.0.2.2, keepalive: off", "- {name: t1, remote-address: 192.0.2.3, keepalive: off}\n"
	writeTunnels(t, file, t0+"}\n"+t1)
	d := netlab.UpConfig(t, a, "t0", file)
	of := startCapture(t, d)
	for i, more := range []string{", dscp: 46}\n", ", dscp: 46, tun-queues: 2}\n"} {
		writeTunnels(t, file, t0+more+t1)
		if out, err := d.Run("reload"); err != nil {
			t.Fatalf("reload: %v\n%s", err, out)
		}
		a.Run("ip", "route", "replace", "10.99.0.0/24", "dev", "t0")
		netlab.Eventually(t, "packets are captured", func() bool {
			_, _ = a.Try("ping", "-c", "1", "-W", "1", fmt.Sprintf("10.99.0.%d", i+1))
			return len(found(of.read(), "inner out", netlab.Destination(fmt.Sprintf("10.99.0.%d", i+1)))) > 0
		})
	}
	if out, err := d.Run("down", "t0"); err != nil {
		t.Fatalf("down: %v\n%s", err, out)
	}
	of.await()
	if said := of.stderr.String(); !strings.Contains(said, "; the tunnel has ended") {
		t.Errorf("it says %q", said)
	}
}

// tshark reads the capture from a pipe, as it comes, and shows the comments.
func TestCapture_tshark(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark")
	}
	a, _ := hosts(t)
	d := variants[0].upA(t, a)
	inside := newInjector(t, a, "t0", nil, "")
	cmd := exec.Command("sh", "-c", `"$0" capture t0 --drops -c 2 --runtime-dir "$1" | tshark -l -r - -T fields -e frame.interface_name -e frame.comment`, netlab.Binary(t), filepath.Dir(d.Socket()))
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var out, stderr netlab.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for deadline := time.After(netlab.Timeout()); ; {
		inside.send(withByte(datagram(aToB(12), 100), 8, 0))
		select {
		case err := <-done:
			if n := strings.Count(out.String(), "t0 (inner)\tdropped: inner-ttl-zero: "); err != nil || n != 2 || !strings.Contains(stderr.String(), "2 packets captured, 0 not written") {
				t.Errorf("tshark: %v\n%s%s", err, out.String(), stderr.String())
			}
			return
		case <-time.After(50 * time.Millisecond):
		case <-deadline:
			t.Fatalf("it does not end\n%s%s", out.String(), stderr.String())
		}
	}
}

// tshark lists the tunnel among its interfaces, and captures on it.
func TestCapture_extcap(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark")
	}
	a, _ := hosts(t)
	d := variants[0].upA(t, a)
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" --runtime-dir %s\n", netlab.Binary(t), filepath.Dir(d.Socket()))
	if err := os.WriteFile(filepath.Join(dir, "ipipd"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	folders, err := exec.Command("tshark", "-G", "folders").Output()
	_, path, ok := strings.Cut(string(folders), "\nExtcap path:")
	if path, _, _ = strings.Cut(path, "\n"); err != nil || !ok {
		t.Skipf("needs a tshark with extcap: %v\n%s", err, folders)
	}
	tshark := func(args ...string) *exec.Cmd { // with dir in the place of its folder
		cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", `mount --bind "$0" "$1" && shift && exec tshark "$@"`, dir, strings.TrimSpace(path)}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		return cmd
	}
	if out, err := tshark("-D").CombinedOutput(); err != nil || !strings.Contains(string(out), "ipipd-t0 (IP-in-IP tunnel t0)") {
		t.Fatalf("tshark -D: %v\n%s", err, out)
	}
	cmd := tshark("-i", "ipipd-t0", "-c", "2", "-T", "fields", "-e", "frame.comment")
	var out netlab.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	inside := newInjector(t, a, "t0", nil, "")
	for deadline := time.After(netlab.Timeout()); ; {
		inside.send(withByte(datagram(aToB(12), 100), 8, 0))
		select {
		case err := <-done:
			if n := strings.Count(out.String(), "dropped: inner-ttl-zero: "); err != nil || n != 2 {
				t.Errorf("tshark: %v\n%s", err, out.String())
			}
			return
		case <-time.After(50 * time.Millisecond):
		case <-deadline:
			_ = cmd.Process.Kill()
			t.Fatalf("it does not end\n%s", out.String())
		}
	}
}
