package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/drop"
	"ipipd/internal/monitor"
	"ipipd/internal/tunnel"
)

type printOptions struct {
	processOptions
	streams *streams
	Name    string // "" is all
	JSON    bool
	Remotes bool // of Name, and only these
}

func newCmdPrint(s *streams, runF func(context.Context, *printOptions) error) *cobra.Command {
	o := &printOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:               "print [NAME]",
		Short:             "Show the tunnels that run, or all about one",
		Args:              oneNameAtMost,
		ValidArgsFunction: completeName(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.Name = args[0]
			}
			if o.Remotes && o.Name == "" {
				return usageErrorf("%s: --remotes is of one tunnel: want its NAME", c.CommandPath())
			}
			return runF(c.Context(), o)
		},
	}
	c.Flags().BoolVar(&o.JSON, "json", false, "an array of objects, their keys the names of the properties")
	c.Flags().BoolVar(&o.Remotes, "remotes", false, "all remotes of a tunnel whose remote-address is any; without it NAME shows 100 of them")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func printRun(_ context.Context, o *printOptions) error {
	if o.Remotes {
		return printAllRemotes(o)
	}
	statuses, problem := queryStatuses(o.RuntimeDir, o.Name)
	if len(statuses) == 0 && (o.Name != "" || errors.Is(problem, fs.ErrPermission) || errors.Is(problem, syscall.ENOTDIR)) {
		return cmp.Or(problem, noSuchTunnel(o.RuntimeDir, o.Name))
	}
	if o.JSON {
		return cmp.Or(printJSON(o.streams.out, statuses), problem)
	}
	decoded := make([]tunnel.Status, len(statuses))
	for i, s := range statuses {
		if err := json.Unmarshal(s.text, &decoded[i]); err != nil {
			return err
		}
	}
	if o.Name != "" {
		return cmp.Or(printDetail(o.streams.out, &decoded[0], time.Now()), problem)
	}
	return cmp.Or(printTable(o.streams.out, decoded), problem)
}

// namedStatus is the JSON of a tunnel.Status, of which only what finds and sorts it is decoded: to
// decode all of 1,000 tunnels would take as long as everything else.
type namedStatus struct {
	Name        string `json:"name"`
	RenamedFrom string `json:"renamed-from"`
	text        json.RawMessage
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *namedStatus) UnmarshalJSON(text []byte) error {
	type names namedStatus // without this method
	s.text = slices.Clone(text)
	return json.Unmarshal(text, (*names)(s))
}

// MarshalJSON implements json.Marshaler.
func (s namedStatus) MarshalJSON() ([]byte, error) { return s.text, nil }

// startedName returns the name that the tunnel was started with: its interface may have been
// renamed since.
func (s *namedStatus) startedName() string { return cmp.Or(s.RenamedFrom, s.Name) }

// queryStatuses returns the statuses of the running tunnels, sorted by name, or of the one whose
// name is name, or was at its start. problem joins the errors of processes that do not answer, but
// of permission errors only the first. Tunnels that have ended are left out, and their stale
// sockets removed.
func queryStatuses(dir, name string) (statuses []namedStatus, problem error) {
	if name != "" {
		var one namedStatus
		link := tunnel.InterfaceName(name)
		switch err := control.Status(dir, link, answerTimeout, &one); {
		case err == nil:
			return []namedStatus{one}, nil
		case errors.Is(err, control.ErrStarting):
			return nil, fmt.Errorf("tunnel %s %w: try again", name, err)
		case !errors.Is(err, control.ErrNotRunning):
			return nil, controlError(err)
		}
		control.Sweep(dir, []string{link})
		statuses, _ := queryStatuses(dir, "") // its interface may have been renamed
		return slices.DeleteFunc(statuses, func(s namedStatus) bool { return s.Name != name }), nil
	}
	processes, err := control.Processes(dir)
	if err != nil {
		return nil, controlError(err)
	}
	all := make([][]namedStatus, len(processes))
	errs := make([]error, len(processes))
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() { errs[i] = processes[i].Statuses(dir, answerTimeout, &all[i]) })
	}
	wg.Wait()
	var problems []error
	denied := false
	for i, err := range errs {
		switch {
		case err == nil:
			statuses = append(statuses, all[i]...)
		case errors.Is(err, control.ErrNotRunning):
			processes[i].Sweep(dir)
		case errors.Is(err, control.ErrStarting):
			if len(processes) == 1 && len(processes[0].Names) == 1 {
				problems = append(problems, fmt.Errorf("tunnel %s %w: try again", processes[0].Names[0], err))
			}
		case errors.Is(err, fs.ErrPermission) && denied:
		default:
			denied = denied || errors.Is(err, fs.ErrPermission)
			problems = append(problems, controlError(err))
		}
	}
	slices.SortStableFunc(statuses, func(a, b namedStatus) int { return compareNames(a.startedName(), b.startedName()) })
	return statuses, errors.Join(problems...)
}

