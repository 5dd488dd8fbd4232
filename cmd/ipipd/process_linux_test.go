package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/internal/capture"
	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// listEngine is an engine of tunnels without interfaces.
type listEngine struct {
	mu      sync.Mutex
	tunnels map[string]*fakeTunnel
	// refuse is called first, without mu.
	refuse func(context.Context, []tunnel.Config) error
}

func (e *listEngine) Apply(ctx context.Context, configs []tunnel.Config) error {
	if e.refuse != nil {
		if err := e.refuse(ctx, configs); err != nil {
			return err
		}
	}
	e.set(configs)
	return nil
}

func (e *listEngine) Unresponsive(time.Duration) string { return "" }

func (e *listEngine) set(configs []tunnel.Config) {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := map[string]*fakeTunnel{}
	for _, c := range configs {
		t := e.tunnels[c.Name]
		if t == nil || t.ended() {
			t = newFakeTunnel()
			t.dir = "/nonexistent"
		}
		delete(e.tunnels, c.Name)
		t.mu.Lock()
		t.config, next[c.Name] = c, t
		t.mu.Unlock()
	}
	for _, t := range e.tunnels {
		if !t.ended() {
			close(t.done)
		}
	}
	e.tunnels = next
}

func (t *fakeTunnel) ended() bool {
	select {
	case <-t.done:
	case <-t.closed:
	default:
		return false
	}
	return true
}

func (e *listEngine) Diff(configs []tunnel.Config) (all []tunnel.Difference, err error) {
	for _, c := range configs {
		all = append(all, tunnel.Difference{Name: c.Name})
	}
	return all, nil
}

func (e *listEngine) Tunnels() map[string]startedTunnel {
	e.mu.Lock()
	defer e.mu.Unlock()
	running := map[string]startedTunnel{}
	for name, t := range e.tunnels {
		if !t.ended() {
			running[tunnel.InterfaceName(name)] = t
		}
	}
	return running
}

func (e *listEngine) Capture(context.Context, string, capture.Options, string, io.Writer) (r capture.Result, err error) {
	return r, os.ErrNotExist
}
func (e *listEngine) Samples() tunnel.Samples { return samplesOf(e.Tunnels()) }

func (e *listEngine) Leave() error { return e.Close() }

func (e *listEngine) Close() error {
	e.set(nil)
	return nil
}

