package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/config"
	"ipipd/internal/doctor"
	"ipipd/internal/tunnel"
)

func init() {
	platformCommands = append(platformCommands, func(s *streams) *cobra.Command { return newCmdDoctor(s, doctorRun) })
}

type doctorOptions struct {
	processOptions
	streams *streams
	Name    string // of a running tunnel; "" is all
	// Config is the tunnel that the flags say, if Flags; Paths is a configuration.
	Config tunnel.Config
	Flags  bool
	Paths  []string
	JSON   bool
}

func newCmdDoctor(s *streams, runF func(context.Context, *doctorOptions) error) *cobra.Command {
	o := &doctorOptions{processOptions: config.DefaultProcess(), streams: s, Config: tunnel.Default()}
	c := &cobra.Command{
		Use:   "doctor [NAME | flags of up | --config FILE]",
		Short: "Find what keeps a tunnel from working, and say what mends it",
		Long: `doctor looks at this host and at the path to the remote: of the tunnels that run, of
one of them, or of what ipipd up would start with these flags or that configuration.
It changes nothing; it sends a few pings and probes, and takes some seconds.

Exit status: 0 nothing is wrong, 1 there are warnings, 2 something is broken, or could
not be examined at all. What was not checked is listed, with the reason.`,
		Example: `  ipipd doctor
  ipipd doctor ipip1
  ipipd doctor --remote-address 198.51.100.1 --address 10.255.0.1/30
  ipipd doctor --config /etc/ipipd/ipipd.yaml --json`,
		ValidArgsFunction: completeName(&o.processOptions),
		Args: func(c *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				return nil
			case 1:
				return checkNameArgument(c, args[0])
			}
			return usageErrorf("%s: unexpected argument %q: want one NAME at most", c.CommandPath(), args[1])
		},
		RunE: func(c *cobra.Command, args []string) error {
			given := map[string]bool{}
			c.Flags().Visit(func(f *pflag.Flag) { given[f.Name] = true })
			for _, p := range tunnel.Properties() {
				o.Flags = o.Flags || given[p.Name]
			}
			if len(args) > 0 {
				o.Name = args[0]
				if o.Flags || given[configFlag] {
					return usageErrorf("%s: NAME beside flags of a tunnel, or --config: want either", c.CommandPath())
				}
			}
			if given[configFlag] {
				if err := onlyConfig(given, os.LookupEnv); err != nil {
					return err
				}
			} else if o.Flags {
				if err := secretFromEnv(&o.Config, os.LookupEnv); err != nil {
					return err
				}
				if err := o.Config.Validate(); err != nil {
					return valueError(err)
				}
			}
			err := runF(c.Context(), o)
			if err != nil && !errors.As(err, new(statusError)) {
				err = asUsage(err) // 1 would say that there are warnings only
			}
			return err
		},
	}
	c.Flags().SortFlags = false
	c.Flags().BoolVar(&o.JSON, "json", false, "an object: findings, skipped, tunnels")
	c.Flags().StringArrayVar(&o.Paths, configFlag, nil, "of the tunnels of this configuration")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	for _, p := range config.ProcessProperties() {
		if p.Name == "threads" {
			addProcessFlag(c, &o.processOptions, p)
		}
	}
	for _, p := range tunnel.Properties() {
		addPropertyFlag(c, &o.Config, p)
	}
	return c
}