// originalName returns the name under which a tunnel was started whose interface has since
// been renamed to name, or "".
func originalName(dir, name string) string {
	statuses, _ := queryStatuses(dir, name)
	if len(statuses) == 0 {
		return ""
	}
	return statuses[0].RenamedFrom
}

// printTable prints in the format of RouterOS's `print`.
func printTable(out io.Writer, statuses []tunnel.Status) error {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	comments := make([]string, len(statuses)) // lines of their own, above the tunnels
	fmt.Fprintln(w, "#\tNAME\tMTU\tLOCAL-ADDRESS\tREMOTE-ADDRESS")
	width := len(strconv.Itoa(max(0, len(statuses)-1)))
	for i, s := range statuses {
		flag := " "
		switch {
		case s.Disabled:
			flag = "X"
		case s.Running:
			flag = "R"
		}
		if c := s.Setting("comment"); c != "" {
			comments[i] = ";;; " + c + "\n"
		}
		local, remote := cmp.Or(s.Setting("local-address"), s.CurrentLocalAddress), s.Setting("remote-address")
		if s.Remotes != nil {
			remote += " (" + remotesText(s.Remotes) + ")"
		}
		mtu := ""
		if s.ActualMTU != 0 { // there is an interface
			mtu = strconv.Itoa(s.ActualMTU)
		}
		fmt.Fprintf(w, "%*d %s\t%s\t%s\t%s\t%s\n", width, i, flag, s.Name(), mtu, local, remote)
	}
	w.Flush()
	head, rows, _ := strings.Cut(b.String(), "\n")
	text := "Flags: X - disabled, R - running\n" + head + "\n"
	for i, row := range slices.Collect(strings.Lines(rows)) {
		text += comments[i] + row
	}
	var undo []time.Time // of each process, those printed already
	for _, s := range statuses {
		if !s.UndoAt.IsZero() && !slices.ContainsFunc(undo, s.UndoAt.Equal) {
			undo = append(undo, s.UndoAt)
			text += undoNotice(s.UndoAt) + "\n"
		}
	}
	return writeTrimmingLines(out, text)
}

