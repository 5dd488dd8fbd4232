package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/config"
	"ipipd/internal/control"
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
	// Config is the tunnel that flags describe, if Flags is set. Paths are the files of a configuration.
	Config tunnel.Config
	Flags  bool
	Paths  []string
	JSON   bool
	// given are the names of the flags that were given.
	given map[string]bool
}

func newCmdDoctor(s *streams, runF func(context.Context, *doctorOptions) error) *cobra.Command {
	o := &doctorOptions{processOptions: config.DefaultProcess(), streams: s, Config: tunnel.Default()}
	var wrong *usageErrors
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
		Args:              oneNameAtMost,
		RunE: func(c *cobra.Command, args []string) error {
			given := map[string]bool{}
			c.Flags().Visit(func(f *pflag.Flag) { given[f.Name] = true })
			o.given = given
			for _, p := range tunnel.Properties() {
				o.Flags = o.Flags || given[p.Name]
			}
			if len(args) > 0 {
				o.Name = args[0]
				if o.Flags || given[configFlag] {
					return usageErrorf("%s: NAME beside flags of a tunnel, or --config: want either", c.CommandPath())
				}
			}
			switch {
			case given[configFlag]:
				if err := onlyConfig(given, *wrong, os.LookupEnv); err != nil {
					return err
				}
			case o.Flags:
				if err := checkFlags(&o.Config, *wrong, given, os.LookupEnv); err != nil {
					return err
				}
			case len(*wrong) > 0:
				return *wrong
			}
			err := runF(c.Context(), o)
			if err != nil && !isStatusError(err) {
				err = asUsage(err) // 1 would say that there are warnings only
			}
			return err
		},
	}
	c.Flags().SortFlags = false
	c.Flags().BoolVar(&o.JSON, "json", false, "an object: findings, skipped, tunnels")
	c.Flags().StringArrayVar(&o.Paths, configFlag, nil, "of the tunnels of this configuration")
	// All that up takes, so that its command line is doctor's.
	for _, p := range config.ProcessProperties() {
		addProcessFlag(c, &o.processOptions, p)
	}
	for _, p := range tunnel.Properties() {
		addPropertyFlag(c, &o.Config, p)
	}
	wrong = collectErrors(c)
	return c
}

func doctorRun(ctx context.Context, o *doctorOptions) error {
	report, err := o.examine(ctx)
	if err != nil {
		return err
	}
	if o.JSON {
		err = writeJSON(o.streams.out, report)
	} else {
		err = writeReport(o.streams.out, report, colours(o.streams.out, os.LookupEnv))
	}
	if err != nil {
		return err
	}
	if status := report.Status(); status != 0 {
		return statusError(status)
	}
	return nil
}

// examine returns what doctor finds.
func (o *doctorOptions) examine(ctx context.Context) (*doctor.Report, error) {
	tunnels, others, problem, err := o.tunnels()
	if err != nil {
		return nil, err
	}
	env, done := doctor.Host()
	defer done()
	if o.Threads != 0 {
		env.Threads = o.Threads
	}
	report := doctor.Examine(ctx, env, tunnels, others)
	switch {
	case errors.Is(problem, fs.ErrPermission), errors.Is(problem, control.ErrStarting):
		report.Skipped = append(report.Skipped, doctor.Skipped{Check: "processes", Reason: "what runs is not known: " + oneLine(problem)})
	case problem != nil:
		report.Add(doctor.ProcessSilent, strings.ReplaceAll(oneLine(problem), ": "+silentRemedy, ""), "what it runs was not examined", silentRemedy)
	}
	return report, ctx.Err()
}

func writeJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", text)
	return err
}

// tunnels returns the tunnels to examine, and the statuses of the others that run. problem is about processes
// that could not be asked.
func (o *doctorOptions) tunnels() (tunnels []doctor.Tunnel, others []tunnel.Status, problem, err error) {
	var configs []tunnel.Config
	switch {
	case len(o.Paths) > 0:
		up := upOptions{processOptions: o.processOptions, Paths: o.Paths, given: o.given}
		if _, configs, err = up.readConfiguration(); err != nil {
			return nil, nil, nil, err
		}
		o.processOptions, configs = up.processOptions, enabledOf(configs) // its runtime-dir too
	case o.Flags:
		configs = []tunnel.Config{o.Config}
	}
	running, problem := askProcesses(o.RuntimeDir)
	for i := range configs {
		tunnels = append(tunnels, doctor.Tunnel{Config: configs[i]})
	}
	for i := range running {
		t := &running[i]
		if t.Config.Disabled {
			if o.Name != "" && t.called(o.Name) {
				return nil, nil, nil, fmt.Errorf("tunnel %s is disabled: ipipd enable %[1]s", o.Name)
			}
			continue
		}
		if len(o.Paths) == 0 && !o.Flags && (o.Name == "" || t.called(o.Name)) {
			tunnels = append(tunnels, t.Tunnel)
			continue
		}
		at := slices.IndexFunc(configs, func(c tunnel.Config) bool { return c.Name == t.Config.Name })
		if at < 0 {
			others = append(others, *t.Status)
			continue
		}
		tunnels[at].Status, tunnels[at].Started = t.Status, t.Started
	}
	if o.Name != "" && len(tunnels) == 0 {
		return nil, nil, nil, cmp.Or(problem, noSuchTunnel(o.RuntimeDir, o.Name))
	}
	return tunnels, others, problem, nil
}

