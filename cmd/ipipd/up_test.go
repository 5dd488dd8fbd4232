package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/capture"
	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// fakeTunnel is a startedTunnel without an interface.
type fakeTunnel struct {
	mu     sync.Mutex // guards config, once it runs
	config tunnel.Config
	done   chan struct{}
	err    error
	closed chan struct{}
	dir    string
	left   bool // the socket existed when Close was called
}

func (*fakeTunnel) Remotes(int) *tunnel.Remotes { return nil }

func (t *fakeTunnel) Status() tunnel.Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := tunnel.NewStatus(&t.config)
	s.ActualMTU, s.CurrentLocalAddress, s.CurrentRemoteAddress = 1480, "192.0.2.1", "198.51.100.1"
	return s
}
func (t *fakeTunnel) Done() <-chan struct{} { return t.done }
func (t *fakeTunnel) Err() error            { return t.err }
func (t *fakeTunnel) Close() error {
	_, err := os.Lstat(filepath.Join(t.dir, t.config.Name+".sock"))
	t.left = err == nil
	close(t.closed)
	return nil
}

// fakeEngine is an engine with at most one tunnel.
type fakeEngine struct {
	apply  func(context.Context, []tunnel.Config) (startedTunnel, error)
	mu     sync.Mutex
	tunnel startedTunnel
	name   string
}

func (e *fakeEngine) Apply(ctx context.Context, configs []tunnel.Config) error {
	t, err := e.apply(ctx, configs)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tunnel, e.name = t, configs[0].Name
	return err
}

func (e *fakeEngine) Unresponsive(time.Duration) string { return "" }

func (e *fakeEngine) Diff([]tunnel.Config) ([]tunnel.Difference, error) { return nil, nil }

func (e *fakeEngine) Samples() tunnel.Samples { return samplesOf(e.Tunnels()) }

func (e *fakeEngine) Capture(context.Context, string, capture.Options, string, io.Writer) (r capture.Result, err error) {
	return r, os.ErrNotExist
}

// samplesOf returns samples of an engine's tunnels, which say that they run.
func samplesOf(tunnels map[string]startedTunnel) (s tunnel.Samples) {
	for _, t := range tunnels {
		sample := tunnel.NewSample(&t.(*fakeTunnel).config)
		sample.Started, sample.Running = true, true
		s.Tunnels = append(s.Tunnels, sample)
	}
	return s
}

// Tunnels leaves out a tunnel that has failed, as the real engine does.
func (e *fakeEngine) Tunnels() map[string]startedTunnel {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tunnel == nil || e.tunnel.Err() != nil {
		return nil
	}
	return map[string]startedTunnel{e.name: e.tunnel}
}

func (e *fakeEngine) Leave() error { return e.Close() }

func (e *fakeEngine) Close() error {
	if e.tunnel == nil {
		return nil
	}
	return e.tunnel.Close()
}

// openFake returns a function that opens an engine whose only tunnel apply starts.
func openFake(apply func(context.Context, []tunnel.Config) (startedTunnel, error)) func(tunnel.EngineOptions) (engine, error) {
	return func(tunnel.EngineOptions) (engine, error) { return &fakeEngine{apply: apply}, nil }
}

// runUpFake runs `up` with a fake tunnel, and returns when it is ready.
func runUpFake(t *testing.T, dir, name string, change func(*upOptions)) (tun *fakeTunnel, log *netlab.Buffer, ended chan error) {
	t.Helper()
	log = &netlab.Buffer{}
	tun = &fakeTunnel{done: make(chan struct{}), closed: make(chan struct{}), dir: dir}
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{log, log}, Config: tunnel.Default()}
	o.RuntimeDir, o.Config.Name, o.Config.RemoteAddress = dir, name, "198.51.100.1"
	started := make(chan struct{})
	o.open = openFake(func(_ context.Context, configs []tunnel.Config) (startedTunnel, error) {
		tun.config = configs[0]
		close(started)
		return tun, nil
	})
	if change != nil {
		change(o)
	}
	ended = make(chan error, 1)
	go func() { ended <- upRun(t.Context(), o) }()
	select {
	case <-started:
	case err := <-ended:
		t.Fatalf("up ended: %v", err)
	}
	var s tunnel.Status
	for control.Status(dir, tun.config.Name, answerTimeout, &s) != nil {
		time.Sleep(time.Millisecond)
	}
	return tun, log, ended
}

func TestUpRun_down(t *testing.T) {
	dir := shortDir(t)
	tun, _, ended := runUpFake(t, dir, "t-fake", nil)
	if status, _, errs := command("down", "t-fake", "--runtime-dir", dir); status != 0 {
		t.Errorf("down: status %d, %s", status, errs)
	}
	<-tun.closed // down has waited for it
	if err := <-ended; err != nil {
		t.Errorf("up: %v", err)
	}
	if !tun.left {
		t.Error("the socket went before the interface")
	}
}

func TestUpRun_signals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		dir := shortDir(t)
		tun, _, ended := runUpFake(t, dir, "t-fake", nil)
		syscall.Kill(os.Getpid(), sig)
		if err := <-ended; err != nil {
			t.Errorf("%v: %v", sig, err)
		}
		<-tun.closed
		if names, _ := control.List(dir); len(names) != 0 {
			t.Errorf("%v: left %v", sig, names)
		}
	}
}