// printDetail prints the status of one tunnel in the format of RouterOS's `monitor`.
func printDetail(out io.Writer, s *tunnel.Status, now time.Time) error {
	type line struct{ name, value string }
	var lines []line
	for _, v := range s.Settings {
		lines = append(lines, line{v.Name, v.Value})
	}
	lastHeard := "never"
	if !s.LastHeard.IsZero() {
		lastHeard = fmt.Sprintf("%s (%s ago)", s.LastHeard.Local().Format(time.DateTime), monitor.Age(now.Sub(s.LastHeard)))
	}
	if s.RenamedFrom != "" {
		lines = append(lines, line{"renamed-from", s.RenamedFrom})
	}
	if s.Interface != "" {
		lines = append(lines, line{"interface", s.Interface})
	}
	lines = append(lines,
		line{"disabled", formatBool(s.Disabled)},
		line{"running", formatBool(s.Running)})
	if s.WaitingFor != "" {
		lines = append(lines, line{"waiting-for", s.WaitingFor})
	}
	for _, w := range s.Warnings {
		lines = append(lines, line{"warning", warningLine(&w, now)})
	}
	if !s.UndoAt.IsZero() {
		lines = append(lines, line{"undo-at", fmt.Sprintf("%s (in %s) without ipipd confirm", s.UndoAt.Local().Format(time.DateTime), monitor.Age(s.UndoAt.Sub(now)))})
	}
	if b := s.Sandbox; b != nil {
		lines = append(lines, line{"sandbox", b.String()})
		for _, c := range b.Capabilities {
			lines = append(lines, line{"capability", c.Name + ": " + c.Why})
		}
		for _, missing := range b.Missing {
			lines = append(lines, line{"sandbox-missing", oneLine(errors.New(missing))})
		}
	}
	lines = append(lines,
		line{"actual-mtu", strconv.Itoa(s.ActualMTU)},
		line{"current-local-address", s.CurrentLocalAddress},
		line{"current-remote-address", s.CurrentRemoteAddress})
	if s.Remotes != nil {
		lines = append(lines, line{"remotes", remotesText(s.Remotes)}, line{"prefixes", strconv.Itoa(s.Remotes.Prefixes)})
	}
	if s.CandidateRemoteAddress != "" {
		lines = append(lines, line{"candidate-remote-address", s.CandidateRemoteAddress})
	}
	if s.PathMTU != 0 {
		lines = append(lines, line{"path-mtu", strconv.Itoa(s.PathMTU)})
	}
	if s.FastPath != "" {
		lines = append(lines, line{"fast-path", s.FastPath})
	}
	if s.IPsec != "" {
		lines = append(lines, line{"ipsec", s.IPsec})
	}
	if s.IPsecSPI != "" {
		lines = append(lines, line{"ipsec-spi", s.IPsecSPI})
	}
	lines = append(lines,
		line{"keepalive-state", s.KeepaliveState},
		line{"last-heard", lastHeard},
		line{"rx-packet", strconv.FormatUint(s.RxPacket, 10)},
		line{"rx-byte", strconv.FormatUint(s.RxByte, 10)},
		line{"tx-packet", strconv.FormatUint(s.TxPacket, 10)},
		line{"tx-byte", strconv.FormatUint(s.TxByte, 10)},
		line{"drops", formatDrops(s.Drops)})
	if len(s.Restored) > 0 {
		lines = append(lines, line{"restored", formatDrops(s.Restored)})
	}
	if len(s.ProcessDrops) > 0 {
		lines = append(lines, line{"process-drops", formatDrops(s.ProcessDrops)})
	}
	for reason := range drop.All() {
		name := reason.String()
		if s.Drops[name]+s.ProcessDrops[name] > 0 {
			lines = append(lines, line{name, reason.Why() + "; remedy: " + reason.Remedy()})
		}
	}
	width := 0
	for _, l := range lines {
		width = max(width, len(l.name))
	}
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%*s: %s\n", width, l.name, l.value)
	}
	if s.Remotes != nil && len(s.Remotes.List) > 0 {
		b.WriteString("\n" + remotesTable(s.Remotes, now))
		if more := s.Remotes.Count - len(s.Remotes.List); more > 0 {
			fmt.Fprintf(&b, "and %d more: ipipd print --remotes %s\n", more, s.Name())
		}
	}
	return writeTrimmingLines(out, b.String())
}

// warningLine returns a warning on one line: its detail may have text of others in it.
func warningLine(w *tunnel.Warning, now time.Time) string {
	text := w.Text
	if w.Detail != "" {
		text += ": " + w.Detail
	}
	return oneLine(fmt.Errorf("%s (%s, for %s): %s; remedy: %s", w.Code, w.Severity, monitor.Age(now.Sub(w.Since)), text, w.Remedy))
}

// formatDrops returns reason=count pairs sorted by reason, or "none".
func formatDrops(drops map[string]uint64) string {
	var parts []string
	for reason, n := range drops {
		parts = append(parts, fmt.Sprintf("%s=%d", reason, n))
	}
	slices.Sort(parts)
	return cmp.Or(strings.Join(parts, ","), "none")
}

func printJSON[T any](out io.Writer, statuses []T) error {
	if statuses == nil {
		statuses = []T{}
	}
	text, err := json.MarshalIndent(statuses, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", text)
	return err
}

func formatBool(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// writeTrimmingLines writes text without trailing spaces.
func writeTrimmingLines(out io.Writer, text string) error {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	_, err := io.WriteString(out, strings.Join(lines, "\n"))
	return err
}

// sortNames sorts names, ipip2 before ipip10.
func sortNames(names []string) { slices.SortFunc(names, compareNames) }

func compareNames(a, b string) int {
	stemA, stemB := strings.TrimRight(a, "0123456789"), strings.TrimRight(b, "0123456789")
	return cmp.Or(
		strings.Compare(stemA, stemB),
		cmp.Compare(len(a)-len(stemA), len(b)-len(stemB)),
		strings.Compare(a, b),
	)
}