// runs returns the names of the tunnels that run.
func (e *listEngine) runs() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var names []string
	for name, t := range e.tunnels {
		if !t.ended() { // by ipipd down
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func newFakeTunnel() *fakeTunnel {
	return &fakeTunnel{done: make(chan struct{}), closed: make(chan struct{})}
}

// openList opens a listEngine.
func openList(tunnel.EngineOptions) (engine, error) { return &listEngine{}, nil }

func textLogger(log *netlab.Buffer) *slog.Logger { return slog.New(slog.NewTextHandler(log, nil)) }

// configured returns the configurations of tunnels: name, or -name if it is disabled.
func configured(names ...string) (configs []tunnel.Config) {
	for _, name := range names {
		c := tunnel.Default()
		c.Name, c.Disabled = strings.CutPrefix(name, "-")
		c.RemoteAddress = "198.51.100.1"
		configs = append(configs, c)
	}
	return configs
}

// runProcess runs a process with tunnels of a fake engine.
func runProcess(t *testing.T, change func(*upOptions), names ...string) (*process, *listEngine, *netlab.Buffer) {
	t.Helper()
	log, e := &netlab.Buffer{}, &listEngine{}
	o := &upOptions{processOptions: config.DefaultProcess(), streams: &streams{log, log}}
	o.RuntimeDir = shortDir(t)
	o.open = func(tunnel.EngineOptions) (engine, error) { return e, nil }
	if change != nil {
		change(o)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := newProcess(o, textLogger(log), cancel)
	if err := p.start(ctx, configured(names...)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(p.close(false), p.server.Close()); err != nil {
			t.Error(err)
		}
	})
	return p, e, log
}

// links returns the names that are reserved in the folder of p.
func links(t *testing.T, p *process) string {
	t.Helper()
	names, err := control.List(p.options.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// A disabled tunnel does not run, is shown, and keeps its name reserved.
func TestProcess_disabled(t *testing.T) {
	p, e, _ := runProcess(t, nil, "ipip1", "-lo")
	if got := e.runs(); got != "ipip1" {
		t.Errorf("%q runs", got)
	}
	if got := links(t, p); got != "ipip1 lo" {
		t.Errorf("reserved: %q", got)
	}
	status, out, errs := command("print", "--runtime-dir", p.options.RuntimeDir)
	golden(t, `
Flags: X - disabled, R - running
#    NAME   MTU   LOCAL-ADDRESS  REMOTE-ADDRESS
0    ipip1  1480  192.0.2.1      198.51.100.1
1 X  lo                          198.51.100.1
`, out)
	if status != 0 || errs != "" {
		t.Errorf("status %d: %s", status, errs)
	}
	if status, out, errs := command("print", "lo", "--runtime-dir", p.options.RuntimeDir); status != 0 || !strings.Contains(out, "disabled: yes\n") {
		t.Errorf("status %d: %s%s", status, out, errs)
	}
	// down removes it as well, and with the last tunnel ends the process.
	if status, _, errs := command("down", "lo", "--runtime-dir", p.options.RuntimeDir); status != 0 || links(t, p) != "ipip1" {
		t.Errorf("status %d: %s, %s", status, errs, links(t, p))
	}
}

// The end of the last tunnel that runs ends the process, and with it the disabled ones.
func TestDownRun_several(t *testing.T) {
	p, _, _ := runProcess(t, nil, "ipip1", "ipip2", "-ipip3")
	ended := p.ctx
	done := make(chan error, 1)
	go func() {
		<-ended.Done()
		done <- errors.Join(p.close(false), p.server.Close())
	}()
	dir := p.options.RuntimeDir
	if status, _, errs := command("down", "ipip2", "ipip9", "ipip1", "ipip2", "ipip3", "--runtime-dir", dir); status != 1 || !strings.HasPrefix(errs, "ipipd: no tunnel named ipip9 in ") || strings.Count(errs, "no tunnel") != 1 {
		t.Errorf("status %d: %s", status, errs)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if status, _, errs := command("down", "ipip1", "ipip3", "--runtime-dir", dir); status != 1 || strings.Count(errs, "no tunnel") != 2 {
		t.Errorf("status %d: %s", status, errs)
	}
}

// A tunnel that fails is forgotten, and disabled ones stay.
func TestProcess_ended(t *testing.T) {
	p, e, log := runProcess(t, nil, "ipip1", "ipip2", "-ipip3")
	one := e.tunnels["ipip1"]
	one.err = errors.New("its interface is gone")
	close(one.done)
	netlab.Eventually(t, "the name is free", func() bool { return links(t, p) == "ipip2 ipip3" })
	netlab.Eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), "its interface is gone") })
	two := e.tunnels["ipip2"]
	two.err = errors.New("gone, too")
	close(two.done)
	if err := <-p.failed; err != two.err {
		t.Errorf("failed: %v", err)
	}
	if got := links(t, p); got != "ipip3" {
		t.Errorf("reserved: %q", got)
	}
}

// For tunnels that run already, or are disabled, the host's interfaces are not listed.
func TestProcess_checkInterfaces(t *testing.T) {
	p, _, _ := runProcess(t, nil, "ipip1", "-ipip2")
	listed := 0
	p.interfaces = func() ([]net.Interface, error) { listed++; return nil, nil }
	for _, test := range []struct {
		names []string
		want  int
	}{
		{[]string{"ipip1", "-ipip2"}, 0}, {[]string{"-ipip1", "-ipip3"}, 0}, {nil, 0}, {[]string{"ipip1", "ipip2", "ipip3"}, 1},
	} {
		listed = 0
		if err := p.tryReserve(t.Context(), configured(test.names...)); err != nil || listed != test.want {
			t.Errorf("%q: %v, listed %d times, want %d", test.names, err, listed, test.want)
		}
	}
}

// An interface of this host takes the name of a tunnel only if the tunnel is to run.
func TestProcess_reserve(t *testing.T) {
	p, _, _ := runProcess(t, nil, "ipip1", "-ipip2")
	got, err := p.reserve(t.Context(), configured("ipip1", "", "-ipip2"))
	if err != nil || slices.Contains([]string{"", "ipip1", "ipip2"}, got[1].Name) {
		t.Errorf("%v, %v", got, err)
	}
	var taken *nameTakenError
	if _, err := p.reserve(t.Context(), configured("ipip1", "ipip9", "lo")); !errors.As(err, &taken) || taken.name != "lo" {
		t.Errorf("an interface: %v", err)
	}
	if got, want := links(t, p), "ipip1 ipip2 "+got[1].Name; got != want {
		t.Errorf("reserved: %q, want %q", got, want)
	}
	if entries, _ := os.ReadDir(p.options.RuntimeDir); len(entries) != 4 {
		t.Errorf("left: %v", entries)
	}
}