// A canceled context ends up while it waits for the lock of the directory, without an error.
func TestUpRun_lockHeld(t *testing.T) {
	dir := shortDir(t)
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "t-fake"} {
		o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
		o.RuntimeDir, o.Config.Name = dir, name
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := upRun(ctx, o); err != nil {
			t.Errorf("told to end: %v", err)
		}
		err := upRun(t.Context(), o)
		want := "cannot make the control socket: " + lock.Name() + " is held by another process for more than 2s: end that process (fuser " + lock.Name() + ")"
		if err == nil || exitStatus(err) != 1 || oneLine(err) != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// SIGHUP means reload, and must not end the tunnel.
func TestUpRun_sighup(t *testing.T) {
	tun, log, ended := runUpFake(t, shortDir(t), "t-fake", nil)
	for i := range 2 {
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		for strings.Count(log.String(), "nothing to reload") <= i {
			select {
			case err := <-ended:
				t.Fatalf("up ended: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
	}
	syscall.Kill(os.Getpid(), syscall.SIGTERM)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	<-tun.closed
}

func TestUpRun_readyLogLine(t *testing.T) {
	_, log, _ := runUpFake(t, shortDir(t), "t-fake", func(o *upOptions) { o.LogFormat = "json" })
	for log.String() == "" {
		time.Sleep(time.Millisecond)
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	var line map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &line); err != nil || len(lines) != 1 {
		t.Fatalf("%q: %v", lines, err)
	}
	for key, want := range map[string]any{
		"level": "INFO", "msg": "tunnel is ready", "name": "t-fake", "mtu": 1480.0, "local-address": "192.0.2.1", "remote-address": "198.51.100.1",
	} {
		if line[key] != want {
			t.Errorf("%s is %v, want %v", key, line[key], want)
		}
	}
}

// The log says who ended the process.
func TestUpRun_endLogLine(t *testing.T) {
	for _, tt := range []struct {
		cause string
		end   func(dir string) error
	}{
		{`"terminated signal received"`, func(string) error { return syscall.Kill(os.Getpid(), syscall.SIGTERM) }},
		{`"ipipd down"`, func(dir string) error { return control.Down(dir, "t-fake", answerTimeout, answerTimeout, nil) }},
	} {
		dir := shortDir(t)
		_, log, ended := runUpFake(t, dir, "t-fake", nil)
		for !strings.Contains(log.String(), "tunnel is ready") {
			time.Sleep(time.Millisecond)
		}
		if err := tt.end(dir); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if want := `level=INFO msg="the process ends" cause=` + tt.cause; !strings.Contains(log.String(), want) {
			t.Errorf("the log has not %s: %s", want, log)
		}
	}
}

func TestUpRun_tunnelFails(t *testing.T) {
	tun, _, ended := runUpFake(t, shortDir(t), "t-fake", nil)
	tun.err = errors.New("interface t-fake is gone")
	close(tun.done)
	if err := <-ended; err == nil || exitStatus(err) != 1 || oneLine(err) != "interface t-fake is gone" {
		t.Errorf("up: %v", err)
	}
}

func TestUpRun_startFails(t *testing.T) {
	dir := shortDir(t)
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir = dir
	o.open = openFake(func(context.Context, []tunnel.Config) (startedTunnel, error) {
		return nil, errors.New("no TUN here: run modprobe tun")
	})
	err := upRun(t.Context(), o)
	if err == nil || exitStatus(err) != 1 || oneLine(err) != "no TUN here: run modprobe tun" {
		t.Errorf("up: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left %v", entries)
	}
}

func TestUpRun_endedBeforeReady(t *testing.T) {
	dir := shortDir(t)
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir, o.Config.Name = dir, "t-fake"
	o.open = openFake(func(ctx context.Context, _ []tunnel.Config) (startedTunnel, error) {
		if status, _, errs := command("print", "t-fake", "--runtime-dir", dir); status != 1 || errs != "ipipd: tunnel t-fake is starting: try again\n" {
			t.Errorf("print meanwhile: status %d, %s", status, errs)
		}
		go command("down", "t-fake", "--runtime-dir", dir)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err := upRun(t.Context(), o); err != nil {
		t.Errorf("up: %v", err)
	}
}

func TestUpRun_nameOfRunningTunnel(t *testing.T) {
	dir := shortDir(t)
	runUpFake(t, dir, "t-fake", nil)
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir, o.Config.Name = dir, "t-fake"
	err := upRun(t.Context(), o)
	want := "name t-fake is taken by a running tunnel (" + dir + "/t-fake.sock); end it with ipipd down t-fake: choose another with --name"
	if err == nil || exitStatus(err) != 1 || oneLine(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestUpRun_nameOfInterface(t *testing.T) {
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir, o.Config.Name = shortDir(t), "lo"
	err := upRun(t.Context(), o)
	if err == nil || exitStatus(err) != 1 || oneLine(err) != "name lo is taken by an interface of this host: choose another with --name" {
		t.Errorf("got %v", err)
	}
}

// Without a name the first free ipipN is taken.
func TestProcessReserveFirst(t *testing.T) {
	dir := shortDir(t)
	first, _, _ := runUpFake(t, dir, "", nil)
	second, _, _ := runUpFake(t, dir, "", nil)
	if a, b := first.config.Name, second.config.Name; !strings.HasPrefix(a, "ipip") || a == b {
		t.Errorf("names %q and %q", a, b)
	}
}

func TestUpRun_dirWritableByOthers(t *testing.T) {
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir = dir
	err := upRun(t.Context(), o)
	want := "cannot make the control socket: " + dir + " may be written by others (mode 0777): chmod go-w " + dir + ", or choose another folder with --runtime-dir"
	if err == nil || exitStatus(err) != 1 || oneLine(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestUpRun_dirCannotBeCreated(t *testing.T) {
	file := filepath.Join(shortDir(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{&bytes.Buffer{}, &bytes.Buffer{}}}
	o.RuntimeDir = filepath.Join(file, "dir")
	err := upRun(t.Context(), o)
	want := "cannot make the control socket: mkdir " + file + ": not a directory: choose another folder with --runtime-dir"
	if err == nil || exitStatus(err) != 1 || oneLine(err) != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
