package sandbox

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// child is this test binary, started again: it enters a sandbox, prints its State, and executes the test's commands,
// each a line that it answers with a line.
type child struct {
	t      *testing.T
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	errors strings.Builder
	state  State
}

// childPolicy is the environment variable with a child's Policy, in JSON.
const childPolicy = "SANDBOX_TEST_POLICY"

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(childPolicy); ok {
		runChild(text)
	}
	status := m.Run()
	if binary, err := testBinary(); err == nil {
		os.RemoveAll(filepath.Dir(binary))
	}
	os.Exit(status)
}

// spawn starts a child in the sandbox of p. prefix is a command to start it with, to remove capabilities.
func spawn(t *testing.T, p Policy, credential *syscall.Credential, env []string, prefix ...string) *child {
	t.Helper()
	policy, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := testBinary()
	if err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(prefix), binary)
	c := &child{t: t, cmd: exec.Command(args[0], args[1:]...)}
	c.cmd.Dir, c.cmd.Stderr = "/", &c.errors
	c.cmd.Env = append(append(os.Environ(), env...), childPolicy+"="+string(policy))
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	c.in, _ = c.cmd.StdinPipe()
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	t.Cleanup(func() {
		c.in.Close()
		c.cmd.Wait()
		if t.Failed() && c.errors.Len() > 0 {
			t.Logf("the child: %s", c.errors.String()[:min(c.errors.Len(), 4000)])
		}
	})
	line, err := c.out.ReadString('\n')
	if err != nil || json.Unmarshal([]byte(line), &c.state) != nil {
		t.Fatalf("the child says %q, %v; %s", line, err, c.errors.String())
	}
	return c
}

// testBinary is a copy of this binary that another user can execute. It is made once: while another test forks, a file that is
// written cannot be executed (ETXTBSY). It is in a folder of the test's process, which TestMain removes.
var testBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sandbox")
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "sandbox.test")
	text, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.WriteFile(binary, text, 0o755), os.Chmod(dir, 0o755))
	}
	return binary, err
})

// do has the child do something, and returns the error, "" for none, and whether it has survived.
func (c *child) do(what string) (text string, alive bool) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, what+"\n"); err != nil {
		return "", false
	}
	line, err := c.out.ReadString('\n')
	if err != nil {
		return "", false
	}
	if err := json.Unmarshal([]byte(line), &text); err != nil {
		c.t.Fatalf("the child says %q: %v", line, err)
	}
	return text, true
}

// status returns a hexadecimal field of /proc/PID/task/TID/status.
func status(t *testing.T, pid, tid, name string) uint64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", pid, "task", tid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+":\t"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("/proc/%s/task/%s/status has no %s", pid, tid, name)
	return 0
}

// checkThreads checks in /proc each thread's capabilities and seccomp mode, and what State says of them.
func (c *child) checkThreads(bounding, effective uint64) {
	t := c.t
	t.Helper()
	pid := strconv.Itoa(c.cmd.Process.Pid)
	threads, err := os.ReadDir(filepath.Join("/proc", pid, "task"))
	if err != nil || len(threads) < 5 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	seccomp := uint64(2)
	if c.state.Mode == Off {
		seccomp = 0
	}
	for _, thread := range threads {
		tid := thread.Name()
		for name, want := range map[string]uint64{
			"NoNewPrivs": 1, "Seccomp": seccomp, "CapBnd": bounding, "CapEff": effective, "CapPrm": effective, "CapInh": 0, "CapAmb": 0,
		} {
			if got := status(t, pid, tid, name); got != want {
				t.Errorf("thread %s: %s is %x, want %x", tid, name, got, want)
			}
		}
	}
	var left uint64
	for _, capability := range c.state.Capabilities {
		left |= 1 << slices.IndexFunc(capabilityNames(), func(name string) bool { return name == capability.Name })
		if capability.Why == "" {
			t.Errorf("%s is left without a reason", capability.Name)
		}
	}
	if left != effective {
		t.Errorf("capabilities %x are said to be left, and %x are", left, effective)
	}
}

