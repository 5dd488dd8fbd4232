package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// build builds an ipipd with variables that the linker sets.
func build(t *testing.T, variables ...string) (program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "ipipd")
	c := exec.Command("go", "build", "-o", program, "-ldflags", "-X "+strings.Join(variables, " -X "), "ipipd/cmd/ipipd")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// flood sends packets, 100 every millisecond on an idle machine, until stop is closed.
type flood struct {
	sent, received uint64      // received has those, too, that the receiving socket had no room for
	all            atomic.Bool // sent is final
	from           net.PacketConn
	to             *net.UDPConn
	ns             *netlab.NS
	done           sync.WaitGroup
}

func newFlood(t *testing.T, from, to *netlab.NS, source, destination string, stop <-chan struct{}) *flood {
	t.Helper()
	f := &flood{ns: to}
	remote, err := net.ResolveUDPAddr("udp4", destination)
	if err != nil {
		t.Fatal(err)
	}
	to.Do(func() { f.to, err = net.ListenUDP("udp4", remote) })
	if err == nil {
		from.Do(func() { f.from, err = net.ListenPacket("udp4", source) })
	}
	if err != nil {
		t.Fatal(err)
	}
	f.done.Go(func() {
		packet := make([]byte, 1000)
		for {
			select {
			case <-stop:
				f.all.Store(true)
				return
			case <-time.After(netlab.Scale(time.Millisecond)):
			}
			for range 100 {
				if _, err := f.from.WriteTo(packet, remote); err == nil {
					f.sent++
				}
			}
		}
	})
	f.done.Go(func() {
		b := make([]byte, 2000)
		for read := time.Now(); ; {
			_ = f.to.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := f.to.Read(b); err == nil {
				f.received++
				read = time.Now()
			} else if f.all.Load() && f.received+f.overflow(t) == f.sent || time.Since(read) > netlab.Scale(3*time.Second) {
				return
			}
		}
	})
	return f
}

// overflow returns how many packets the receiving socket had no room for.
func (f *flood) overflow(t *testing.T) (n uint64) {
	port := fmt.Sprintf(":%04X ", f.to.LocalAddr().(*net.UDPAddr).Port)
	out, err := f.ns.Try("cat", "/proc/net/udp")
	for line := range strings.Lines(out) {
		if fields := strings.Fields(line); err == nil && strings.Contains(line, port) {
			n, err = strconv.ParseUint(fields[len(fields)-1], 10, 64)
		}
	}
	if err != nil {
		t.Error(err)
	}
	return n
}

// lost returns how many packets have not come to the receiving socket.
func (f *flood) lost(t *testing.T) int {
	t.Helper()
	f.done.Wait()
	f.received += f.overflow(t)
	f.from.Close()
	f.to.Close()
	return int(f.sent) - int(f.received)
}

// Without a process, or with one that is stopped, the fast path goes on for aliveFor and no longer.
func TestKeeper_fastPath(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	t.Parallel()
	a, b := netlab.New(t), netlab.New(t)
	// With keepalive userspace receives until the peer is heard.
	k := newKeptTunnel(t, a, b, build(t, "ipipd/internal/fastpath.aliveFor=5s"), "--remote-address", "192.0.2.2", "--address", "10.255.0.1/30", "--keepalive", "off")
	pid := k.ready(1)
	k.pings()
	var why string
	if !netlab.WaitFor(func() bool { why = k.status("near").FastPath; return why == "active" }) {
		t.Skipf("no fast path here: %s", why)
	}
	answered := netlab.Echo(t, a, "10.255.0.1", b, "10.255.0.2")
	_ = unix.Kill(pid, unix.SIGSTOP)
	if !answered(3 * time.Second) {
		t.Error("the kernel does not go on")
	}
	netlab.Eventually(t, "the kernel carries no packets any more", func() bool { return !answered(time.Second) })
	_ = unix.Kill(pid, unix.SIGKILL)
	k.ready(2)
	k.logs(`there was no process for so long that the kernel has carried no more packets" .*fast-path-packets=\d+`)
	k.pings()
	k.signal(unix.SIGTERM)
	k.ends(0)
	netlab.Eventually(t, "the interface is gone", func() bool { _, err := a.Try("ip", "link", "show", "near"); return err != nil })
}

// A service manager keeps one link per device, however many tunnels and processes there are, and links that a new
// configuration does not need are removed.
func TestNotifier_fastPath(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	dir := shortDir(t)
	b.Start(exec.Command("ipipd", "up", "--remote-address", "192.0.2.1", "--name", "far", "--address", "10.255.0.2/30", "--runtime-dir", filepath.Join(dir, "far")))
	m := netlab.NewServiceManager(t, 100)
	file := filepath.Join(dir, "ipipd.yaml")
	const near = "tunnels:\n- {name: near, remote-address: 192.0.2.2, address: 10.255.0.1/30}\n"
	start := func(text string) (cmd *exec.Cmd, log *netlab.Buffer) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd, log = exec.Command("ipipd", "up", "--config", file, "--runtime-dir", filepath.Join(dir, "near")), &netlab.Buffer{}
		cmd.Stderr = log
		a.Do(func() { m.Start(cmd) })
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("log:\n%s", log)
			}
		})
		netlab.Eventually(t, "a ping is answered", func() bool {
			_, err := a.Try("ping", "-c", "1", "-W", "1", "10.255.0.2")
			return err == nil && strings.Contains(log.String(), "name=near")
		})
		return cmd, log
	}
	stored := func(prefix string) (n int) {
		for _, name := range m.Stored() {
			if strings.HasPrefix(name, prefix) {
				n++
			}
		}
		return n
	}
	fast := func() (text string) {
		netlab.Eventually(t, "the process answers", func() bool {
			out, err := a.Try("ipipd", "print", "near", "--runtime-dir", filepath.Join(dir, "near"))
			if found := regexp.MustCompile(`[^-]fast-path: (.*)`).FindStringSubmatch(out); err == nil && found != nil {
				text = found[1]
			}
			return text != "" && text != "starting"
		})
		return text
	}
	cmd, _ := start(near + "- {name: other, remote-address: 192.0.2.3}\n")
	if why := fast(); why != "active" {
		t.Skipf("no fast path here: %s", why)
	}
	for _, next := range []string{near, near, strings.Replace(near, "}", ", allow-fast-path: no}", 1), near} {
		if n, counts := stored("fast-path-link-"), stored("fast-path-counts-"); n != 1 || counts != 3 {
			t.Errorf("%d links and %d maps are kept: %q", n, counts, m.Stored())
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		var log *netlab.Buffer
		cmd, log = start(next)
		if strings.Contains(log.String(), "anew") || len(m.Warnings()) > 0 {
			t.Errorf("%s%q", log, m.Warnings())
		}
		_, err := a.Try("ip", "link", "show", "other")
		filter := strings.Contains(a.Run("tc", "filter", "show", "dev", "near", "egress"), "ipip_encap")
		if want := !strings.Contains(next, "no}"); err == nil || filter != want || (fast() == "active") != want {
			t.Errorf("the other tunnel: %v, the program: %v, %s", err, filter, fast())
		} else if !want {
			netlab.Eventually(t, "nothing of the fast path is kept", func() bool { return stored("fast-path-") == 0 })
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			cmd, _ = start(near)
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	m.Release()
	netlab.Eventually(t, "the interface is gone", func() bool { _, err := a.Try("ip", "link", "show", "near"); return err != nil })
}
