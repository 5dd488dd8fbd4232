package main

import (
	"context"
	"errors"
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
	return eachConcerned(o.RuntimeDir, "nothing to confirm in %s: it is confirmed, or undone, already", func(p *control.Process) error {
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

// await has everything undone after d that has been changed since the list was back. If there is a
// confirmation to be awaited already, it is for both, and its list stays. The caller has the turn.
func (p *process) await(d time.Duration, back []tunnel.Config) {
	at := time.Now().Add(d)
	p.update(func(w *wanted) {
		if w.undoAt.IsZero() {
			w.back = back
		}
		w.undoAt = at
	})
	time.AfterFunc(d, func() { p.undo(at) })
}

// confirm needs not the turn: a change may have it for long.
func (p *process) confirm() (err error) {
	p.update(func(w *wanted) {
		switch {
		case w.undoAt.IsZero():
			err = &control.Refusal{Nothing: true, Message: "nothing to confirm"}
		case w.undoing:
			err = errors.New("too late to confirm: it is being undone")
		default:
			w.back, w.undoAt = nil, time.Time{}
			p.log.Info("confirmed: the tunnels stay as they are")
		}
	})
	return err
}

// undo goes back to the list before, unless that was confirmed or is to be at another time.
func (p *process) undo(at time.Time) {
	due := func() bool { return p.wanted.Load().undoAt.Equal(at) && p.ctx.Err() == nil }
	if !due() {
		return
	}
	p.turn.hurry(givenUpError("the undoing of what is not confirmed"))
	ctx, end, err := p.begin(p.ctx, 0)
	if err == nil {
		defer end()
		p.update(func(w *wanted) { w.undoing = w.undoAt.Equal(at) })
		if !p.wanted.Load().undoing {
			return
		}
		err = p.apply(ctx, p.wanted.Load().back)
		p.update(func(w *wanted) {
			if w.undoing = false; err == nil {
				w.back, w.undoAt = nil, time.Time{}
			}
		})
	}
	switch {
	case err == nil:
		p.log.Warn("not confirmed in time: the tunnels are those before", "tunnels", len(p.wanted.Load().configs))
	case due():
		p.log.Error("not confirmed in time, and cannot be undone yet", "err", err, "again-in", p.undoRetry)
		time.AfterFunc(p.undoRetry, func() { p.undo(at) })
	}
}
