package netlab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
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

	"golang.org/x/sys/unix"

	"ipipd/internal/warning"
)

// buildOnce builds ipipd once for all the tests of a process, as it is shipped. It returns
// a /proc path of the unlinked file, which goes with the process; on error the output of
// go build.
var buildOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "ipipd-test-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "ipipd")
	build := exec.Command("go", "build", "-o", path, "ipipd/cmd/ipipd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if raceDetector {
		build = exec.Command("go", "build", "-race", "-o", path, "ipipd/cmd/ipipd")
		build.Env = append(os.Environ(), "CGO_ENABLED=1")
	}
	if out, err := build.CombinedOutput(); err != nil {
		return string(out), err
	}
	// A raw descriptor: the garbage collector would close an os.File.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), nil
})

// Binary returns the path of ipipd, built from the tree under test.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := buildOnce()
	if err != nil {
		t.Fatalf("build ipipd: %v\n%s", err, path)
	}
	return path
}

// Daemon is a running `ipipd up` in a namespace.
type Daemon struct {
	t          testing.TB
	ns         *NS
	name       string
	runtimeDir string
	cmd        *exec.Cmd
	log        Buffer
	exited     chan struct{}
}

// RemoteIPsec is what a Status says about the SAs with one of many remotes.
type RemoteIPsec struct {
	Remote string `json:"remote-address"`
	IPsec  string `json:"ipsec"`
	SPI    string `json:"ipsec-spi"`
}

// Status is the part of `print --json` that tests use.
type Status struct {
	Name                 string            `json:"name"`
	RenamedFrom          string            `json:"renamed-from"`
	Running              bool              `json:"running"`
	WaitingFor           string            `json:"waiting-for"`
	Warnings             []Warning         `json:"warnings"`
	Restored             map[string]uint64 `json:"restored"`
	ActualMTU            int               `json:"actual-mtu"`
	PathMTU              int               `json:"path-mtu"`
	CurrentLocalAddress  string            `json:"current-local-address"`
	CurrentRemoteAddress string            `json:"current-remote-address"`
	CandidateRemote      string            `json:"candidate-remote-address"`
	KeepaliveState       string            `json:"keepalive-state"`
	FastPath             string            `json:"fast-path"`
	IPsec                string            `json:"ipsec"`
	IPsecSPI             string            `json:"ipsec-spi"`
	IPsecRemotes         []RemoteIPsec     `json:"ipsec-remotes"`
	RxPacket             uint64            `json:"rx-packet"`
	RxByte               uint64            `json:"rx-byte"`
	TxPacket             uint64            `json:"tx-packet"`
	TxByte               uint64            `json:"tx-byte"`
	Drops                map[string]uint64 `json:"drops"`
	ProcessDrops         map[string]uint64 `json:"process-drops"`
}

// Warning is a warning of a tunnel.
type Warning struct {
	Code   string    `json:"code"`
	Detail string    `json:"detail"`
	Remedy string    `json:"remedy"`
	Since  time.Time `json:"since"`
}

// Warning returns a warning, the zero Warning if it is not active.
func (s *Status) Warning(code warning.Code) (w Warning) {
	if i := slices.IndexFunc(s.Warnings, func(w Warning) bool { return w.Code == code.String() }); i >= 0 {
		w = s.Warnings[i]
	}
	return w
}

// Up starts `ipipd up --name NAME ARGS` in the namespace and returns when the tunnel is
// ready. A system call that the sandbox refuses kills it (--sandbox strict). The process is terminated with the test.
func Up(t testing.TB, ns *NS, name string, args ...string) *Daemon {
	t.Helper()
	d := Launch(t, ns, name, args...)
	d.awaitReady()
	return d
}

// UpConfig is Up with `ipipd up --config FILE`, and returns when its tunnels are ready. name is the
// tunnel that Status is about.
func UpConfig(t testing.TB, ns *NS, name, file string) *Daemon {
	t.Helper()
	d := &Daemon{t: t, ns: ns, name: name, runtimeDir: t.TempDir(), exited: make(chan struct{})}
	d.launch([]string{"up", "--config", file, "--runtime-dir", d.runtimeDir, "--sandbox", "strict"})
	d.awaitReady()
	return d
}

