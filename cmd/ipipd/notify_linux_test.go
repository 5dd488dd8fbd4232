package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/config"
	"ipipd/test/netlab"
)

const notifyEnv = "NOTIFY_SOCKET"

// manager is the socket of a service manager.
type manager struct {
	t      *testing.T
	socket *net.UnixConn
}

func newManager(t *testing.T, name string) *manager {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv(notifyEnv, name)
	return &manager{t, c}
}

// wants reads a message, which must match pattern.
func (m *manager) wants(pattern string) string {
	m.t.Helper()
	b := make([]byte, 1024)
	if err := m.socket.SetReadDeadline(time.Now().Add(netlab.Timeout())); err != nil {
		m.t.Fatal(err)
	}
	n, err := m.socket.Read(b)
	if got := string(b[:n]); err != nil || !regexp.MustCompile("^"+pattern+"$").MatchString(got) {
		m.t.Fatalf("%q, %v, want %s", got, err, pattern)
	}
	return string(b[:n])
}

// reloads reads the message that begins a reload, whose CLOCK_MONOTONIC must be after since.
func (m *manager) reloads(since unix.Timespec) {
	m.t.Helper()
	_, usec, _ := strings.Cut(m.wants(`RELOADING=1\nMONOTONIC_USEC=\d+`), "USEC=")
	if n, err := strconv.ParseInt(usec, 10, 64); err != nil || n < since.Nano()/1000 {
		m.t.Errorf("it is at %s, and was asked for at %d", usec, since.Nano()/1000)
	}
}

func monotonic() (now unix.Timespec) {
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return now
}

// The service manager is notified from the start to the end, by a path or an abstract address.
func TestNotifier(t *testing.T) {
	dir := shortDir(t)
	for _, name := range []string{filepath.Join(dir, "notify"), "@ipipd-test-" + filepath.Base(dir)} {
		m := newManager(t, name)
		file := filepath.Join(dir, "ipipd.yaml")
		write := func(text string) {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("tunnels: [{name: t-fake, remote-address: 198.51.100.1}]")
		run := shortDir(t)
		log := &netlab.Buffer{}
		o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{log, log}, Paths: []string{file}, open: openList}
		o.RuntimeDir, o.given = run, map[string]bool{"runtime-dir": true}
		ended := make(chan error, 1)
		go func() { ended <- upRun(t.Context(), o) }()
		m.wants("STATUS=1 tunnel")
		m.wants("READY=1")
		if _, is := os.LookupEnv(notifyEnv); is {
			t.Error("children have the variable, too")
		}
		write("tunnels: [{name: t-fake, remote-address: 198.51.100.1}, {name: b, disabled: yes, remote-address: 198.51.100.1}]")
		since := monotonic()
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		m.reloads(since)
		m.wants("STATUS=2 tunnels, 1 disabled")
		m.wants("READY=1")
		write("tunnels: {}")
		since = monotonic()
		if status, _, _ := command("reload", "--runtime-dir", run); status != 2 {
			t.Errorf("reload of a wrong file: status %d", status)
		}
		m.reloads(since)
		m.wants("STATUS=the configuration is not reloaded: .*ipipd.yaml:1:10: .*")
		m.wants("READY=1")
		if status, _, errs := command("enable", "b", "--confirm", "1h", "--runtime-dir", run); status != 0 {
			t.Errorf("enable: status %d, %s", status, errs)
		}
		m.wants("STATUS=2 tunnels")
		m.wants("STATUS=2 tunnels; not confirmed: undone at .*")
		syscall.Kill(os.Getpid(), syscall.SIGTERM)
		m.wants("STOPPING=1")
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// The watchdog is reset while the tunnels' controls respond, and not otherwise.
func TestNotifierWatch(t *testing.T) {
	m := newManager(t, filepath.Join(shortDir(t), "notify"))
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	log := &netlab.Buffer{}
	n := newNotifier(textLogger(log))
	for _, name := range []string{"WATCHDOG_USEC", "WATCHDOG_PID"} {
		if _, is := os.LookupEnv(name); is {
			t.Errorf("children have %s, too", name)
		}
	}
	asked := make(chan bool)
	var dead atomic.Bool
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.watch(ctx, func(within time.Duration) error {
			asked <- true
			if within != 10*time.Millisecond {
				t.Errorf("asked within %v", within)
			}
			if dead.Load() {
				return errors.New("ipip1: its control does nothing")
			}
			return nil
		})
	}()
	for range 2 {
		<-asked
		m.wants("WATCHDOG=1")
	}
	dead.Store(true)
	<-asked
	<-asked // the one before has sent nothing
	n.say("last")
	m.wants("STATUS=last")
	stop()
	for ended := false; !ended; {
		select {
		case <-asked:
		case <-done:
			ended = true
		}
	}
	if !strings.Contains(log.String(), "its control does nothing") {
		t.Errorf("the log: %s", log)
	}
}

// Without a watchdog, or with one of another process, watch does nothing.
func TestNotifierWatch_none(t *testing.T) {
	for _, pid := range []string{"1", ""} {
		newManager(t, filepath.Join(shortDir(t), "notify"))
		t.Setenv("WATCHDOG_USEC", map[string]string{"1": "30000", "": "x"}[pid])
		t.Setenv("WATCHDOG_PID", pid)
		newNotifier(textLogger(&netlab.Buffer{})).watch(t.Context(), nil) // returns
	}
}

// A change that is under way counts as alive until changeTimeout.
func TestProcess_alive(t *testing.T) {
	p, _, _ := runProcess(t, nil, "ipip1")
	p.mu.Lock()
	if err := p.alive(0); err != nil {
		t.Error(err)
	}
	p.busySince = time.Now().Add(-changeTimeout - time.Second)
	if err := p.alive(0); err == nil {
		t.Error("a change for ever is alive")
	}
	p.mu.Unlock()
	if err := p.alive(0); err != nil || !p.busySince.IsZero() {
		t.Error(err)
	}
}

// With flags, too, the service manager learns that a reload is over.
func TestNotifier_flags(t *testing.T) {
	m := newManager(t, filepath.Join(shortDir(t), "notify"))
	p, _, _ := runProcess(t, nil, "ipip1")
	p.notify = newNotifier(p.log)
	since := monotonic()
	p.hangUp(t.Context())
	m.reloads(since)
	m.wants("READY=1")
}

// Without a service manager, or with one that is gone, everything else works.
func TestNotifier_none(t *testing.T) {
	for _, name := range []string{"", "vsock:2:1234", filepath.Join(shortDir(t), "none")} {
		t.Setenv(notifyEnv, name)
		log := &netlab.Buffer{}
		n := newNotifier(textLogger(log))
		n.ready()
		n.reloading()
		n.stopping()
		if (log.String() == "") != (name == "") {
			t.Errorf("%q: %s", name, log)
		}
	}
}
