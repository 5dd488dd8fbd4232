package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

type exportOptions struct {
	processOptions
	streams *streams
	Names   []string // none is all
	Format  string
	Hide    bool
}

func newCmdExport(s *streams, runF func(context.Context, *exportOptions) error) *cobra.Command {
	o := &exportOptions{processOptions: config.DefaultProcess(), streams: s, Format: "yaml"}
	c := &cobra.Command{
		Use:   "export [NAME...]",
		Short: "Print what runs as a configuration that gives the same again",
		Long: `export prints the tunnels, disabled ones too, or those named, as a configuration for
ipipd up --config: what is not the default, secrets included. What the format rsc, a
script of RouterOS, cannot say is in comments at its top, and on standard error.`,
		Example:           "  (umask 077; ipipd export > /etc/ipipd/ipipd.yaml)",
		Args:              func(c *cobra.Command, args []string) error { return checkNames(c, args...) },
		ValidArgsFunction: completeNames(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			o.Names = args
			return runF(c.Context(), o)
		},
	}
	addFlag(c, "format", "`yaml` or `rsc`", "yaml", "YAML, or a script of RouterOS", []string{"yaml", "rsc"}, &flagValue{
		set: func(v string) error {
			if v != "yaml" && v != "rsc" {
				return &tunnel.ValueError{Property: "format", Value: v, Want: "yaml or rsc"}
			}
			o.Format = v
			return nil
		},
		get: func() string { return o.Format },
	})
	c.Flags().BoolVar(&o.Hide, "hide-sensitive", false, "leave secrets out: the output is refused until they are put in again")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

const outputHasSecrets = "the output has secrets in it: keep it in a file that only its owner can read, mode 0600"

func exportRun(_ context.Context, o *exportOptions) error {
	s, notes, err := snapshot(o.RuntimeDir, o.Names)
	if err != nil {
		return err
	}
	secrets := false
	for i := range s.Tunnels {
		e := &s.Tunnels[i]
		e.HideSecret = o.Hide
		secrets = secrets || !o.Hide && len(e.Config.IPsec.Secret) > 0
	}
	var b bytes.Buffer
	if o.Format == "rsc" {
		var unsaid []string
		unsaid, err = config.WriteRouterOS(&b, s.Process, s.Tunnels)
		notes = append(notes, unsaid...)
	} else {
		err = config.WriteYAML(&b, s.Process, s.Tunnels)
	}
	if err != nil {
		return err
	}
	if secrets {
		notes = append(notes, outputHasSecrets+", or --hide-sensitive")
	}
	for _, note := range notes {
		fmt.Fprintln(o.streams.err, "ipipd: "+oneLine(errors.New(note)))
	}
	_, err = o.streams.out.Write(b.Bytes())
	return err
}

// snapshot returns what runs in the processes of dir as if it were in one: tunnels in order of name, all or
// those of names. notes are lines for the operator. All processes that have one of them have to answer.
func snapshot(dir string, names []string) (all config.Snapshot, notes []string, err error) {
	processes, err := control.Processes(dir)
	if err != nil {
		return all, nil, controlError(err)
	}
	found := map[string]bool{}
	wanted := map[string]bool{}
	for _, name := range names {
		wanted[name] = true
		if started := originalName(dir, name); started != "" { // its interface was renamed
			wanted[started], found[name] = true, true
		}
	}
	var settings []config.Process
	var problem error
	for i := range processes {
		var s config.Snapshot
		switch err := processes[i].Export(dir, answerTimeout, &s); {
		case errors.Is(err, control.ErrNotRunning):
			processes[i].Sweep(dir)
			continue
		case errors.Is(err, control.ErrStarting):
			problem = cmp.Or(problem, fmt.Errorf("a process in %s %w: try again", dir, err))
			continue
		case err != nil:
			problem = cmp.Or(problem, controlError(err))
			continue
		}
		tunnels := s.Tunnels
		if len(names) > 0 {
			tunnels = slices.DeleteFunc(tunnels, func(e config.Entry) bool {
				link := tunnel.InterfaceName(e.Config.Name)
				called := wanted[e.Config.Name] || wanted[link]
				found[e.Config.Name], found[link] = called, called
				return !called
			})
			if len(tunnels) == 0 {
				continue
			}
		}
		settings, all.Tunnels = append(settings, s.Process), append(all.Tunnels, tunnels...)
	}
	if len(names) == 0 && problem != nil {
		return all, nil, problem
	}
	for _, name := range names {
		if !found[name] {
			return all, nil, cmp.Or(problem, noSuchTunnel(dir, name))
		}
	}
	if len(settings) == 0 {
		return all, nil, fmt.Errorf("no ipipd up runs in %s: nothing to export", dir)
	}
	slices.SortStableFunc(all.Tunnels, func(a, b config.Entry) int { return compareNames(a.Config.Name, b.Config.Name) })
	all.Process = settings[0]
	if len(settings) > 1 {
		notes = append(notes, fmt.Sprintf("the tunnels of %d processes are in one file: NAMEs or a --runtime-dir make it fewer", len(settings)))
	}
	for _, p := range config.ProcessProperties() {
		for i := range settings {
			if p.Get(&settings[i]) != p.Get(&settings[0]) {
				notes = append(notes, p.Name+" is left out: the processes do not have the same")
				defaults := config.DefaultProcess()
				if err := p.Set(&all.Process, p.Get(&defaults)); err != nil {
					return all, nil, err
				}
				break
			}
		}
	}
	return all, notes, nil
}
