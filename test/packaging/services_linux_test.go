package packaging

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// scripts are the files of packaging that a shell runs.
var scripts = []string{
	"openwrt/ipipd.init", "openwrt/uci.sh", "openrc/ipipd.initd", "runit/run", "runit/check", "scripts/postinst", "scripts/postrm", "scripts/prerm",
}

func TestServices_shellcheck(t *testing.T) {
	needs(t, "shellcheck")
	for _, name := range scripts {
		shell := "sh"
		if strings.HasPrefix(name, "openwrt/") {
			shell = "busybox" // whose ash has local
			if out, err := exec.Command("shellcheck", "-s", shell, "/dev/null").CombinedOutput(); err != nil && strings.Contains(string(out), "Unknown shell") {
				shell = "dash" // before shellcheck 0.10
			}
		}
		if out, err := exec.Command("shellcheck", "-s", shell, "../../packaging/"+name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// rcCommon stands in for OpenWrt's rc.common: config_load reads a file in uci's format as shell, and procd's functions
// print their arguments.
const rcCommon = `
config() { config_cb "$1" "${2:-}"; }
option() { name=$1; shift; option_cb "$name" "$*"; }
list() { name=$1; shift; list_cb "$name" "$*"; }
config_load() { . "$UCI/$1"; config_cb; }
procd_open_instance() { :; }
procd_close_instance() { :; }
procd_set_param() { echo "procd $*"; }
. "$INIT"
`

// The configuration of uci is written as the equivalent YAML.
func TestServices_openwrt(t *testing.T) {
	dir := t.TempDir()
	run := func(uci, do string) (string, error) {
		t.Helper()
		if err := os.WriteFile(dir+"/ipipd", []byte(uci), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir+"/lib/ipipd", 0o755); err != nil {
			t.Fatal(err)
		}
		script, err := os.ReadFile("../../packaging/openwrt/uci.sh")
		if err == nil {
			err = os.WriteFile(dir+"/lib/ipipd/uci.sh", script, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		c := exec.Command("sh", "-c", rcCommon+do)
		c.Env = append(os.Environ(), "UCI="+dir, "IPKG_INSTROOT="+dir, "INIT=../../packaging/openwrt/ipipd.init", "CONFIG="+dir+"/etc/ipipd.yaml", "IPIPD="+netlab.Binary(t))
		out, err := c.CombinedOutput()
		return string(out), err
	}
	checked := func(file string) (tunnels []map[string]any) {
		t.Helper()
		out, err := exec.Command(netlab.Binary(t), "check", "--json", file).CombinedOutput()
		if err != nil || json.Unmarshal(out, &tunnels) != nil {
			t.Fatalf("check %s: %v\n%s", file, err, out)
		}
		return tunnels
	}
	want := filepath.Join(t.TempDir(), "want.yaml")
	if err := os.WriteFile(want, []byte(`log-level: debug
metrics-address: ":9469"
tunnels:
  - {name: ipip1, remote-address: 198.51.100.1, address: [10.255.0.1/30, 10.255.0.5/30], route: ["10.20.0.0/16 metric 5"], comment: "it's: #1 $HOME"}
  - {name: ipip2, disabled: yes, remote-address: vpn.example.net, keepalive: "off"}
`), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := run(`config tunnel 'ipip1'
	option remote_address '198.51.100.1'
	list address '10.255.0.1/30'
	list address '10.255.0.5/30'
	list route '10.20.0.0/16 metric 5'
	option comment 'it'\''s: #1 $HOME'

config ipipd
	option log_level 'debug'

config tunnel 'ipip2'
	option disabled 'yes'
	option remote_address 'vpn.example.net'
	option keepalive 'off'

config ipipd
	option metrics_address ':9469'

config other 'x'
	option what 'nothing'
	list which 'none'
`, "start_service")
	if err != nil || !strings.Contains(out, "procd command "+netlab.Binary(t)+" keep -- "+netlab.Binary(t)+" up --config "+dir+"/etc/ipipd.yaml\n") {
		t.Fatalf("start_service: %v\n%s", err, out)
	}
	got, wanted := checked(dir+"/etc/ipipd.yaml"), checked(want)
	if a, b := asJSON(got), asJSON(wanted); a != b || len(wanted) != 2 {
		text, _ := os.ReadFile(dir + "/etc/ipipd.yaml")
		t.Errorf("uci gives\n%s, want\n%s, by\n%s", a, b, text)
	}
	text, _ := os.ReadFile(dir + "/etc/ipipd.yaml")
	for _, line := range []string{"log-level: 'debug'\n", "metrics-address: ':9469'\n"} {
		if !strings.Contains(string(text), line) {
			t.Errorf("%q is missing in\n%s", line, text)
		}
	}
	if info, err := os.Stat(dir + "/etc/ipipd.yaml"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file, which may have secrets, has %v, %v", info.Mode(), err)
	}

	// A wrong configuration starts nothing, is reported, and leaves the file as it was.
	out, err = run("config tunnel 'ipip1'\n\toption remote_address 'nonsense nonsense'\n", "start_service")
	if err == nil || strings.Contains(out, "procd") || !strings.Contains(out, "nonsense") {
		t.Errorf("a wrong configuration: %v\n%s", err, out)
	}
	if now, _ := os.ReadFile(dir + "/etc/ipipd.yaml"); string(now) != string(text) {
		t.Errorf("a wrong configuration replaces the right one by\n%s", now)
	}
	example, err := os.ReadFile("../../packaging/openwrt/ipipd.config")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := run(string(example), "check"); err != nil || out != "/etc/config/ipipd is right\n" {
		t.Errorf("the example: %v\n%s", err, out)
	}
	if out, err := run("", "check"); err != nil {
		t.Errorf("no section: %v\n%s", err, out)
	}
}

func asJSON(v any) string {
	text, _ := json.MarshalIndent(v, "", " ")
	return string(text)
}

// supervised is a network namespace with /run of its own, where a service manager runs ipipd.
type supervised struct {
	*netlab.NS
	t    *testing.T
	bin  string // a folder with ipipd
	hold string // PID of a process in its mount namespace
}

// supervise returns a supervised whose mount namespace is prepared by script.
func supervise(t *testing.T, script string) *supervised {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	needs(t, "unshare", "nsenter")
	near, far := netlab.New(t), netlab.New(t)
	netlab.Veth(t, near, far, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	netlab.Up(t, far, "far", "--remote-address", "192.0.2.1", "--address", "10.255.0.2/30", "--allow-fast-path", "no")
	s := &supervised{NS: near, t: t, bin: t.TempDir()}
	binary, err := os.ReadFile(netlab.Binary(t))
	if err == nil {
		err = os.WriteFile(s.bin+"/ipipd", binary, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.configure("")
	ready := s.bin + "/ready"
	c := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec",
		"mount -t tmpfs none /run; "+script+"; touch "+ready+"; exec sleep infinity")
	log := &netlab.Buffer{}
	c.Stdout, c.Stderr = log, log
	near.Start(c)
	if !netlab.WaitFor(func() bool { _, err := os.Stat(ready); return err == nil || c.ProcessState != nil }) {
		t.Fatalf("the namespace is not ready: %s", log)
	}
	children, _ := os.ReadFile("/proc/" + strconv.Itoa(c.Process.Pid) + "/task/" + strconv.Itoa(c.Process.Pid) + "/children")
	s.hold = strings.TrimSpace(string(children))
	return s
}

// configure writes the configuration, with more properties of the tunnel.
func (s *supervised) configure(more string) {
	s.t.Helper()
	text := "tunnels: [{name: near, local-address: 192.0.2.1, remote-address: 192.0.2.2, address: 10.255.0.1/30, allow-fast-path: no" + more + "}]\n"
	if err := os.WriteFile(s.bin+"/ipipd.yaml", []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// in runs a command in the namespaces.
func (s *supervised) in(args ...string) (string, error) {
	return s.Try("nsenter", append([]string{"-t", s.hold, "-m", "-p", "--", "env", "PATH=" + s.bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "IPIPD_CONFIG=" + s.bin + "/ipipd.yaml"}, args...)...)
}

func (s *supervised) run(args ...string) string {
	s.t.Helper()
	out, err := s.in(args...)
	if err != nil {
		s.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// carries checks that packets cross the tunnel, and that the command reload has an effect.
func (s *supervised) carries(reload ...string) {
	s.t.Helper()
	netlab.Eventually(s.t, "a ping is answered", func() bool {
		_, err := s.Try("ping", "-c", "1", "-W", "1", "10.255.0.2")
		return err == nil
	})
	s.configure(", comment: reloaded")
	s.run(reload...)
	netlab.Eventually(s.t, "the reload is taken", func() bool {
		out, err := s.in("ipipd", "print", "near")
		return err == nil && strings.Contains(out, "reloaded")
	})
}

// index returns the index of the interface; "" without one.
func (s *supervised) index() string {
	out, err := s.Try("ip", "-o", "link", "show", "near")
	if err != nil {
		return ""
	}
	return out[:strings.Index(out, ":")]
}

func TestServices_runit(t *testing.T) {
	needs(t, "runsv", "sv")
	s := supervise(t, "true")
	dir := s.bin + "/service"
	if err := os.CopyFS(dir, os.DirFS("../../packaging/runit")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"run", "check"} {
		_ = os.Chmod(dir+"/"+name, 0o755) // which CopyFS takes from the umask
	}
	log := &netlab.Buffer{}
	c := exec.Command("nsenter", "-t", s.hold, "-m", "-p", "--", "env", "PATH="+s.bin+":/usr/sbin:/usr/bin:/sbin:/bin", "IPIPD_CONFIG="+s.bin+"/ipipd.yaml", "runsv", dir)
	c.Stdout, c.Stderr = log, log
	c.WaitDelay = time.Second // runsv ends with its namespace, after nsenter
	s.Start(c)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("runsv says:\n%s", log)
		}
	})
	netlab.Eventually(t, "runsv is there", func() bool { _, err := s.in("sv", "status", dir); return err == nil })
	s.run("sv", "-w", "60", "start", dir)
	s.carries("sv", "reload", dir)
	was := s.index()
	s.run("sv", "2", dir)
	netlab.Eventually(t, "the binary is started again", func() bool { return strings.Contains(log.String(), "the process is replaced") })
	s.run("sv", "-w", "60", "check", dir)
	if now := s.index(); now != was || was == "" {
		t.Errorf("after sv 2 the interface is %q, was %q", now, was)
	}
	s.run("sv", "-w", "60", "stop", dir)
	if left := s.index(); left != "" {
		t.Errorf("after the stop the interface is %s", left)
	}
}

func TestServices_openrc(t *testing.T) {
	needs(t, "openrc-run")
	s := supervise(t, "cd /run; mkdir openrc; cd openrc; mkdir starting started stopping inactive wasinactive failed hotplugged daemons options exclusive scheduled init.d tmp; touch softlevel; mount -t tmpfs none /etc/init.d; mkdir -p /etc/conf.d; mount -t tmpfs none /etc/conf.d")
	script, err := filepath.Abs("../../packaging/openrc/ipipd.initd")
	if err != nil {
		t.Fatal(err)
	}
	s.run("cp", script, "/etc/init.d/ipipd")
	s.run("sh", "-c", `printf '%s\n' "ipipd=`+s.bin+`/ipipd" "configuration=`+s.bin+`/ipipd.yaml" 'rc_need="!net"' >/etc/conf.d/ipipd`)
	service := func(what string) string {
		t.Helper()
		out, err := s.in("openrc-run", "/etc/init.d/ipipd", what)
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, out)
		}
		return out
	}
	service("start")
	s.carries("openrc-run", "/etc/init.d/ipipd", "reload")
	was := s.index()
	process := func() string { // not the children of the keeper that try the binary
		out, _ := s.in("sh", "-c", `for p in $(cat /proc/$(cat /run/ipipd.pid)/task/*/children); do tr '\0' ' ' </proc/$p/cmdline | grep -q '^[^ ]* up ' && echo $p; done`)
		return strings.TrimSpace(out)
	}
	before := process()
	service("upgrade")
	netlab.Eventually(t, "the binary is started again, and answers", func() bool {
		now := process()
		_, err := s.in("ipipd", "print", "near")
		return err == nil && now != "" && now != before
	})
	service("status")
	if now := s.index(); now != was || was == "" {
		t.Errorf("after the upgrade the interface is %q, was %q", now, was)
	}
	s.configure(", ttl: 999")
	if out, err := s.in("openrc-run", "/etc/init.d/ipipd", "reload"); err == nil || !strings.Contains(out, "ttl") {
		t.Errorf("a wrong reload: %v\n%s", err, out)
	}
	s.configure("")
	service("stop")
	if left := s.index(); left != "" {
		t.Errorf("after the stop the interface is %s", left)
	}
}

// Each script of these folders is in scripts, which shellcheck reads.
func TestServices_all(t *testing.T) {
	for _, dir := range []string{"openwrt", "openrc", "runit", "scripts"} {
		entries, err := os.ReadDir("../../packaging/" + dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if name := dir + "/" + e.Name(); !slices.Contains(scripts, name) && !slices.Contains([]string{"openwrt/ipipd.config", "openrc/ipipd.confd"}, name) {
				t.Errorf("%s is read by no test", name)
			}
		}
	}
}
