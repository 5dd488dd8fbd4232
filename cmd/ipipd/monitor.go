package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/monitor"
	"ipipd/internal/terminal"
	"ipipd/internal/tunnel"
)

type monitorOptions struct {
	processOptions
	streams  *streams
	Name     string // "" is all
	JSON     bool
	Interval time.Duration
	Count    int // 0 is without end
}

// The bounds of the interval at which a monitor asks the processes.
const (
	minInterval  = 100 * time.Millisecond
	maxInterval  = time.Hour
	wantInterval = "a time of 100ms to 1h, such as 1s"
)

func newCmdMonitor(s *streams, runF func(context.Context, *monitorOptions) error) *cobra.Command {
	o := &monitorOptions{processOptions: config.DefaultProcess(), streams: s, Interval: time.Second}
	c := &cobra.Command{
		Use:   "monitor [NAME]",
		Short: "Show rates, drops and states while they change",
		Long: `monitor shows the tunnels that run in a table, or the page of one: rates in bit/s over
the last second and the last ten, drops, when the peer was heard. Keys sort, filter and open
a tunnel's page: ? shows them, q ends it.

Where it does not write to a terminal and read keys from one, it writes a line for each tunnel
and interval, the first after one interval; with --json one line of JSON for each interval.

Exit status: 0 ended by a key, a signal to the table, or --count; 1 NAME does not run, or
nothing can be asked or written; 2 the command line was wrong.`,
		Example: `  ipipd monitor
  ipipd monitor ipip1 --interval 5s
  ipipd monitor --json --count 1`,
		Args:              oneNameAtMost,
		ValidArgsFunction: completeName(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.Name = args[0]
			}
			return runF(c.Context(), o)
		},
	}
	c.Flags().BoolVar(&o.JSON, "json", false, "a line of JSON each interval: docs/monitor.md")
	addFlag(c, "interval", wantInterval, "1s", "how often the processes are asked", nil, &flagValue{
		set: func(v string) (err error) {
			d, err := time.ParseDuration(v)
			if err != nil || d < minInterval || d > maxInterval {
				return &tunnel.ValueError{Property: "interval", Value: v, Want: wantInterval}
			}
			o.Interval = d
			return nil
		},
		get: func() string { return o.Interval.String() },
	})
	const wantCount = "a number of 1 or more"
	addFlag(c, "count", wantCount, "none", "end after so many intervals", nil, &flagValue{
		set: func(v string) (err error) {
			if o.Count, err = strconv.Atoi(v); err != nil || o.Count < 1 {
				return &tunnel.ValueError{Property: "count", Value: v, Want: wantCount}
			}
			return nil
		},
		get: func() string { return strconv.Itoa(o.Count) },
	})
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func monitorRun(ctx context.Context, o *monitorOptions) error {
	p := &poller{dir: o.RuntimeDir, wait: answerTimeout, pending: map[string]*inquiry{}}
	model := monitor.NewModel(o.Interval, o.Name, compareNames)
	readings, err := p.round()
	if err != nil {
		return err
	}
	model.Update(time.Now(), readings)
	problem := errors.Join(p.problems...)
	switch {
	case len(model.Tunnels) > 0:
	case o.Name != "":
		return cmp.Or(problem, noSuchTunnel(o.RuntimeDir, o.Name))
	case errors.Is(problem, fs.ErrPermission):
		return problem
	}
	out, isFile := o.streams.out.(*os.File)
	term, _ := os.LookupEnv("TERM")
	if !o.JSON && isFile && term != "" && term != "dumb" && terminal.Is(os.Stdin, out) {
		return o.screen(ctx, out, p, model)
	}
	return o.lines(ctx, p, model)
}

