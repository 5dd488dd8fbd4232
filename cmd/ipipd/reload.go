package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
)

// changeTimeout bounds a change: thousands of tunnels may be made.
const changeTimeout = 5 * time.Minute

type reloadOptions struct {
	processOptions
	streams *streams
	// Paths are what `diff` compares with, absolute.
	Paths []string
	// Confirm is how long `reload` waits for a confirmation, 0 without.
	Confirm time.Duration
}

func newCmdReload(s *streams, runF func(context.Context, *reloadOptions) error) *cobra.Command {
	o := &reloadOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "reload",
		Short: "Have a running ipipd up --config read its configuration again",
		Long: `reload goes from the tunnels that run to those of the configuration: all of it or,
after an error, nothing. Tunnels that do not change lose no packet, nor do those
that change in place: ipipd diff says which. Settings of the process stay as they
are until it is started again. SIGHUP does the same; its errors are logged. With
--confirm all of it is undone unless ipipd confirm comes in time.`,
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(c *cobra.Command, _ []string) error { return runF(c.Context(), o) },
	}
	addConfirmFlag(c, &o.Confirm)
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func newCmdDiff(s *streams, runF func(context.Context, *reloadOptions) error) *cobra.Command {
	o := &reloadOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "diff [FILE...]",
		Short: "Say what a reload would do, and to which tunnel in place, and change nothing",
		Long: `diff compares the tunnels that run with the configuration of their process, or
with FILEs in its place. It prints a line for each tunnel: nothing, in place (which
properties change), again (it is removed and made again, and why), add or remove.`,
		Example: "  ipipd diff",
		RunE: func(c *cobra.Command, args []string) error {
			for _, path := range args { // the process may have another working directory
				absolute, err := filepath.Abs(path)
				if err != nil {
					return err
				}
				o.Paths = append(o.Paths, absolute)
			}
			return runF(c.Context(), o)
		},
	}
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func reloadRun(_ context.Context, o *reloadOptions) error {
	return eachConcerned(o.RuntimeDir, nothingToReload, func(p *control.Process) error {
		result, err := p.Change(o.RuntimeDir, changeTimeout, control.Request{Action: control.Reload, Confirm: o.Confirm})
		reportUndo(o.streams, result)
		return err
	})
}

func diffRun(_ context.Context, o *reloadOptions) error {
	var texts []string
	err := eachConcerned(o.RuntimeDir, nothingToReload, func(p *control.Process) error {
		text, err := p.Diff(o.RuntimeDir, changeTimeout, o.Paths)
		if err == nil {
			texts = append(texts, text)
		}
		return err
	})
	if err == nil && len(texts) > 1 && len(o.Paths) > 0 {
		return fmt.Errorf("%d ipipd up --config run in %s, and FILE is for one: start each with a --runtime-dir of its own", len(texts), o.RuntimeDir)
	}
	if err == nil {
		_, err = io.WriteString(o.streams.out, strings.Join(texts, ""))
	}
	return err
}

const nothingToReload = "no ipipd up --config runs in %s: nothing to reload"

// eachConcerned calls f for each process in dir that it is about: for others f fails with a
// control.Refusal that is Nothing. If there are only such, it fails with none.
func eachConcerned(dir, none string, f func(*control.Process) error) error {
	processes, err := control.Processes(dir)
	if err != nil {
		return controlError(err)
	}
	concerned := 0
	var problems []error
	for i := range processes {
		err := f(&processes[i])
		var refused *control.Refusal
		switch {
		case errors.Is(err, control.ErrNotRunning):
			processes[i].Sweep(dir)
			continue
		case errors.As(err, &refused) && refused.Nothing:
			continue
		}
		concerned++
		if err != nil {
			problems = append(problems, controlError(err))
		}
	}
	if concerned == 0 {
		return fmt.Errorf(none, dir)
	}
	return errors.Join(problems...)
}
