package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

type diffOptions struct {
	processOptions
	streams *streams
	// Paths are the configuration to compare with; without any it is that of the process.
	Paths []string
	JSON  bool
	// ExitCode has the exit status say whether there is a difference.
	ExitCode bool
}

func newCmdDiff(s *streams, runF func(context.Context, *diffOptions) error) *cobra.Command {
	o := &diffOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "diff [FILE...]",
		Short: "Say what a reload would do, and to which tunnel in place, and change nothing",
		Long: `diff compares the tunnels that run with the configuration of their process, or
with FILEs in its place (- is standard input). It prints a line for each tunnel: nothing, in place (which
properties change), again (it is removed and made again, and why), add or remove.

Exit status: 0 done, 1 it failed, 2 wrong input. With --exit-code, as that of diff:
0 nothing differs, 1 a reload would change something, 2 any failure.`,
		Example: "  ipipd diff\n  ipipd diff --exit-code /etc/ipipd/ipipd.yaml",
		RunE: func(c *cobra.Command, args []string) error {
			o.Paths = args
			err := runF(c.Context(), o)
			if o.ExitCode && err != nil && !isStatusError(err) {
				return asUsage(err) // 1 would say that there is a difference
			}
			return err
		},
	}
	c.Flags().BoolVar(&o.JSON, "json", false, "an array of objects: name, action, properties, why")
	c.Flags().BoolVar(&o.ExitCode, "exit-code", false, "exit status 1 if a reload would change something, and 2 for any failure")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func diffRun(_ context.Context, o *diffOptions) error {
	var all []control.Comparison
	sources, err := config.Load(o.Paths...)
	if err != nil {
		return err
	}
	var files []control.File
	for _, s := range sources { // the process may not be able to read them
		files = append(files, control.File{Name: s.Name, Data: s.Data})
	}
	err = eachConcerned(o.RuntimeDir, nobodyReloads, nobodyReloads, func(p *control.Process) error {
		one, err := p.Diff(o.RuntimeDir, changeTimeout, files)
		if err == nil {
			all = append(all, one)
		}
		return err
	})
	if err == nil && len(all) > 1 && len(o.Paths) > 0 {
		return fmt.Errorf("%d ipipd up --config run in %s, and FILE is for one: start each with a --runtime-dir of its own", len(all), o.RuntimeDir)
	}
	if err != nil {
		return err
	}
	var tunnels []control.Difference
	var text strings.Builder
	for _, one := range all {
		tunnels = append(tunnels, one.Tunnels...)
		for i := range one.Tunnels {
			text.WriteString(differenceLine(&one.Tunnels[i]))
		}
		switch undo := (control.Result{UndoAt: one.UndoAt}); {
		case o.JSON:
			reportUndo(o.streams, undo)
		case !undo.UndoAt.IsZero():
			fmt.Fprintln(&text, undoNotice(undo.UndoAt))
		}
	}
	if o.JSON {
		err = printJSON(o.streams.out, tunnels)
	} else {
		_, err = io.WriteString(o.streams.out, text.String())
	}
	if err == nil && o.ExitCode && slices.ContainsFunc(tunnels, func(d control.Difference) bool { return d.Action != tunnel.Nothing.String() }) {
		return statusError(1)
	}
	return err
}

// differenceLine returns d as a line NAME: ACTION: PROPERTIES (WHY).
func differenceLine(d *control.Difference) string {
	line := d.Name + ": " + d.Action
	if len(d.Properties) > 0 {
		line += ": " + strings.Join(d.Properties, ", ")
	}
	if d.Why != "" {
		line += " (" + d.Why + ")"
	}
	return line + "\n"
}