// runningTunnel is a tunnel that a process runs.
type runningTunnel struct{ doctor.Tunnel }

// called reports whether name is the tunnel's or its interface's, as print takes a NAME.
func (t *runningTunnel) called(name string) bool {
	return slices.Contains([]string{t.Config.Name, tunnel.InterfaceName(t.Config.Name), t.Status.Name(), t.Status.Interface}, name)
}

// askProcesses returns what runs, in order of name. Unlike print it leaves stale sockets where they are.
func askProcesses(dir string) (running []runningTunnel, problem error) {
	processes, err := control.Processes(dir)
	if err != nil {
		return nil, controlError(err)
	}
	found, problems := make([][]runningTunnel, len(processes)), make([]error, len(processes))
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() { found[i], problems[i] = askProcess(dir, &processes[i]) })
	}
	wg.Wait()
	running = slices.Concat(found...)
	slices.SortStableFunc(running, func(a, b runningTunnel) int { return compareNames(a.Config.Name, b.Config.Name) })
	return running, errors.Join(problems...)
}

func askProcess(dir string, p *control.Process) (running []runningTunnel, err error) {
	var s config.Snapshot
	var statuses []tunnel.Status
	if err = p.Export(dir, answerTimeout, &s); err == nil {
		err = p.Statuses(dir, answerTimeout, &statuses)
	}
	switch {
	case errors.Is(err, control.ErrNotRunning):
		return nil, nil
	case errors.Is(err, control.ErrStarting):
		return nil, fmt.Errorf("a process in %s %w: try again", dir, err)
	case err != nil:
		return nil, controlError(err)
	}
	for i := range statuses {
		status := &statuses[i]
		at := slices.IndexFunc(s.Tunnels, func(e config.Entry) bool { return e.Config.Name == cmp.Or(status.RenamedFrom, status.Name()) })
		if at < 0 {
			continue // it has ended meanwhile
		}
		t := runningTunnel{doctor.Tunnel{Config: s.Tunnels[at].Config, Status: status}}
		if info, err := os.Lstat(filepath.Join(dir, tunnel.InterfaceName(t.Config.Name)+".sock")); err == nil {
			t.Started = info.ModTime()
		}
		running = append(running, t)
	}
	return running, nil
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

// mostOfCode is how many findings of one code writeReport writes: those of a thousand tunnels without a route are alike.
const mostOfCode = 20

// writeReport writes a line for each finding, what it means beneath it, and counts them in the last line.
func writeReport(w io.Writer, r *doctor.Report, colour bool) error {
	var b strings.Builder
	seen, more := map[doctor.Code]int{}, map[doctor.Code][]string{}
	for _, f := range r.Findings {
		if seen[f.Code]++; seen[f.Code] > mostOfCode {
			more[f.Code] = append(more[f.Code], f.Tunnel)
			continue
		}
		severity := string(f.Severity)
		if colour {
			severity = map[doctor.Severity]string{doctor.Broken: "\x1b[31m", doctor.Warning: "\x1b[33m", doctor.Note: "\x1b[36m"}[f.Severity] + severity + "\x1b[0m"
		}
		fmt.Fprintf(&b, "%s: %s%s (%s)\n    why: %s\n    do:  %s\n", severity, about(f.Tunnel), line(f.What), f.Code, line(f.Why), line(f.Do))
	}
	for _, code := range slices.Sorted(maps.Keys(more)) {
		fmt.Fprintf(&b, "%d more with %s, which --json has: %s\n", len(more[code]), code, line(some(more[code])))
	}
	of := map[doctor.Skipped][]string{} // the tunnels of a check that was skipped, for the same reason
	for _, s := range r.Skipped {
		same := doctor.Skipped{Check: s.Check, Reason: s.Reason}
		of[same] = append(of[same], s.Tunnel)
	}
	for _, s := range r.Skipped {
		same := doctor.Skipped{Check: s.Check, Reason: s.Reason}
		if names := of[same]; names[0] == s.Tunnel { // once, where it comes first
			fmt.Fprintf(&b, "not checked: %s%s: %s\n", about(some(names)), s.Check, line(s.Reason))
		}
	}
	what := "the host, without a tunnel to examine" // so that nobody takes that for a tunnel that works
	if n := len(r.Tunnels); n > 0 {
		what = counted(n, "tunnel")
	}
	fmt.Fprintf(&b, "%s: %d broken, %s, %s, %d not checked\n", what, r.Count(doctor.Broken),
		counted(r.Count(doctor.Warning), "warning"), counted(r.Count(doctor.Note), "note"), len(r.Skipped))
	_, err := io.WriteString(w, b.String())
	return err
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// some joins a few of many names, and counts the others.
func some(names []string) string {
	const most = 3
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// about returns the beginning of a line about the tunnel of that name; "" without a name.
func about(name string) string {
	if name == "" {
		return ""
	}
	return line(name) + ": "
}

// line returns text on one line: it may come from others, as firewall rules and names of processes do.
func line(text string) string { return oneLine(errors.New(text)) }
