package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

const (
	maxConfirm  = 24 * time.Hour
	wantConfirm = "a time of 1s to 24h, such as 60s"
	confirmHelp = "how long to wait for ipipd confirm, before everything since then is undone"
)

func newCmdConfirm(s *streams, runF func(context.Context, *reloadOptions) error) *cobra.Command {
	o := &reloadOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "confirm",
		Short: "Keep what was changed with --confirm",
		Long: `confirm keeps what reload, set, add, remove, enable and disable have changed with
--confirm, and since. Without it everything goes back to the tunnels before the first
of these changes: nobody who has cut off the way to this host needs to come here.`,
		Example:           "  ipipd reload --confirm 60s && ping -c 3 10.255.0.2 && ipipd confirm",
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(c *cobra.Command, _ []string) error { return runF(c.Context(), o) },
	}
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func confirmRun(_ context.Context, o *reloadOptions) error {
	const nobody, none = "no ipipd up runs in %s: nothing to confirm", "nothing to confirm in %s: it is confirmed, or undone, already"
	return eachConcerned(o.RuntimeDir, nobody, none, func(p *control.Process) error {
		_, err := p.Change(o.RuntimeDir, answerTimeout, control.Request{Action: control.Confirm})
		return err
	})
}

// addConfirmFlag adds --confirm, which begins the wait for a confirmation.
func addConfirmFlag(c *cobra.Command, to *time.Duration) {
	addFlag(c, "confirm", wantConfirm, "none", confirmHelp, []string{"60s"}, &flagValue{
		set: func(v string) error {
			d, err := time.ParseDuration(v)
			if err != nil || d < time.Second || d > maxConfirm {
				return &tunnel.ValueError{Property: "confirm", Value: v, Want: wantConfirm}
			}
			*to = d
			return nil
		},
		get: func() string { return to.String() },
	})
}

// undoNotice says that a confirmation is awaited.
func undoNotice(at time.Time) string {
	return fmt.Sprintf("not confirmed: undone at %s without ipipd confirm", at.Local().Format(time.DateTime))
}

// reportUndo prints undoNotice if it is due.
func reportUndo(s *streams, r control.Result) {
	if !r.UndoAt.IsZero() {
		fmt.Fprintln(s.err, "ipipd: "+undoNotice(r.UndoAt))
	}
}

// awaitLocked waits for a confirmation, without which back, the configs before the change, are applied again after d.
// If one is awaited already, it is for both changes, and wanted.back stays.
func (p *process) awaitLocked(d time.Duration, back []tunnel.Config) {
	at := time.Now().Add(d)
	p.updateLocked(func(w *wanted) {
		if w.undoAt.IsZero() {
			w.back, w.reloaded = back, p.reloads.done.Load()
		}
		w.undoAt = at
	})
	time.AfterFunc(d, func() { p.undo(at) })
}

// stayLocked ends the wait for a confirmation.
func (p *process) stayLocked() {
	p.updateLocked(func(w *wanted) { w.back, w.undoAt = nil, time.Time{} })
}

func (p *process) confirm() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted.Load().undoAt.IsZero() {
		return &control.Refusal{Nothing: true, Message: "nothing to confirm"}
	}
	p.stayLocked()
	p.log.Info("confirmed: the tunnels stay as they are")
	return nil
}

// undo applies wanted.back again, unless the change was confirmed, or is now to be undone at another time.
func (p *process) undo(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.wanted.Load()
	if p.closed || !w.undoAt.Equal(at) {
		return
	}
	if err := p.applyLocked(p.ctx, w.back); err != nil {
		p.log.Error("not confirmed in time, and cannot be undone yet", "err", err, "again-in", p.undoRetry)
		time.AfterFunc(p.undoRetry, func() { p.undo(at) })
		return
	}
	p.stayLocked()
	if p.reloads.done.Load() != w.reloaded {
		p.reloads.undone(w.reloaded)
	}
	p.log.Warn("not confirmed in time: the tunnels are those before", "tunnels", len(w.back))
}
