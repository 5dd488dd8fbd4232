package main

import (
	"context"
	"errors"
	"fmt"
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

func reloadRun(_ context.Context, o *reloadOptions) error {
	return eachConcerned(o.RuntimeDir, nobodyReloads, nobodyReloads, func(p *control.Process) error {
		result, err := p.Change(o.RuntimeDir, changeTimeout, control.Request{Action: control.Reload, Confirm: o.Confirm})
		for _, note := range result.Notes {
			fmt.Fprintln(o.streams.err, oneLine(errors.New(note)))
		}
		reportUndo(o.streams, result)
		return err
	})
}

const nobodyReloads = "no ipipd up --config runs in %s: nothing to reload"

// eachConcerned calls f for each process in dir. f fails with a control.Refusal that is Nothing for a
// process that it does not concern. The error is none if it concerns no process, nobody if none runs.
func eachConcerned(dir, nobody, none string, f func(*control.Process) error) error {
	processes, err := control.Processes(dir)
	if err != nil {
		return controlError(err)
	}
	running, concerned := 0, 0
	var problems []error
	for i := range processes {
		err := f(&processes[i])
		if errors.Is(err, control.ErrNotRunning) {
			processes[i].Sweep(dir)
			continue
		}
		running++
		var refused *control.Refusal
		if errors.As(err, &refused) && refused.Nothing {
			continue
		}
		concerned++
		if err != nil {
			problems = append(problems, controlError(err))
		}
	}
	switch {
	case running == 0:
		return fmt.Errorf(nobody, dir)
	case concerned == 0:
		return fmt.Errorf(none, dir)
	}
	return errors.Join(problems...)
}
