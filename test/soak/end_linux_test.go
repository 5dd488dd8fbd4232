//go:build linux && soak

package soak

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// end is one of the two hosts, and its ipipd.
type end struct {
	s       *soak
	index   int
	name    string // a or b
	ns      *netlab.NS
	port    *port
	tunnels []tunnel
	dir     string // runtime directory and configuration
	file    string // the configuration
	log     *os.File
	logAt   int64 // up to where readLog has read

	lock     sync.Mutex
	cmd      *exec.Cmd // ipipd up, or ipipd keep
	exited   chan struct{}
	kept     bool
	expected bool              // it may exit
	vandals  int               // how often something was removed behind ipipd's back this round
	faulty   bool              // a system call has failed while it started, so that it may have ended
	first    map[int]resources // by PID
	traced   atomic.Bool       // its system calls fail
}

func (e *end) runtime() string { return filepath.Join(e.dir, "run") }

// write writes a configuration of these tunnels, with more appended.
func (e *end) write(tunnels []tunnel, more string) {
	text := "tunnels:\n"
	for _, t := range tunnels {
		text += t.yaml()
	}
	if err := os.WriteFile(e.file, []byte(text+more), 0o600); err != nil {
		e.s.t.Fatal(err)
	}
}

// start starts ipipd, under keep or not, in a time namespace with this offset of its clocks if it is not 0.
func (e *end) start(kept bool, offset time.Duration) {
	e.s.t.Helper()
	args := []string{*soakBinary, "up", "--config", e.file, "--runtime-dir", e.runtime(), "--metrics-address", "unix:" + e.metrics()}
	if kept {
		args = append([]string{*soakBinary, "keep", "--"}, args...)
	}
	if offset != 0 {
		seconds := strconv.Itoa(int(offset.Seconds()))
		args = append([]string{"unshare", "--time", "--monotonic", seconds, "--boottime", seconds}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = e.log, e.log
	var err error
	e.ns.Do(func() { err = cmd.Start() })
	if err != nil {
		e.s.t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	exited := make(chan struct{})
	e.lock.Lock()
	e.cmd, e.exited, e.kept, e.expected = cmd, exited, kept, false
	e.lock.Unlock()
	go func() {
		err := cmd.Wait()
		e.lock.Lock()
		expected := e.expected || e.faulty && cmd.ProcessState.ExitCode() == 1
		e.lock.Unlock()
		if !expected {
			e.s.failf("end %s: ipipd ended by itself: %v", e.name, err)
		}
		close(exited)
	}()
}

func (e *end) metrics() string { return filepath.Join(e.dir, "metrics") }

// running reports whether the process that start has started is there.
func (e *end) running() bool {
	select {
	case <-e.exited:
		return false
	default:
		return true
	}
}

// expectEnd notes that the process may exit from now on.
func (e *end) expectEnd() {
	e.lock.Lock()
	e.expected = true
	e.lock.Unlock()
}

// stop ends the process by a signal, and waits until it has gone.
func (e *end) stop(signal syscall.Signal) {
	e.expectEnd()
	if !e.running() {
		return
	}
	_ = e.cmd.Process.Signal(signal)
	select {
	case <-e.exited:
	case <-time.After(2 * netlab.Timeout()):
		e.s.failf("end %s: it does not end on %v", e.name, signal)
		if pid := e.pid(); pid != 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = e.cmd.Process.Kill()
		<-e.exited
	}
}

// pid returns the PID of ipipd up; 0 while there is none.
func (e *end) pid() int {
	if !e.running() {
		return 0
	}
	if !e.kept {
		return e.cmd.Process.Pid
	}
	return netlab.KeptBy(e.cmd.Process.Pid)
}

// kill sends a signal to ipipd up itself.
func (e *end) kill(signal unix.Signal) {
	if !e.kept && signal == unix.SIGKILL {
		e.stop(unix.SIGKILL)
		return
	}
	if pid := e.pid(); pid != 0 {
		_ = unix.Kill(pid, signal)
	}
}

// run runs a command of ipipd, and returns its output without the space around it.
func (e *end) run(args ...string) (string, error) {
	out, err := e.ns.Try(*soakBinary, append(args, "--runtime-dir", e.runtime())...)
	return strings.TrimSpace(out), err
}

// try runs a command of the host, which may fail: what it changes may be changed already.
func (e *end) try(line string) string {
	args := strings.Fields(line)
	out, _ := e.ns.Try(args[0], args[1:]...)
	return strings.TrimSpace(out)
}

// status returns what print shows, by tunnel.
func (e *end) status() (map[string]netlab.Status, error) {
	out, err := e.run("print", "--json")
	if err != nil {
		return nil, fmt.Errorf("print: %w: %s", err, out)
	}
	var list []netlab.Status
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("print: %w: %s", err, out)
	}
	all := map[string]netlab.Status{}
	for _, s := range list {
		all[s.Name] = s
	}
	return all, nil
}

// locals returns the outer addresses that this end has to have.
func (e *end) locals() (all []string) {
	for _, t := range e.tunnels {
		for _, p := range t.properties {
			if p.name == "local-address" {
				all = append(all, p.value)
			}
		}
	}
	return all
}

// restore undoes what events have changed in the network around ipipd.
func (e *end) restore() {
	e.lock.Lock()
	e.vandals = 0
	e.lock.Unlock()
	if e.running() {
		_ = e.cmd.Process.Signal(unix.SIGCONT)
		if pid := e.pid(); pid != 0 {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
	_ = os.Remove(e.s.logFile("filler"))
	e.port.setDark(false)
	e.port.set(impairment{})
	_ = e.port.setCarrier(true)
	e.try("nft delete table ip soak")
	e.try("ip rule del pref 100")
	e.try("tc qdisc del dev eth0 root")
	e.try("ip link set eth0 up mtu 1500")
	e.try(fmt.Sprintf("ip address replace 192.0.2.%d/24 dev eth0", 1+e.index))
	for _, local := range e.locals() {
		e.try("ip address del " + local + "/32 dev other0")
		e.try("ip address replace " + local + "/32 dev eth0")
	}
	for _, t := range e.tunnels {
		e.try("ip link set " + t.name + " up")
	}
	e.try("ip neigh flush dev eth0")
	e.try("ip route flush cache")
}

// reconfigure makes ipipd run with the tunnels that it began with. It returns what is in the way.
func (e *end) reconfigure() error {
	e.write(e.tunnels, "")
	if !e.running() {
		e.start(e.kept, 0)
	}
	out, err := e.run("reload")
	if err != nil {
		return fmt.Errorf("reload: %w: %s", err, out)
	}
	_, _ = e.run("confirm") // what an event has left to be confirmed
	out, err = e.run("diff")
	for line := range strings.Lines(out) {
		if !strings.HasSuffix(strings.TrimSpace(line), ": nothing") {
			return fmt.Errorf("after the reload diff says %s", line)
		}
	}
	return err
}

// healthy returns what keeps a tunnel of this end from running.
func (e *end) healthy() error {
	all, err := e.status()
	if err != nil {
		return err
	}
	if len(all) != len(e.tunnels) {
		return fmt.Errorf("it has %d tunnels", len(all))
	}
	for _, t := range e.tunnels {
		switch s := all[t.name]; {
		case s.Name == "":
			return fmt.Errorf("%s is missing", t.name)
		case !s.Running || s.WaitingFor != "":
			return fmt.Errorf("%s is not running: keepalive %q, waiting for %q, ipsec %q, warnings %v", t.name, s.KeepaliveState, s.WaitingFor, s.IPsec, s.Warnings)
		case t.fastPath && s.FastPath != "active":
			return fmt.Errorf("%s has no fast path: %s", t.name, s.FastPath)
		}
	}
	return nil
}

// badLog matches what no line of a log may be, died that a kept process has failed: the only words that a test may look for.
var (
	badLog = regexp.MustCompile(`(?m)^(panic|fatal error|runtime:|unexpected fault|WARNING: DATA RACE|goroutine \d+ \[).*$`)
	died   = regexp.MustCompile(`(?m)^.*has died.*cause="?exit.*$`)
)

// readLog looks at the new lines of the log.
func (e *end) readLog() {
	b, err := os.ReadFile(e.s.logFile(e.name))
	if err != nil || int64(len(b)) < e.logAt {
		e.s.failf("end %s: its log cannot be read: %v, %d bytes", e.name, err, len(b))
		return
	}
	bad := badLog.Find(b[e.logAt:])
	e.lock.Lock()
	if bad == nil && !e.faulty {
		bad = died.Find(b[e.logAt:])
	}
	e.faulty = false
	e.lock.Unlock()
	if bad != nil {
		e.s.failf("end %s: the log has %s", e.name, bad)
	}
	e.logAt = int64(len(b))
	if e.logAt > logSize/8 { // it is opened to append
		_ = os.Truncate(e.s.logFile(e.name), 0)
		e.logAt = 0
	}
}

// tail returns the end of the log.
func (e *end) tail() string {
	b, _ := os.ReadFile(e.s.logFile(e.name))
	return string(b[max(0, len(b)-20000):])
}
