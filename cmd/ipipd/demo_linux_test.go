package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"ipipd/test/netlab"
)

// demonstration is one run of `ipipd demo`, by itself in a network namespace.
type demonstration struct {
	t        *testing.T
	ns       *netlab.NS
	tmp      string // its TMPDIR
	cmd      *exec.Cmd
	out, err netlab.Buffer
}

// demonstrate starts a command line that runs `ipipd demo`.
func demonstrate(t *testing.T, args ...string) *demonstration {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs a TUN: %v", err)
	}
	d := &demonstration{t: t, ns: netlab.New(t), tmp: t.TempDir(), cmd: exec.Command(args[0], args[1:]...)}
	d.cmd.Env = append(os.Environ(), "TMPDIR="+d.tmp)
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.err
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a shell does, for Ctrl-C
	d.ns.Start(d.cmd)
	return d
}

// wait returns the exit status.
func (d *demonstration) wait() int {
	d.t.Helper()
	var exit *exec.ExitError
	if err := d.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	return d.cmd.ProcessState.ExitCode()
}

// fails checks that it fails with one line.
func (d *demonstration) fails(want string) {
	d.t.Helper()
	status := d.wait()
	if line := d.err.String(); status != 1 || strings.Count(line, "\n") != 1 || !regexp.MustCompile(want).MatchString(line) {
		d.t.Errorf("exit status %d, standard error %q, want 1 and one line with %q", status, line, want)
	}
}

// processes returns the demo's processes that run: its folder is in their arguments.
func (d *demonstration) processes() (pids []int) {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		d.t.Fatal(err)
	}
	for _, file := range all {
		if line, err := os.ReadFile(file); err == nil && bytes.Contains(line, []byte(d.tmp)) {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// leavesNothing checks that no process, file or interface of the demo is left.
func (d *demonstration) leavesNothing() {
	d.t.Helper()
	if pids := d.processes(); len(pids) > 0 {
		d.t.Errorf("the processes %v are left behind", pids)
	}
	if files, err := os.ReadDir(d.tmp); err != nil || len(files) > 0 {
		d.t.Errorf("in TMPDIR there are %v: %v", files, err)
	}
	if links := d.ns.Run("ip", "-o", "link"); strings.Count(links, "\n") != 1 {
		d.t.Errorf("where it ran there are\n%s", links)
	}
}

func TestDemoRun(t *testing.T) {
	for _, tt := range []struct {
		flags string
		want  []string
	}{
		{"", []string{"icmp_seq=3 ", `outer  IPv4 192\.0\.2\.1 > 192\.0\.2\.2, protocol 4 .*\n.*inner  IPv4 10\.255\.0\.1 > 10\.255\.0\.2, protocol 1`, "rx-packet: [1-9]"}},
		{"--encrypted", []string{"icmp_seq=3 ", `protocol 50 \(ESP\)`, "ipsec: established"}},
		{"--lossy", []string{"20 packets transmitted", "the cables lost [1-9]"}},
		{"--many 100", []string{"100 of 100 answer", `any \(100 remotes\)`, "99 R  ipip100 "}},
		{"--many 10 --encrypted --lossy", []string{"10 of 10 answer", "ipsec=yes", "the cables lost [1-9]"}},
		{"--mesh 5", []string{"20 of 20 answer", `any \(4 remotes\)`, `192\.0\.2\.5  1         ok`}},
		{"--mesh 3 --encrypted --lossy", []string{"6 of 6 answer", "ipsec=yes", "the cables lost [1-9]"}},
	} {
		t.Run(strings.ReplaceAll(tt.flags, " ", ""), func(t *testing.T) {
			t.Parallel()
			d := demonstrate(t, append([]string{netlab.Binary(t), "demo"}, strings.Fields(tt.flags)...)...)
			status := d.wait()
			for _, want := range append(tt.want, `state=running .* tx=[0-9.]+[kMG]?bit/s`, `[0-9.]+ MB arrived`, "are gone") {
				if !regexp.MustCompile(want).MatchString(d.out.String()) {
					t.Errorf("it does not say %q", want)
				}
			}
			if status != 0 || d.err.String() != "" || t.Failed() {
				t.Errorf("exit status %d\n%s%s", status, d.out.String(), d.err.String())
			}
			d.leavesNothing()
		})
	}
}

// Ctrl-C, which goes to all processes of the terminal's foreground, ends it in order.
func TestDemoRun_interrupted(t *testing.T) {
	for _, moment := range []string{"Two hosts", "One end", "TCP from a to b"} {
		t.Run(moment, func(t *testing.T) {
			t.Parallel()
			d := demonstrate(t, netlab.Binary(t), "demo", "--lossy")
			netlab.Eventually(t, "it says "+moment, func() bool { return strings.Contains(d.out.String(), moment) })
			if err := syscall.Kill(-d.cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			d.fails("^ipipd: interrupted: ")
			d.leavesNothing()
		})
	}
}

// A demo that is killed takes its tunnels with it.
func TestDemoRun_killed(t *testing.T) {
	d := demonstrate(t, netlab.Binary(t), "demo", "--mesh", "3", "--lossy")
	netlab.Eventually(t, "it has begun", func() bool { return strings.Contains(d.out.String(), "TCP from a to b") })
	if len(d.processes()) < 3 {
		t.Error("its processes are not found")
	}
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	d.wait()
	netlab.Eventually(t, "its processes have ended", func() bool { return len(d.processes()) == 0 })
}

// If the host lacks, or forbids, what a demo needs, it fails with one line.
func TestDemoRun_impossible(t *testing.T) {
	// A copy, since user nobody cannot open netlab.Binary, which is in /proc of this process.
	binary := filepath.Join(t.TempDir(), "ipipd")
	from, err := os.Open(netlab.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(binary, os.O_WRONLY|os.O_CREATE, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		t.Fatal(err)
	}
	const noRoot = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all"
	without := func(capability string) string {
		return "setpriv --bounding-set=-" + capability + " --inh-caps=-" + capability
	}
	for _, tt := range []struct{ name, needs, run, want string }{
		{"no-root", noRoot + " true", "exec " + noRoot + " $0 demo", "it takes root, or in a container --privileged"},
		{"no-tun", "unshare --mount true", `unshare --mount sh -c 'mount -t tmpfs none /dev/net && exec "$0" demo' $0`, "/dev/net/tun does not exist: (mkdir .* c 10 200|modprobe tun); in a container: "},
		{"no-namespaces", "unshare --user --map-root-user true", `unshare --user --map-root-user sh -c 'echo 0 >/proc/sys/user/max_net_namespaces && exec "$0" demo' $0`,
			`as many as may be \(sysctl user\.max_net_namespaces\)`},
		{"another-device", "unshare --mount true", `unshare --mount sh -c 'mount --bind /dev/null /dev/net/tun && exec "$0" demo' $0`, "/dev/net/tun is another kind of file: "},
		{"failed-up", without("net_raw") + " true", "exec " + without("net_raw") + " $0 demo", "host a: ipipd up: "},
		{"failed-cable", without("net_admin") + " true", "exec " + without("net_admin") + " $0 demo --lossy", "cannot make the TAP interface wire0: TUNSETIFF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if out, err := exec.Command("sh", "-c", tt.needs).CombinedOutput(); err != nil {
				t.Skipf("`%s` does not work here: %v: %s", tt.needs, err, out)
			}
			d := demonstrate(t, "sh", "-c", tt.run, binary)
			d.fails(tt.want)
			d.leavesNothing()
		})
	}
}