// Keep is Up under `ipipd keep`, which does what takes a capability. Signal, Stop and PID are about the keeper; Child is the
// process that it keeps.
func Keep(t testing.TB, ns *NS, name string, args ...string) *Daemon {
	t.Helper()
	return keep(t, ns, name, append([]string{"--name", name}, args...)...)
}

// KeepConfig is UpConfig under `ipipd keep`, as Keep is Up.
func KeepConfig(t testing.TB, ns *NS, name, file string) *Daemon {
	t.Helper()
	return keep(t, ns, name, "--config", file)
}

func keep(t testing.TB, ns *NS, name string, args ...string) *Daemon {
	t.Helper()
	d := &Daemon{t: t, ns: ns, name: name, runtimeDir: t.TempDir(), exited: make(chan struct{})}
	program := filepath.Join(t.TempDir(), "ipipd") // by another name keep would not know it
	if err := os.Symlink(Binary(t), program); err != nil {
		t.Fatal(err)
	}
	d.launch(append([]string{"keep", "--", program, "up", "--runtime-dir", d.runtimeDir, "--sandbox", "strict"}, args...))
	d.awaitReady()
	return d
}

// Child returns the PID of the process that a keeper keeps, 0 while there is none.
func (d *Daemon) Child() (pid int) {
	return KeptBy(d.PID())
}

// KeptBy returns the PID of the `ipipd up` that a keeper keeps, 0 while there is none. The keeper has other children, too:
// those that try its next binary.
func KeptBy(keeper int) (pid int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", keeper))
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		for child := range strings.FieldsSeq(string(children)) {
			line, _ := os.ReadFile("/proc/" + child + "/cmdline") // after fork and before execve it is the keeper's
			if args := strings.Split(string(line), "\x00"); len(args) > 1 && args[1] == "up" {
				pid, _ = strconv.Atoi(child)
				return pid
			}
		}
	}
	return 0
}

// AwaitSuccessor waits until a keeper has another child, whose tunnel is ready, and returns the PID of that.
func (d *Daemon) AwaitSuccessor(child int) (pid int) {
	d.t.Helper()
	Eventually(d.t, "the next process is ready", func() bool {
		pid = d.Child()
		return pid != 0 && pid != child && d.ready()
	})
	return pid
}

// ready reports whether the process answers for its tunnels.
func (d *Daemon) ready() bool {
	if _, err := os.Lstat(d.Socket()); err != nil { // cheaper than to run print
		return false
	}
	_, err := d.Run("print", d.name)
	return err == nil
}

// awaitReady waits until the tunnels are started.
func (d *Daemon) awaitReady() {
	d.t.Helper()
	Eventually(d.t, "the tunnel "+d.name+" is ready", func() bool {
		select {
		case <-d.exited:
			d.t.Fatalf("ipipd up ended: %v\n%s", d.cmd.ProcessState, d.Log())
		default:
		}
		return d.ready()
	})
}

// Launch is Up without waiting until the tunnel is ready.
func Launch(t testing.TB, ns *NS, name string, args ...string) *Daemon {
	t.Helper()
	d := &Daemon{t: t, ns: ns, name: name, runtimeDir: t.TempDir(), exited: make(chan struct{})}
	d.launch(append([]string{"up", "--name", d.name, "--runtime-dir", d.runtimeDir, "--sandbox", "strict"}, args...))
	return d
}

func (d *Daemon) launch(args []string) {
	d.t.Helper()
	d.cmd = exec.Command(Binary(d.t), args...)
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	var err error
	d.ns.Do(func() { err = d.cmd.Start() })
	if err != nil {
		d.t.Fatalf("%s: %v", strings.Join(d.cmd.Args, " "), err)
	}
	cmd, exited := d.cmd, d.exited
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	d.t.Cleanup(func() {
		d.end(syscall.SIGTERM)
		if strings.Contains(d.Log(), "DATA RACE") {
			d.t.Errorf("the race detector found a race in %s", d.name)
		}
		if d.t.Failed() {
			d.t.Logf("log of %s:\n%s", d.name, d.Log())
		}
	})
}

// PID returns the process ID in the test's PID namespace.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Socket returns the path of the control socket.
func (d *Daemon) Socket() string { return filepath.Join(d.runtimeDir, d.name+".sock") }

