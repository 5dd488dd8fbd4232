package netlab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/lab"
)

// NS is a network namespace of a test, with the loopback interface up and IPv6 off, so that
// its links carry the test's packets only. It is not in /run/netns: the test process holds
// the only reference, so that even a killed test leaves nothing behind.
type NS struct {
	t         testing.TB
	namespace *lab.Namespace
}

// New creates a network namespace for the duration of the test. It skips the test without
// CAP_SYS_ADMIN.
func New(t testing.TB) *NS {
	t.Helper()
	namespace, err := lab.NewNamespace()
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs root (CAP_SYS_ADMIN) to make a network namespace")
	} else if err != nil {
		t.Fatal(err)
	}
	ns := &NS{t: t, namespace: namespace}
	t.Cleanup(func() { namespace.Close() })
	// An error means that the kernel has no IPv6.
	for _, which := range []string{"all", "default"} {
		ns.Do(func() { _ = writeSysctl("net.ipv6.conf."+which+".disable_ipv6", "1") })
	}
	ns.Run("ip", "link", "set", "lo", "up")
	return ns
}

// Path returns a path of the namespace, for `ip link set … netns PATH` and nsenter --net=PATH. It is
// valid while the test process runs.
func (ns *NS) Path() string { return ns.namespace.Path() }

// Do calls f on a thread in the namespace. Sockets that f opens and processes that f starts
// belong to the namespace; goroutines that f starts do not. f may call t.Fatal, and Do of
// another namespace.
//
// In f use /proc/thread-self/net: /proc/net is the main thread's.
func (ns *NS) Do(f func()) {
	ns.t.Helper()
	if err := ns.namespace.Do(func() error { f(); return nil }); err != nil {
		ns.t.Fatalf("enter and leave a network namespace: %v", err)
	}
}

// TAP makes a TAP interface in the namespace for the duration of the test, with a frame for each read
// and write of its file.
func (ns *NS) TAP(name string) *os.File {
	ns.t.Helper()
	file, err := lab.End{Namespace: ns.namespace, Name: name}.TAP()
	if err != nil {
		ns.t.Fatal(err)
	}
	ns.t.Cleanup(func() { file.Close() })
	return file
}

// Start starts cmd in the namespace. The caller may wait for it; it is killed with the test.
func (ns *NS) Start(cmd *exec.Cmd) {
	ns.t.Helper()
	if err := ns.namespace.Start(cmd); err != nil {
		ns.t.Fatalf("%s: %v", strings.Join(cmd.Args, " "), err)
	}
	ns.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
}

// Try runs a command in the namespace and returns its standard output and error.
func (ns *NS) Try(name string, args ...string) (output string, err error) {
	ns.t.Helper()
	cmd := exec.Command(name, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err = ns.namespace.Start(cmd); err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// Run is Try for a command that must succeed.
func (ns *NS) Run(name string, args ...string) (output string) {
	ns.t.Helper()
	output, err := ns.Try(name, args...)
	if err != nil {
		ns.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, output)
	}
	return output
}

// Sysctl sets a kernel parameter of the namespace, such as net.ipv4.ip_forward.
func (ns *NS) Sysctl(name, value string) {
	ns.t.Helper()
	var err error
	ns.Do(func() { err = writeSysctl(name, value) })
	if err != nil {
		ns.t.Fatalf("set %s to %s: %v", name, value, err)
	}
}

// writeSysctl writes to the namespace of the calling thread, which is what files below
// /proc/sys/net refer to. It does not support interface names with a dot.
func writeSysctl(name, value string) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
	return os.WriteFile(path, []byte(value), 0)
}

// End is one end of a veth pair.
type End struct {
	Name    string // interface name
	Address string // IPv4 address in CIDR notation; "" gives it none
	MTU     int    // bytes; 0 leaves the kernel's 1500
}

// Veth joins two namespaces by a veth pair, sets both ends up, and returns when they are
// operational.
func Veth(t testing.TB, a, b *NS, endA, endB End) {
	t.Helper()
	if err := lab.Veth(lab.End{Namespace: a.namespace, Name: endA.Name}, lab.End{Namespace: b.namespace, Name: endB.Name}); err != nil {
		t.Fatal(err)
	}
	ends := []struct {
		ns *NS
		End
	}{{a, endA}, {b, endB}}
	for _, x := range ends {
		if x.MTU != 0 {
			x.ns.Run("ip", "link", "set", "dev", x.Name, "mtu", fmt.Sprint(x.MTU))
		}
		if x.Address != "" {
			x.ns.Run("ip", "address", "add", x.Address, "dev", x.Name)
		}
		x.ns.Run("ip", "link", "set", "dev", x.Name, "up")
	}
	// The kernel handles a carrier change asynchronously. Until then it drops packets
	// without an error.
	for _, x := range ends {
		Eventually(t, x.Name+" is up", func() bool {
			return strings.Contains(x.ns.Run("ip", "link", "show", "dev", x.Name), "state UP")
		})
	}
}
