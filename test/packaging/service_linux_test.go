package packaging

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/test/netlab"
)

//go:embed boot.sh
var bootScript []byte

// rootPackages are the packages of the root, whose dependencies are added.
const rootPackages = "dpkg,libc-bin,base-files,base-passwd,bash,dash,coreutils,sed,grep,findutils,mawk,util-linux,passwd,systemd,systemd-sysv,init-system-helpers,iproute2,perl-base,debconf,tar,gzip,diffutils,make"

// root returns the folder of a Debian with systemd 253 or later, which is made once for this user.
func root(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no folder to keep a Debian in: %v", err)
	}
	dir := filepath.Join(cache, "ipipd-test", "trixie-2")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	needs(t, "mmdebstrap")
	_ = os.MkdirAll(filepath.Dir(dir), 0o755)
	next := fmt.Sprintf("%s.%d", dir, os.Getpid())
	if out, err := exec.Command("timeout", "300", "mmdebstrap", "--variant=custom", "--include="+rootPackages, "trixie", next).CombinedOutput(); err != nil {
		os.RemoveAll(next)
		t.Skipf("mmdebstrap makes no Debian: %v\n%.500s", err, out[max(0, len(out)-500):])
	}
	if err := os.Rename(next, dir); err != nil {
		t.Skip(err)
	}
	return dir
}

// guest is a Debian under systemd, in the network namespace near.
type guest struct {
	t    *testing.T
	near *netlab.NS
	pid  int // of its process 1
}

func boot(t *testing.T, near *netlab.NS) *guest {
	t.Helper()
	needs(t, "unshare", "nsenter", "make")
	dir := root(t)
	script := filepath.Join(t.TempDir(), "boot.sh")
	if err := os.WriteFile(script, bootScript, 0o755); err != nil {
		t.Fatal(err)
	}
	group := fmt.Sprintf("ipipd-test-%d", os.Getpid())
	log := &netlab.Buffer{}
	c := exec.Command("unshare", "--mount", "--kill-child", "--fork", script, dir, group)
	c.Stdout, c.Stderr = log, log
	near.Start(c)
	g := &guest{t: t, near: near}
	t.Cleanup(func() {
		if g.pid != 0 {
			_ = exec.Command("kill", "-9", strconv.Itoa(g.pid)).Run() // and with it all of its namespace
		}
		removeGroup(group)
	})
	booted := netlab.WaitFor(func() bool {
		if g.pid == 0 {
			g.pid = systemdBelow(c.Process.Pid)
		}
		out, _ := g.try("systemctl", "is-system-running")
		return strings.HasPrefix(out, "running") || strings.HasPrefix(out, "degraded")
	})
	if !booted {
		t.Skipf("systemd does not run in namespaces here: it needs CAP_SYS_ADMIN and a cgroup2: %s", log)
	}
	return g
}

// systemdBelow finds process 1 of the guest among the descendants of pid.
func systemdBelow(pid int) int {
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for child := range strings.FieldsSeq(string(children)) {
		n, _ := strconv.Atoi(child)
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", n)); string(comm) == "systemd\n" {
			return n
		}
		if found := systemdBelow(n); found != 0 {
			return found
		}
	}
	return 0
}

// removeGroup removes a cgroup and those below it, as soon as they are empty.
func removeGroup(name string) {
	script := `d=$(mktemp -d); mount --make-rprivate /; mount -t cgroup2 none "$d" && for i in 1 2 3 4 5 6 7 8 9; do find "$d/$1" -depth -type d -exec rmdir {} + 2>/dev/null; [ -e "$d/$1" ] || break; sleep 0.3; done; umount "$d"; rmdir "$d"`
	_ = exec.Command("unshare", "--mount", "bash", "-c", script, "-", name).Run()
}