func doctorRun(ctx context.Context, o *doctorOptions) error {
	tunnels, others, problem, err := o.tunnels()
	if err != nil {
		return err
	}
	env, done := doctor.Host()
	defer done()
	if o.Threads != 0 {
		env.Threads = o.Threads
	}
	report := doctor.Examine(ctx, env, tunnels, others)
	switch {
	case errors.Is(problem, fs.ErrPermission):
		report.Skipped = append(report.Skipped, doctor.Skipped{Check: "processes", Reason: "what runs is not known: " + oneLine(problem)})
	case problem != nil:
		report.Add(doctor.ProcessSilent, oneLine(problem), "what it runs was not examined", "end it with kill -9, and ipipd up takes its place")
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if o.JSON {
		text, err := json.MarshalIndent(report, "", "  ")
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(o.streams.out, "%s\n", text); err != nil {
			return err
		}
	} else if err := writeReport(o.streams.out, report, colours(o.streams.out, os.LookupEnv)); err != nil {
		return err
	}
	if status := report.Status(); status != 0 {
		return statusError(status)
	}
	return nil
}

// tunnels are those to examine, and the statuses of the others that run. problem is about processes that
// could not be asked.
func (o *doctorOptions) tunnels() (tunnels []doctor.Tunnel, others []tunnel.Status, problem, err error) {
	statuses, problem := queryStatuses(o.RuntimeDir, "")
	var configs []tunnel.Config
	switch {
	case len(o.Paths) > 0:
		var file *config.File
		if file, configs, err = readFiles(o.Paths); err != nil {
			return nil, nil, nil, err
		}
		for _, s := range file.Process {
			for _, p := range config.ProcessProperties() {
				if p.Name == s.Property && p.Name == "threads" && o.Threads == 0 {
					err = p.Set(&o.processOptions, s.Value)
				}
			}
		}
	case o.Flags:
		configs = []tunnel.Config{o.Config}
	case o.Name != "":
		var s config.Snapshot
		if s, _, err = snapshot(o.RuntimeDir, []string{o.Name}); err == nil {
			configs = configsOf(&s)
		}
	case len(statuses) > 0:
		s, _, failed := snapshot(o.RuntimeDir, nil)
		if failed != nil && problem == nil {
			problem = failed
		}
		configs = configsOf(&s)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	taken := make([]bool, len(statuses))
	for i := range configs {
		t := doctor.Tunnel{Config: configs[i]}
		at := slices.IndexFunc(statuses, func(s namedStatus) bool { return s.startedName() == configs[i].Name })
		if at >= 0 {
			taken[at], t.Status = true, new(tunnel.Status)
			if err := json.Unmarshal(statuses[at].text, t.Status); err != nil {
				return nil, nil, nil, err
			}
			if info, err := os.Lstat(filepath.Join(o.RuntimeDir, tunnel.InterfaceName(configs[i].Name)+".sock")); err == nil {
				t.Started = info.ModTime()
			}
		}
		tunnels = append(tunnels, t)
	}
	for i := range statuses {
		if taken[i] {
			continue
		}
		var s tunnel.Status
		if err := json.Unmarshal(statuses[i].text, &s); err != nil {
			return nil, nil, nil, err
		}
		others = append(others, s)
	}
	return tunnels, others, problem, nil
}

func configsOf(s *config.Snapshot) (configs []tunnel.Config) {
	for i := range s.Tunnels {
		configs = append(configs, s.Tunnels[i].Config)
	}
	return configs
}

// colours reports whether w is a terminal that shows colours (no-color.org).
func colours(w io.Writer, lookup func(string) (string, bool)) bool {
	if v, _ := lookup("NO_COLOR"); v != "" {
		return false
	}
	if term, _ := lookup("TERM"); term == "" || term == "dumb" {
		return false
	}
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&fs.ModeCharDevice != 0
}

// writeReport writes a line for each finding, what it means beneath it, and counts them in the last line.
func writeReport(w io.Writer, r *doctor.Report, colour bool) error {
	var b strings.Builder
	for _, f := range r.Findings {
		severity := string(f.Severity)
		if colour {
			severity = map[doctor.Severity]string{doctor.Broken: "\x1b[31m", doctor.Warning: "\x1b[33m", doctor.Note: "\x1b[36m"}[f.Severity] + severity + "\x1b[0m"
		}
		fmt.Fprintf(&b, "%s: %s%s (%s)\n    why: %s\n    do:  %s\n", severity, about(f.Tunnel), line(f.What), f.Code, line(f.Why), line(f.Do))
	}
	for _, s := range r.Skipped {
		fmt.Fprintf(&b, "not checked: %s%s: %s\n", about(s.Tunnel), s.Check, line(s.Reason))
	}
	what := "the host"
	switch n := len(r.Tunnels); n {
	case 0:
	case 1:
		what = "1 tunnel"
	default:
		what = fmt.Sprintf("%d tunnels", n)
	}
	fmt.Fprintf(&b, "%s: %d broken, %d warnings, %d notes, %d not checked\n", what,
		r.Count(doctor.Broken), r.Count(doctor.Warning), r.Count(doctor.Note), len(r.Skipped))
	_, err := io.WriteString(w, b.String())
	return err
}

// about is a tunnel's name in front of what is said of it.
func about(name string) string {
	if name == "" {
		return ""
	}
	return line(name) + ": "
}

// line is text of others, rules and names of processes for one, on one line.
func line(text string) string { return oneLine(errors.New(text)) }