// end signals the process, waits until it has exited, and kills it after a timeout.
func (d *Daemon) end(signal os.Signal) {
	_ = d.cmd.Process.Signal(signal)
	select {
	case <-d.exited:
	case <-time.After(Timeout()):
		_ = d.cmd.Process.Kill()
		<-d.exited
		d.t.Errorf("ipipd did not end on %v", signal)
	}
}

// Signal sends a signal without waiting.
func (d *Daemon) Signal(signal os.Signal) { _ = d.cmd.Process.Signal(signal) }

// Stop terminates the process by signal and returns its exit status, -1 if the signal
// killed it.
func (d *Daemon) Stop(signal os.Signal) int {
	d.t.Helper()
	d.end(signal)
	return d.cmd.ProcessState.ExitCode()
}

// Wait waits for the process to exit by itself and returns its exit status.
func (d *Daemon) Wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(Timeout()):
		d.t.Fatalf("ipipd did not end by itself:\n%s", d.Log())
	}
	return d.cmd.ProcessState.ExitCode()
}

// Restart starts the same command line again, after Stop.
func (d *Daemon) Restart() *Daemon {
	d.t.Helper()
	next := &Daemon{t: d.t, ns: d.ns, name: d.name, runtimeDir: d.runtimeDir, exited: make(chan struct{})}
	next.launch(d.cmd.Args[1:])
	next.awaitReady()
	return next
}

// Log returns the process's output so far.
func (d *Daemon) Log() string { return d.log.String() }

// AwaitWarning waits until a warning is active, and returns it.
func (d *Daemon) AwaitWarning(code warning.Code) (w Warning) {
	d.t.Helper()
	Eventually(d.t, fmt.Sprintf("%s warns: %v", d.name, code), func() bool {
		s := d.Status()
		w = s.Warning(code)
		return w.Code != ""
	})
	return w
}

// AwaitNoWarning waits until a warning is not active.
func (d *Daemon) AwaitNoWarning(code warning.Code) {
	d.t.Helper()
	Eventually(d.t, fmt.Sprintf("%s does not warn: %v", d.name, code), func() bool {
		s := d.Status()
		return s.Warning(code).Code == ""
	})
}

// Run runs another command of ipipd on the same runtime directory.
func (d *Daemon) Run(args ...string) (output string, err error) {
	return d.ns.Try(Binary(d.t), append(args, "--runtime-dir", d.runtimeDir)...)
}

// Status runs `ipipd print --json`, and retries its timeouts: the machine may be overloaded.
func (d *Daemon) Status() Status {
	d.t.Helper()
	out, err := d.Run("print", d.name, "--json")
	for end := time.Now().Add(Timeout()); err != nil && strings.Contains(out, "does not answer within") && time.Now().Before(end); {
		out, err = d.Run("print", d.name, "--json")
	}
	if err != nil {
		d.t.Fatalf("ipipd print: %v\n%s", err, out)
	}
	var list []Status
	if err := json.NewDecoder(bytes.NewBufferString(out)).Decode(&list); err != nil || len(list) != 1 {
		d.t.Fatalf("ipipd print --json: %v: %s", err, out)
	}
	return list[0]
}

// Drops returns the drop counter of a reason: the tunnel's, or the process's.
func (d *Daemon) Drops(reason string) uint64 {
	d.t.Helper()
	return d.Status().AllDrops()[reason]
}

// AllDrops returns the tunnel's and the process's drop counters.
func (s Status) AllDrops() map[string]uint64 {
	all := maps.Clone(s.Drops)
	for reason, n := range s.ProcessDrops {
		all[reason] += n
	}
	return all
}

// Eventually polls a condition until it is true, and fails the test after Timeout.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !WaitFor(condition) {
		_, file, line, _ := runtime.Caller(1)
		t.Fatalf("%s:%d: it did not come true within %v that %s", filepath.Base(file), line, Timeout(), what)
	}
}

// WaitFor is Eventually that reports a timeout to its caller. It polls with exponential
// backoff, as most conditions start a process, which slows down the system under test. A
// few polls are always made: the kernel can stall all of a machine that makes namespaces.
func WaitFor(condition func() bool) bool {
	const leastPolls = 10
	pause, end := 5*time.Millisecond, time.Now().Add(Timeout())
	for polls := 1; !condition(); polls++ {
		if polls >= leastPolls && time.Now().After(end) {
			return false
		}
		time.Sleep(pause)
		pause = min(2*pause, 100*time.Millisecond)
	}
	return true
}