// lines writes a round as text, or as JSON, at each interval, in place of screen.
func (o *monitorOptions) lines(ctx context.Context, p *poller, model *monitor.Model) error {
	ticker := time.NewTicker(o.Interval)
	defer ticker.Stop()
	var said []string
	for i := 1; ; i++ { // the first round waits longer for answers, so that --count 1 has rates
		if i == 2 {
			p.wait = min(o.Interval, answerTimeout)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		readings, err := p.round()
		if err != nil {
			return err
		}
		now := time.Now()
		model.Update(now, readings)
		if o.JSON {
			var text []byte
			if text, err = model.JSON(now); err == nil {
				_, err = o.streams.out.Write(append(text, '\n'))
			}
		} else {
			for _, problem := range model.Problems {
				if !slices.Contains(said, problem) {
					fmt.Fprintf(o.streams.err, "ipipd: %s\n", problem)
				}
			}
			said = model.Problems
			_, err = io.WriteString(o.streams.out, model.Text(now))
		}
		if err != nil {
			return withRemedy(fmt.Errorf("cannot write: %w", err))
		}
		if i == o.Count {
			return nil
		}
	}
}

// answer implements control.Handler.
func (p *process) answer() (any, error) {
	if !p.ready.Load() {
		return nil, control.ErrStarting
	}
	return monitor.Answer{Samples: p.samples(), UndoAt: p.wanted.Load().undoAt}, nil
}

// poller asks the processes of a folder.
type poller struct {
	dir string
	// wait is how long a round waits for answers; one that comes later is taken by the next round.
	wait     time.Duration
	pending  map[string]*inquiry // by control.Process.ID
	problems []error             // of the last round
	denied   bool                // one of them is about a process that this user may not ask
}

// inquiry is a request that is under way.
type inquiry struct {
	links  []string
	done   chan struct{}
	at     time.Time // of the answer
	answer monitor.Answer
	err    error
	// panicked is what the request panicked with: to be passed on by the goroutine that restores the terminal.
	panicked any
}

// round asks each process, unless its last answer is still to come, and returns a Reading for each.
func (p *poller) round() ([]monitor.Reading, error) {
	processes, err := control.Processes(p.dir)
	if err != nil {
		return nil, controlError(err)
	}
	for i := range processes {
		process := &processes[i]
		if p.pending[process.ID()] == nil {
			p.pending[process.ID()] = p.ask(process)
		} else {
			p.pending[process.ID()].links = process.Names
		}
	}
	for id := range p.pending {
		if !slices.ContainsFunc(processes, func(process control.Process) bool { return process.ID() == id }) {
			delete(p.pending, id)
		}
	}
	late := time.After(p.wait)
	readings := []monitor.Reading{}
	p.problems, p.denied = nil, false
	for i := range processes {
		id := processes[i].ID()
		q := p.pending[id]
		select {
		case <-q.done:
		case <-late:
			late = closedTime // no further wait for the other processes
		}
		select {
		case <-q.done:
			delete(p.pending, id)
			if r, ok := p.reading(id, q); ok {
				readings = append(readings, r)
			}
		default:
			readings = append(readings, monitor.Reading{Process: id, Links: q.links})
		}
	}
	return readings, nil
}

// closedTime is the channel of a timer that has expired, for any number of receivers.
var closedTime = func() <-chan time.Time {
	c := make(chan time.Time)
	close(c)
	return c
}()

func (p *poller) ask(process *control.Process) *inquiry {
	q := &inquiry{links: process.Names, done: make(chan struct{})}
	go func() {
		defer close(q.done)
		defer func() { q.panicked = recover() }()
		q.err = process.Samples(p.dir, answerTimeout, &q.answer)
		q.at = time.Now()
	}()
	return q
}

// reading returns the Reading of an inquiry that is done; false if the process has ended, or denies this user and is not
// the first one that does.
func (p *poller) reading(id string, q *inquiry) (monitor.Reading, bool) {
	r := monitor.Reading{Process: id, Links: q.links, At: q.at}
	switch {
	case q.panicked != nil:
		panic(q.panicked)
	case q.err == nil:
		r.Answer = &q.answer
	case errors.Is(q.err, control.ErrNotRunning):
		return r, false
	case errors.Is(q.err, control.ErrStarting):
		r.State = monitor.StateStarting
	case errors.Is(q.err, fs.ErrPermission) && p.denied:
		return r, false
	default:
		err := controlError(q.err)
		p.problems = append(p.problems, err)
		r.State, r.Problem = monitor.StateSilent, oneLine(err)
		if errors.Is(err, fs.ErrPermission) {
			p.denied, r.Links = true, nil // the tunnels of others are not shown
		}
	}
	return r, true
}

// detail returns the lines of ipipd print about a tunnel: its state, then its settings.
func (p *poller) detail(link string, now time.Time) []string {
	var s tunnel.Status
	if err := control.Status(p.dir, link, answerTimeout, &s); err != nil {
		return []string{oneLine(controlError(err))}
	}
	var b strings.Builder
	_ = printDetail(&b, &s, now)
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	settings := min(len(s.Settings), len(lines)) // they come first
	return slices.Concat(lines[settings:], []string{""}, lines[:settings])
}

// utf8Locale reports whether the environment says that the terminal shows UTF-8.
func utf8Locale(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := getenv(name); v != "" {
			v = strings.ToLower(v)
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return false
}

// isGone reports whether a terminal is not there any more.
func isGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) || errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EPIPE)
}