func TestEnter_capabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to have capabilities to drop")
	}
	const kept = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE
	all := status(t, "self", strconv.Itoa(os.Getpid()), "CapBnd")
	for _, mode := range []string{Off, On, Strict} {
		withBPF := uint64(1 << unix.CAP_BPF)
		t.Run("root-"+mode, func(t *testing.T) {
			spawn(t, Policy{Mode: mode, EBPF: true}, nil, nil).checkThreads(all&(kept|withBPF), all&(kept|withBPF))
		})
	}
	t.Run("without-ebpf", func(t *testing.T) {
		spawn(t, Policy{Mode: On}, nil, nil).checkThreads(all&kept, all&kept)
	})
	t.Run("brokered", func(t *testing.T) { // its parent has the capabilities
		for _, mode := range []string{Off, On, Strict} {
			spawn(t, Policy{Mode: mode, EBPF: true, Sysctls: true, Brokered: true}, nil, nil).checkThreads(0, 0)
		}
	})
	t.Run("brokered-marks", func(t *testing.T) {
		want := uint64(1 << unix.CAP_NET_RAW)
		if !rawMarks() {
			want |= 1 << unix.CAP_NET_ADMIN
		}
		spawn(t, Policy{Mode: On, EBPF: true, Marks: true, Brokered: true}, nil, nil).checkThreads(all&want, all&want)
	})
	t.Run("unprivileged", func(t *testing.T) {
		spawn(t, Policy{Mode: On, EBPF: true}, &syscall.Credential{Uid: 65534, Gid: 65534}, nil).checkThreads(all, 0)
	})
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("needs setpriv (util-linux)")
	}
	t.Run("container", func(t *testing.T) { // with NET_RAW, and without NET_ADMIN and BPF
		spawn(t, Policy{Mode: On, EBPF: true}, nil, nil, "setpriv", "--bounding-set=-all,+net_raw,+setpcap,+chown").checkThreads(1<<unix.CAP_NET_RAW, 1<<unix.CAP_NET_RAW)
	})
	t.Run("container-without-setpcap", func(t *testing.T) {
		spawn(t, Policy{Mode: On, EBPF: true}, nil, nil, "setpriv", "--bounding-set=-all,+net_raw,+chown").checkThreads(1<<unix.CAP_NET_RAW|1<<unix.CAP_CHOWN, 1<<unix.CAP_NET_RAW)
	})
	t.Run("ambient", func(t *testing.T) { // as systemd's AmbientCapabilities=
		c := spawn(t, Policy{Mode: On, EBPF: true}, nil, nil, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all,+net_raw,+net_admin,+chown", "--inh-caps=-all,+net_raw,+net_admin,+chown", "--ambient-caps=-all,+net_raw,+net_admin,+chown")
		c.checkThreads(1<<unix.CAP_NET_RAW|1<<unix.CAP_NET_ADMIN|1<<unix.CAP_CHOWN, 1<<unix.CAP_NET_RAW|1<<unix.CAP_NET_ADMIN)
	})
}

// folders makes a runtime folder, a configuration's and another one, each with a file, and a Policy of the first two.
func folders(t *testing.T) (p Policy, other string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"run", "etc", "other"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "file"), []byte("text"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Policy{RuntimeDir: filepath.Join(dir, "run"), Read: []string{filepath.Join(dir, "etc", "file")}}, filepath.Join(dir, "other")
}

// Each attempt is refused inside the sandbox.
func TestEnter_refused(t *testing.T) {
	p, other := folders(t)
	p.Mode, p.Brokered = On, true
	p.Remove = []string{filepath.Dir(other)}
	c := spawn(t, p, nil, []string{"SANDBOX_TEST_OTHER=" + other})
	for _, a := range attempts {
		if a.landlock > 0 && a.landlock > c.state.Landlock || !c.state.Seccomp {
			t.Logf("%s is not tried: Landlock ABI %d, seccomp %v", a.name, c.state.Landlock, c.state.Seccomp)
			continue
		}
		text, alive := c.do(a.name)
		if !alive {
			t.Fatalf("%s: the child has died: %s", a.name, c.errors.String())
		}
		want := unix.EPERM.Error()
		if a.landlock > 0 && a.landlock != landlockScope {
			want = unix.EACCES.Error()
		}
		if !strings.HasSuffix(text, want) {
			t.Errorf("%s: %q, want %q", a.name, text, want)
		}
	}
	// Outside it root can do those that are possible: nothing else refuses them.
	outside := spawn(t, Policy{Mode: Off, EBPF: true}, nil, []string{"SANDBOX_TEST_OTHER=" + other, childOutside + "=1"})
	for _, a := range attempts {
		if !a.possible || os.Geteuid() != 0 {
			continue
		}
		if text, alive := outside.do(a.name); !alive || text != "" {
			t.Errorf("%s outside: %q, alive %v, want none", a.name, text, alive)
		}
	}
}

