package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ipipd/internal/sandbox"
	"ipipd/test/netlab"
)

// sandboxOf returns what print --json says about the sandbox of the process.
func sandboxOf(t *testing.T, d *netlab.Daemon) sandbox.State {
	t.Helper()
	out, err := d.Run("print", "--json")
	var all []struct {
		Sandbox sandbox.State `json:"sandbox"`
	}
	if err != nil || json.Unmarshal([]byte(out), &all) != nil || len(all) == 0 {
		t.Fatalf("%v, %s", err, out)
	}
	return all[0].Sandbox
}

// print, metrics and doctor show what a process may still do, as the kernel has it; an error says where it may read.
func TestSandbox(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	dir, elsewhere := t.TempDir(), t.TempDir()
	file := filepath.Join(dir, "ipipd.yaml")
	write := func(file, tunnels string) {
		t.Helper()
		if err := os.WriteFile(file, []byte("metrics-address: 127.0.0.1:9469\ntunnels:\n"+tunnels), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const t0 = "- {name: t0, remote-address: 192.0.2.2, allow-fast-path: no}\n"
	write(file, t0)
	d := netlab.UpConfig(t, a, "t0", file)
	checkCapabilities(t, d)

	s := sandboxOf(t, d)
	if s.Mode != sandbox.Strict || !s.Seccomp || !s.NoNewPrivs || s.EBPF {
		t.Errorf("%+v", s)
	}
	for _, c := range s.Capabilities {
		if c.Name == "CAP_BPF" || c.Why == "" {
			t.Errorf("%+v is left", c)
		}
	}
	out, err := d.Run("print", "t0")
	if err != nil || !strings.Contains(out, "sandbox: "+s.String()+"\n") || !strings.Contains(out, "capability: CAP_NET_ADMIN: interfaces") {
		t.Errorf("%v, %s", err, out)
	}
	out, err = a.Try("curl", "-sS", "http://127.0.0.1:9469/metrics")
	if series := fmt.Sprintf(`ipipd_sandbox_info{mode="strict",landlock_abi="%d",seccomp="true",no_new_privs="true",capabilities="CAP_NET_BIND_SERVICE,CAP_NET_ADMIN,CAP_NET_RAW"} 1`, s.Landlock); err != nil || !strings.Contains(out, series) {
		t.Errorf("%v, want %s in\n%s", err, series, regexp.MustCompile("(?m)^.*sandbox.*$").FindAllString(out, -1))
	}
	if out, _ = d.Run("doctor", "t0"); !strings.Contains(out, "(capabilities-left)") {
		t.Errorf("doctor: %s", out)
	}

	// A tunnel that is added has no fast path, and says why.
	if out, err := d.Run("add", "name=t1", "remote-address=192.0.2.3", "tun-queues=2"); err != nil {
		t.Fatalf("add: %v, %s", err, out)
	}
	if out, err := d.Run("print", "t1"); err != nil || !strings.Contains(out, "fast-path: no tunnel could have it when ipipd was started") {
		t.Errorf("%v, %s", err, out)
	}
	// A reload may read a new file in the place of the old one.
	write(file+".new", t0+"- {name: t2, remote-address: 192.0.2.4}\n")
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	if out, err := d.Run("reload"); err != nil {
		t.Errorf("reload: %v, %s", err, out)
	}

	if s.Landlock == 0 {
		t.Skip("needs Landlock: to have files refused")
	}
	write(filepath.Join(elsewhere, "ipipd.yaml"), t0)
	secret := filepath.Join(elsewhere, "secret")
	if err := os.WriteFile(secret, []byte("a long secret of some words"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`permission denied: the sandbox lets this process read what is in ` + regexp.QuoteMeta(dir) + `.*: put it there, or start ipipd again with it, or with --sandbox off; or with the secret itself, IPIPD_IPSEC_SECRET="\$\(cat FILE\)" ipipd set … ipsec-secret-file= ipsec-secret\n$`)
	if out, err := d.Run("set", "t0", "ipsec-secret-file="+secret); err == nil || !want.MatchString(out) || strings.Count(out, "\n") != 1 {
		t.Errorf("set: %v, %s", err, out)
	}
	if out, err := a.Try("env", "IPIPD_IPSEC_SECRET=a long secret of some words", netlab.Binary(t), "set", "t0", "ipsec-secret-file=", "ipsec-secret", "--runtime-dir", filepath.Dir(d.Socket())); err != nil {
		t.Errorf("set: %v, %s", err, out)
	}
	if out, err := d.Run("set", "t0", "ipsec-secret="); err != nil {
		t.Errorf("set: %v, %s", err, out)
	}
	// The command, not the process, reads the file that diff compares with.
	if out, err := d.Run("diff", filepath.Join(elsewhere, "ipipd.yaml")); err != nil || !strings.Contains(out, "t2: remove\n") {
		t.Errorf("diff: %v, %s", err, out)
	}
	if err := os.Rename(secret, filepath.Join(dir, "secret")); err != nil {
		t.Fatal(err)
	}
	if out, err := d.Run("set", "t0", "ipsec-secret-file="+filepath.Join(dir, "secret")); err != nil {
		t.Errorf("set: %v, %s", err, out)
	}
	checkCapabilities(t, d)
}

// With --sandbox off there is neither seccomp nor Landlock, which doctor warns of, and the process may read any file.
func TestSandbox_off(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	d := netlab.Up(t, a, "t0", "--remote-address", "192.0.2.2", "--sandbox", "off")
	s := sandboxOf(t, d)
	if s.Mode != sandbox.Off || s.Seccomp || s.Landlock != 0 || !s.NoNewPrivs || !s.EBPF {
		t.Errorf("%+v", s)
	}
	if out, _ := d.Run("doctor", "t0"); !strings.Contains(out, "(sandbox-not-whole)") {
		t.Errorf("doctor: %s", out)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("a long secret of some words"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := d.Run("set", "t0", "ipsec-secret-file="+filepath.Join(dir, "secret")); err != nil {
		t.Errorf("set: %v, %s", err, out)
	}
}