func (g *guest) try(args ...string) (string, error) {
	if g.pid == 0 {
		return "", os.ErrNotExist
	}
	c := exec.Command("timeout", append([]string{"120", "nsenter", "-t", strconv.Itoa(g.pid), "-m", "-p", "-u", "-i", "-C", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, args...)...)
	var out []byte
	var err error
	g.near.Do(func() { out, err = c.CombinedOutput() })
	return string(out), err
}

func (g *guest) run(args ...string) string {
	g.t.Helper()
	out, err := g.try(args...)
	if err != nil {
		journal, _ := g.try("journalctl", "--no-pager", "-n", "15", "-o", "cat")
		g.t.Fatalf("%v: %v\n%s\n%s", args, err, out, journal)
	}
	return strings.TrimSpace(out)
}

// show returns a property of the service.
func (g *guest) show(property string) string {
	g.t.Helper()
	return g.run("systemctl", "show", "--value", "-p", property, "ipipd.service")
}

func (g *guest) write(file, text string) {
	g.t.Helper()
	g.run("sh", "-c", `mkdir -p "${1%/*}"; printf %s "$2" >"$1"`, "-", file, text)
}

// copy copies a file of the host into the guest.
func (g *guest) copy(from, to string) {
	g.t.Helper()
	f, err := os.Open(from)
	if err != nil {
		g.t.Fatal(err)
	}
	defer f.Close()
	c := exec.Command("nsenter", "-t", strconv.Itoa(g.pid), "-m", "--", "sh", "-c", "cat >"+to)
	c.Stdin = f
	if out, err := c.CombinedOutput(); err != nil {
		g.t.Fatalf("%v: %s", err, out)
	}
}

// stream sends numbered packets, 2,000 a second on an idle machine, until stop is closed, and ten at least.
type stream struct {
	sent uint32
	seen map[uint32]bool
	done sync.WaitGroup
}

func newStream(t *testing.T, from, to *netlab.NS, source, destination string, stop <-chan struct{}) *stream {
	t.Helper()
	var in, out net.Conn
	var err error
	local, _ := net.ResolveUDPAddr("udp4", source)
	remote, _ := net.ResolveUDPAddr("udp4", destination)
	to.Do(func() {
		var c *net.UDPConn
		if c, err = net.ListenUDP("udp4", remote); err == nil {
			err = c.SetReadBuffer(4 << 20)
		}
		in = c
	})
	if err != nil {
		t.Fatal(err)
	}
	from.Do(func() { out, err = net.DialUDP("udp4", local, remote) })
	if err != nil {
		t.Fatal(err)
	}
	s := &stream{seen: map[uint32]bool{}}
	interval := netlab.Scale(500 * time.Microsecond)
	s.done.Go(func() {
		defer out.Close()
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for begin := time.Now(); ; {
			<-tick.C
			for due := uint32(time.Since(begin) / interval); s.sent < due; s.sent++ {
				_, _ = out.Write(binary.BigEndian.AppendUint32(nil, s.sent))
			}
			select {
			case <-stop:
				if s.sent >= 10 {
					return
				}
			default:
			}
		}
	})
	s.done.Go(func() {
		defer in.Close()
		b := make([]byte, 10)
		for {
			_ = in.SetReadDeadline(time.Now().Add(netlab.Scale(3 * time.Second)))
			n, err := in.Read(b)
			if err != nil {
				select {
				case <-stop:
					return
				default:
					continue
				}
			}
			if n == 4 {
				s.seen[binary.BigEndian.Uint32(b)] = true
			}
		}
	})
	return s
}

// networks are the inner networks of the tunnels, each with .1 and .2: in userspace, encrypted, and on the fast path.
var networks = []string{"10.255.0", "10.255.1", "10.255.2"}

// during returns how many packets, of both directions, each of these networks loses while f runs.
func during(t *testing.T, near, far *netlab.NS, networks []string, what string, f func()) (lost [3]int) {
	t.Helper()
	stop := make(chan struct{})
	var streams []*stream
	for _, n := range networks {
		streams = append(streams, newStream(t, near, far, n+".1:5000", n+".2:5001", stop), newStream(t, far, near, n+".2:6000", n+".1:6001", stop))
	}
	f()
	close(stop)
	for i, s := range streams {
		s.done.Wait()
		var missing []uint32
		for n := range s.sent {
			if !s.seen[n] {
				missing = append(missing, n)
			}
		}
		t.Logf("%s, %s, %s: %d sent, %d lost: %v", what, networks[i/2], []string{"out", "in"}[i%2], s.sent, len(missing), missing[:min(len(missing), 20)])
		lost[i/2] += len(missing)
	}
	return lost
}

// fastPath returns what print says about the fast path of a tunnel, once it is active or refused.
func fastPath(g *guest, tunnel string) (text string) {
	g.t.Helper()
	netlab.Eventually(g.t, "the process says whether there is a fast path", func() bool {
		if m := regexp.MustCompile(`(?m)[^-]fast-path: (.*)$`).FindStringSubmatch(g.run("ipipd", "print", tunnel)); m != nil {
			text = m[1]
		}
		return text != "" && text != "starting"
	})
	return text
}

// A package is installed, configured, started, upgraded, removed and purged. Restarts in between lose few packets or none.
func TestService(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	needs(t, "make", "unshare", "nsenter")
	near, far := netlab.New(t), netlab.New(t)
	netlab.Veth(t, near, far, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	g := boot(t, near)
	netlab.Up(t, far, "far", "--remote-address", "192.0.2.1", "--address", "10.255.0.2/30", "--allow-fast-path", "no")
	for _, more := range []string{"192.0.2.3/24", "192.0.2.4/24"} {
		far.Run("ip", "address", "add", more, "dev", "eth0")
	}
	netlab.Up(t, far, "fast", "--local-address", "192.0.2.4", "--remote-address", "192.0.2.1", "--address", "10.255.2.2/30")
	// With many remotes it initiates no negotiation: there is one only, and not one by each end at once.
	netlab.Up(t, far, "encrypted", "--local-address", "192.0.2.3", "--remote-address", "any", "--address", "10.255.1.2/32", "--peers", "10.255.1.1/32=192.0.2.1",
		"--ipsec-exchange", "ike2", "--ipsec-secret", "correct horse battery staple")
	wire := netlab.WatchESP(t, far, "eth0", "192.0.2.3")
	// files returns those of the guest, without what dpkg, systemd and the tools for users and groups keep for themselves.
	files := func() []string {
		t.Helper()
		return strings.Fields(g.run("sh", "-c", `find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /var/log -o -path /var/lib/systemd -o -path /var/cache \) -prune -o -print |
			grep -v -E '^(/etc/(passwd|group|shadow|gshadow)-|/etc/\.pwd\.lock|/etc/\.updated|/var/\.updated|/var/lib/dpkg/.*|/run(/.*)?)$' | sort`))
	}
	before := files()
	if len(before) < 1000 {
		t.Fatalf("the root has only %q", before)
	}

	g.copy(deb(first(t), "1.0.0"), "/tmp/1.deb")
	g.copy(deb(build(t, "v1.0.1", "deb/"+runtime.GOARCH), "1.0.1"), "/tmp/2.deb")
	g.run("dpkg", "-i", "/tmp/1.deb")
	if state := g.show("ActiveState"); state != "inactive" {
		t.Errorf("a fresh install is %s", state)
	}
	g.run("systemctl", "start", "ipipd.service") // without a configuration
	if state := g.show("ActiveState"); state != "inactive" {
		t.Errorf("without a configuration it is %s", state)
	}
	if out, err := g.try("systemd-analyze", "verify", "--man=no", "ipipd.service", "ipipd@x.service"); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v, %s", err, out)
	}
	for _, unit := range []string{"ipipd.service", "ipipd@.service"} {
		if out, err := g.try("systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", "/usr/lib/systemd/system/"+unit); err != nil {
			t.Errorf("systemd-analyze security %s: %v\n%s", unit, err, out)
		}
	}

	// The lines of docs/install.md start the example, and another instance beside it.
	for line := range strings.Lines(block(t, "docs/install.md", "## The service\n\n```.*\n((?s:.*?))```")) {
		g.run("sh", "-c", line)
	}
	g.write("/etc/ipipd/instances/one.yaml", "tunnels: [{name: one, remote-address: 192.0.2.9}]\n")
	g.run("systemctl", "start", "ipipd@one.service")
	if out := g.run("ipipd", "print"); !strings.Contains(out, " ipip1 ") || !strings.Contains(out, " one ") {
		t.Errorf("the example and the instance: %s", out)
	}
	g.run("systemctl", "stop", "ipipd.service", "ipipd@one.service")
	g.run("rm", "/etc/ipipd/ipipd.yaml")

	const file = "/etc/ipipd/near.yaml"
	used, fast := networks[:2], ""
	configure := func(more string) {
		t.Helper()
		g.write(file, `tunnels:
- {name: near, local-address: 192.0.2.1, remote-address: 192.0.2.2, address: 10.255.0.1/30, allow-fast-path: no`+more+`}
- {name: encrypted, local-address: 192.0.2.1, remote-address: 192.0.2.3, address: 10.255.1.1/30, ipsec-exchange: ike2, ipsec-secret-file: /etc/ipipd/secret}
`+fast)
	}
	g.write("/etc/ipipd/secret", "correct horse battery staple\n")
	g.run("sh", "-c", "chown ipipd /etc/ipipd/secret && chmod 600 /etc/ipipd/secret")
	configure("")
	g.write("/run/systemd/system/ipipd.service.d/test.conf", "[Service]\nWatchdogSec=3s\n")
	g.run("systemctl", "daemon-reload")
	g.run("systemctl", "start", "ipipd.service")
	pinged := func() bool {
		for _, n := range used {
			if _, err := near.Try("ping", "-c", "1", "-W", "1", n+".2"); err != nil {
				return false
			}
		}
		return true
	}
	netlab.Eventually(t, "a ping is answered", pinged)
	// CAP_BPF is dropped where no tunnel may have the fast path.
	status, _ := g.try("sh", "-c", "grep -h -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' /proc/$(systemctl show --value -p MainPID ipipd)/status")
	uid := g.run("id", "-u", "ipipd")
	for _, want := range []string{"Uid:\t" + uid + "\t", "CapEff:\t0000000000003400\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
		if !strings.Contains(status, want) {
			t.Errorf("the process has\n%swant %q", status, want)
		}
	}
	if out := g.run("ipipd", "print", "near"); !strings.Contains(out, "remote-address: 192.0.2.2") {
		t.Errorf("root's print: %s", out)
	}

	link := func() string { return near.Run("ip", "-o", "link", "show", "near") }
	was := link()
	process := g.show("MainPID")
	anew := func(what string) {
		t.Helper()
		netlab.Eventually(t, what+": another process", func() bool {
			pid := g.show("MainPID")
			return pid != "0" && pid != process && g.show("ActiveState") == "active" && g.show("SubState") == "running"
		})
		if now := link(); now != was {
			t.Errorf("%s: the interface is\n%s, was\n%s", what, now, was)
		}
		netlab.Eventually(t, what+": pings are answered", pinged)
		process = g.show("MainPID")
	}
	negotiated := wire.Seen()
	for _, step := range []struct {
		what string
		do   []string
	}{
		{"restart", []string{"systemctl", "restart", "ipipd.service"}}, {"restart", []string{"systemctl", "restart", "ipipd.service"}},
		{"reload", []string{"systemctl", "reload", "ipipd.service"}}, {"upgrade", []string{"dpkg", "-i", "/tmp/2.deb"}},
	} {
		lost := during(t, near, far, used, step.what, func() {
			g.run(step.do...)
			if step.what != "reload" {
				anew(step.what)
			}
		})
		// None should be lost, and none was when this was last changed. Before, a restart lost up to two received packets,
		// probably since the carrier went off for a moment.
		for i, n := range lost {
			if n > 10 || n > 0 && step.what == "reload" {
				t.Errorf("%d packets are lost by the %s: %s", n, step.what, networks[i])
			}
		}
	}
	if out := g.run("ipipd", "--version"); !strings.HasPrefix(out, "ipipd 1.0.1 ") {
		t.Errorf("after the upgrade: %s", out)
	}
	lost := during(t, near, far, used, "kill -9", func() {
		g.run("sh", "-c", "kill -9 "+process)
		anew("kill -9")
	})
	for i, n := range lost {
		if n > 20 { // what it has read and not sent yet: a batch each direction
			t.Errorf("%d packets are lost by kill -9: %s", n, networks[i])
		}
	}

	// A reload shows its effect, and one that is refused changes nothing.
	configure(", comment: reloaded")
	g.run("systemctl", "reload", "ipipd.service")
	if out := g.run("ipipd", "print", "near"); !strings.Contains(out, "reloaded") {
		t.Errorf("after the reload: %s", out)
	}
	g.write(file, "tunnels: {}\n")
	_, _ = g.try("systemctl", "reload", "ipipd.service")
	if text := g.show("StatusText"); !strings.Contains(text, "not reloaded") || !pinged() {
		t.Errorf("after a wrong reload: %s", text)
	}
	configure("")

	// A stopped process does not feed the watchdog: systemd ends it, and starts another one.
	g.run("sh", "-c", "kill -STOP "+process)
	anew("watchdog")

	// The SAs have outlived all restarts.
	seen := wire.Seen()
	t.Logf("%+v, at the start %+v", seen, negotiated)
	if seen.Negotiating != negotiated.Negotiating || seen.SPIs != negotiated.SPIs || seen.Plain != 0 || seen.Repeated != 0 || seen.ESP < negotiated.ESP+10 {
		t.Errorf("encrypted: %+v, at the start %+v", seen, negotiated)
	}

	g.run("systemctl", "stop", "ipipd.service")
	if out, err := near.Try("ip", "link", "show", "near"); err == nil || g.show("ActiveState") != "inactive" {
		t.Errorf("after stop: %s, %s", g.show("ActiveState"), out)
	}

	// The fast path: as root, since another user may not be able to see that there is no legacy iptables. No packet of it is lost.
	used, fast = networks, "- {name: fast, local-address: 192.0.2.1, remote-address: 192.0.2.4, address: 10.255.2.1/30}\n"
	configure("")
	g.run("chown", "root", "/etc/ipipd/secret")
	g.write("/run/systemd/system/ipipd.service.d/test.conf", "[Service]\nUser=root\n")
	g.run("systemctl", "daemon-reload")
	g.run("systemctl", "start", "ipipd.service")
	netlab.Eventually(t, "a ping is answered", pinged)
	was, process = link(), g.show("MainPID")
	if why := fastPath(g, "fast"); why != "active" {
		t.Logf("no fast path here: %s", why)
	} else {
		for _, step := range [][]string{{"systemctl", "restart", "ipipd.service"}, {"systemctl", "kill", "-s", "KILL", "ipipd.service"}} {
			lost := during(t, near, far, used, step[1], func() {
				g.run(step...)
				anew(step[1])
			})
			if lost[0] > 20 || lost[1] > 20 || lost[2] > 0 {
				t.Errorf("%v packets are lost by %s", lost, step[1])
			}
			if why := fastPath(g, "fast"); why != "active" {
				t.Errorf("after %s: %s", step[1], why)
			}
		}
	}

	g.run("dpkg", "--remove", "ipipd")
	if out, err := near.Try("ip", "link", "show", "near"); err == nil {
		t.Errorf("after the removal: %s", out)
	}
	if left := g.run("sh", "-c", "find /etc /usr /run -xdev -name '*ipipd*' -not -path '/run/systemd/*' -not -path '/run/credentials/*'"); left != "/etc/ipipd" {
		t.Errorf("the removal leaves %q", left)
	}
	g.run("dpkg", "--purge", "ipipd")
	if left := g.run("sh", "-c", "find /run /var/lib -name '*ipipd*' -not -path '/run/systemd/*'; getent passwd ipipd || true; getent group ipipd || true"); left != "" {
		t.Errorf("the purge leaves %q", left)
	}
	if d := cmp.Diff(before, files()); d != "" {
		t.Errorf("the purge does not leave what was there before:\n%s", d)
	}
}