// In strict mode a refused system call kills the process by SIGSYS.
func TestEnter_strict(t *testing.T) {
	p, other := folders(t)
	p.Mode = Strict
	for _, a := range attempts {
		if a.landlock > 0 || !a.possible || a.capability {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			c := spawn(t, p, nil, []string{"SANDBOX_TEST_OTHER=" + other})
			if !c.state.Seccomp {
				t.Skip("needs seccomp")
			}
			if text, alive := c.do(a.name); alive {
				t.Fatalf("it lives: %q", text)
			}
			_ = c.cmd.Wait()
			if w := c.cmd.ProcessState.Sys().(syscall.WaitStatus); !w.Signaled() || w.Signal() != unix.SIGSYS {
				t.Errorf("it has ended by %v, want SIGSYS", c.cmd.ProcessState)
			}
		})
	}
}

// What a confined process needs is allowed in strict mode.
func TestEnter_allowed(t *testing.T) {
	p, other := folders(t)
	p.Mode, p.Names = Strict, true
	c := spawn(t, p, nil, []string{"SANDBOX_TEST_OTHER=" + other, "SANDBOX_TEST_RUN=" + p.RuntimeDir, "SANDBOX_TEST_READ=" + p.Read[0]})
	for _, n := range needs {
		text, alive := c.do(n.name)
		if !alive {
			_ = c.cmd.Wait()
			t.Fatalf("%s: the child has died: %v %s", n.name, c.cmd.ProcessState, c.errors.String())
		}
		if text != "" {
			t.Errorf("%s: %s", n.name, text)
		}
	}
}

// The system calls of Go's runtime are allowed in strict mode, whatever GODEBUG says.
func TestEnter_runtime(t *testing.T) {
	for _, debug := range []string{"", "gctrace=1,scavtrace=1,schedtrace=50", "madvdontneed=0,decoratemappings=1", "asyncpreemptoff=1,disablethp=1", "updatemaxprocs=1,profstackdepth=16"} {
		t.Run(debug, func(t *testing.T) {
			t.Parallel()
			c := spawn(t, Policy{Mode: Strict}, nil, []string{"GODEBUG=" + debug})
			if text, alive := c.do("runtime-load"); !alive || text != "" {
				_ = c.cmd.Wait()
				t.Errorf("%q, alive %v: %v %s", text, alive, c.cmd.ProcessState, c.errors.String())
			}
		})
	}
}

// Readable returns folders, of files and of what they link to, so that what replaces a file can be read.
func TestReadable(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "store", "conf.d"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"a/file", "store/file", "conf.d/one"} {
		if err := os.WriteFile(in(name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"b/link": "../store/file", "conf.d/two": "../store/file"} {
		if err := os.Symlink(to, in(link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ path, want []string }{
		{[]string{in("a/file")}, []string{in("a")}},
		{[]string{in("b/link")}, []string{in("b"), in("store")}},
		{[]string{in("conf.d")}, []string{in("conf.d"), in("store")}},
		{[]string{in("a/missing"), in("a/file")}, []string{in("a")}},
		{[]string{"/file-in-root"}, []string{"/file-in-root"}},
		{[]string{"/dev/null"}, nil},
	} {
		if got := Readable(c.path...); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.path, got, c.want)
		}
	}
}

func capabilityNames() []string {
	names := make([]string, 64)
	for i, name := range map[int]string{unix.CAP_CHOWN: "CAP_CHOWN", unix.CAP_NET_ADMIN: "CAP_NET_ADMIN", unix.CAP_NET_RAW: "CAP_NET_RAW", unix.CAP_NET_BIND_SERVICE: "CAP_NET_BIND_SERVICE", unix.CAP_BPF: "CAP_BPF"} {
		names[i] = name
	}
	return names
}

// runChild is the process that spawn starts. It does not return.
func runChild(policy string) {
	for range 4 { // as in the data path
		go func() {
			runtime.LockOSThread()
			for {
				rawPoll()
			}
		}()
	}
	runtime.GOMAXPROCS(runtime.NumCPU() + 4)
	var p Policy
	err := json.Unmarshal([]byte(policy), &p)
	prepareChild()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	s := &State{Mode: Off}
	if os.Getenv(childOutside) == "" {
		s = Enter(p)
	}
	go func() { // a thread that starts afterwards
		runtime.LockOSThread()
		select {}
	}()
	runtime.Gosched()
	say := json.NewEncoder(os.Stdout)
	_ = say.Encode(s)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		err := fmt.Errorf("nobody knows what %q is", in.Text())
		for _, a := range slices.Concat(attempts, needs) {
			if a.name == in.Text() {
				err = a.do()
			}
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		_ = say.Encode(text)
	}
	os.Exit(0)
}

// rawPoll blocks in a system call that the Go scheduler does not know of.
//
//go:noinline
func rawPoll() {
	timeout := unix.NsecToTimespec(int64(100 * time.Millisecond))
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
}
