package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// ask makes p do what the words of a command say, to be confirmed within d if that is not zero.
func ask(t *testing.T, p *process, d time.Duration, words string) control.Result {
	t.Helper()
	r := request(t, words)
	r.Confirm = d
	result, err := p.change(t.Context(), r)
	if err != nil {
		t.Fatalf("%s: %v", words, err)
	}
	return result
}

func (p *process) shown() string { return shown(p.wanted.Load().configs) }

// Everything since the first change is undone, also changes that needed no confirmation; tunnels that ended are back.
func TestProcess_undo(t *testing.T) {
	p, e, log := runProcess(t, nil, "ipip1", "-ipip2")
	if got := ask(t, p, time.Hour, "set ipip1 dscp=1"); time.Until(got.UndoAt) < time.Minute {
		t.Errorf("%v", got)
	}
	if got := ask(t, p, 0, "add name=t-new remote-address=198.51.100.1 disabled=yes"); time.Until(got.UndoAt) < time.Minute {
		t.Errorf("%v", got)
	}
	ask(t, p, 0, "enable ipip2")
	if status, _, errs := command("down", "ipip2", "--runtime-dir", p.options.RuntimeDir); status != 0 {
		t.Errorf("down: %s", errs)
	}
	if got := p.shown(); got != "ipip1 dscp=1; -t-new" {
		t.Errorf("before: %s", got)
	}
	ask(t, p, time.Millisecond, "set ipip1 ttl=9")
	netlab.Eventually(t, "it is undone", func() bool { return p.wanted.Load().undoAt.IsZero() })
	if got := p.shown(); got != "ipip1; -ipip2" || e.runs() != "ipip1" || links(t, p) != "ipip1 ipip2" {
		t.Errorf("afterwards: %s, runs %s, reserved %s", got, e.runs(), links(t, p))
	}
	netlab.Eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), "not confirmed in time") })
}

// A reload that is undone counts as failed, and the one before it as the last that succeeded.
func TestReloads_undone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p, _, _ := runProcess(t, func(o *upOptions) { o.Paths = []string{file} }, "ipip1")
	undone := func(words string) (failed, same bool) {
		before := p.snapshot()
		ask(t, p, time.Millisecond, words)
		netlab.Eventually(t, "it is undone", func() bool { return p.wanted.Load().undoAt.IsZero() })
		after := p.snapshot()
		return after.ReloadFailed, after.ReloadedAt.Equal(before.ReloadedAt)
	}
	if failed, same := undone("set ipip1 dscp=1"); failed || !same {
		t.Errorf("without a reload: failed %v, at the same time %v", failed, same)
	}
	write("tunnels: [{name: ipip1, remote-address: 198.51.100.1, ttl: 9}]")
	if failed, same := undone("reload"); !failed || !same {
		t.Errorf("a reload: failed %v, at the same time %v", failed, same)
	}
	ask(t, p, time.Hour, "reload")
	if err := p.confirm(); err != nil || p.snapshot().ReloadFailed {
		t.Errorf("confirmed: %v, failed %v", err, p.snapshot().ReloadFailed)
	}
}

// The failure of the last tunnel does not end a process that has others to go back to.
func TestProcess_undoAfterFailure(t *testing.T) {
	p, e, log := runProcess(t, nil, "ipip1", "ipip2")
	ask(t, p, time.Hour, "remove ipip2")
	one := e.tunnels["ipip1"]
	one.err = errors.New("its interface is gone")
	close(one.done)
	netlab.Eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), one.err.Error()) })
	p.undo(p.wanted.Load().undoAt)
	if got := p.shown(); got != "ipip1; ipip2" || e.runs() != "ipip1 ipip2" {
		t.Errorf("it has %s, %s runs", got, e.runs())
	}
	select {
	case err := <-p.failed:
		t.Errorf("the process ends: %v", err)
	default:
	}
}

// A confirmed change stays, and one that awaits its confirmation is shown.
func TestProcessConfirm(t *testing.T) {
	p, e, _ := runProcess(t, nil, "ipip1")
	dir := []string{"--runtime-dir", p.options.RuntimeDir}
	none := "ipipd: nothing to confirm in " + p.options.RuntimeDir + ": it is confirmed, or undone, already\n"
	if status, _, errs := command(append(dir, "confirm")...); status != 1 || errs != none {
		t.Errorf("nothing: status %d, %s", status, errs)
	}
	status, out, errs := command(append([]string{"add", "remote-address=198.51.100.1", "name=t-new", "--confirm", "1h"}, dir...)...)
	notice := undoNotice(p.wanted.Load().undoAt)
	if status != 0 || out != "t-new\n" || errs != "ipipd: "+notice+"\n" {
		t.Errorf("status %d, %s, %s", status, out, errs)
	}
	if _, out, _ := command(append(dir, "print")...); strings.Count(out, notice+"\n") != 1 {
		t.Errorf("print has no %q: %s", notice, out)
	}
	if _, out, _ := command(append(dir, "print", "ipip1")...); !strings.Contains(out, "undo-at: ") {
		t.Errorf("print: %s", out)
	}
	if status, out, errs := command(append(dir, "confirm")...); status != 0 || out+errs != "" {
		t.Errorf("confirm: status %d, %s%s", status, out, errs)
	}
	if _, out, _ := command(append(dir, "print")...); strings.Contains(out, "confirm") {
		t.Errorf("print: %s", out)
	}
	if status, _, errs := command(append(dir, "confirm")...); status != 1 || errs != none {
		t.Errorf("again: status %d, %s", status, errs)
	}
	// A timer of an earlier change undoes nothing.
	ask(t, p, time.Hour, "set ipip1 dscp=1")
	p.undo(p.wanted.Load().undoAt.Add(-time.Second))
	if got := p.shown(); got != "ipip1 dscp=1; t-new" || e.runs() != "ipip1 t-new" {
		t.Errorf("it has %s, %s runs", got, e.runs())
	}
	for _, wrong := range []time.Duration{-1, maxConfirm + 1} {
		if _, err := p.change(t.Context(), control.Request{Action: control.Enable, Confirm: wrong}); err == nil {
			t.Errorf("%v is accepted", wrong)
		}
	}
}

// An undo that fails is tried again, and can be confirmed until then.
func TestProcess_undoFails(t *testing.T) {
	p, e, log := runProcess(t, nil, "ipip1")
	p.undoRetry = time.Millisecond
	var tries atomic.Int32
	e.refuse = func(_ context.Context, configs []tunnel.Config) error {
		if configs[0].DSCP != 1 && tries.Add(1) <= 2 {
			return errors.New("not now")
		}
		return nil
	}
	ask(t, p, time.Millisecond, "set ipip1 dscp=1")
	netlab.Eventually(t, "it is undone", func() bool { return p.wanted.Load().undoAt.IsZero() })
	if got := p.shown(); got != "ipip1" {
		t.Errorf("it has %s", got)
	}
	if got := strings.Count(log.String(), "cannot be undone yet"); got != 2 {
		t.Errorf("logged %d times: %s", got, log)
	}
	p.undoRetry = time.Hour
	tries.Store(0)
	ask(t, p, time.Millisecond, "set ipip1 dscp=1")
	netlab.Eventually(t, "it has failed", func() bool { return tries.Load() == 1 })
	if err := p.confirm(); err != nil {
		t.Errorf("confirm: %v", err)
	}
	if got := p.shown(); got != "ipip1 dscp=1" || !p.wanted.Load().undoAt.IsZero() {
		t.Errorf("it has %s", got)
	}
}
