package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/monitor"
	"ipipd/internal/tunnel"
)

// printAllRemotes runs `print --remotes`.
func printAllRemotes(o *printOptions) error {
	name := tunnel.InterfaceName(o.Name)
	if statuses, _ := queryStatuses(o.RuntimeDir, o.Name); len(statuses) > 0 { // its interface may have been renamed
		name = tunnel.InterfaceName(statuses[0].startedName())
	}
	var remotes *tunnel.Remotes
	switch err := control.Remotes(o.RuntimeDir, name, answerTimeout, &remotes); {
	case errors.Is(err, control.ErrNotRunning):
		return noSuchTunnel(o.RuntimeDir, o.Name)
	case errors.Is(err, control.ErrStarting):
		return fmt.Errorf("tunnel %s %w: try again", o.Name, err)
	case err != nil:
		return controlError(err)
	case remotes == nil:
		return fmt.Errorf("%s has one remote: ipipd print %[1]s shows it", o.Name)
	case o.JSON:
		return printJSON(o.streams.out, remotes.List)
	}
	return writeTrimmingLines(o.streams.out, remotesTable(remotes, time.Now()))
}

// remotesText says how many remotes there are, and how many of them are not ok.
func remotesText(r *tunnel.Remotes) string {
	text := fmt.Sprintf("%d remotes", r.Count)
	if r.Count == 1 {
		text = "1 remote"
	}
	if r.NotOK > 0 {
		text += fmt.Sprintf(", %d not ok", r.NotOK)
	}
	return text
}

// remotesTable returns a table with a line for each remote of the list.
func remotesTable(r *tunnel.Remotes, now time.Time) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	local := func(string) string { return "" }
	if slices.ContainsFunc(r.List, func(one tunnel.Remote) bool { return one.LocalAddress != "" }) {
		local = func(text string) string { return cmp.Or(text, "-") + "\t" }
	}
	fmt.Fprintln(w, "REMOTE\t"+local("LOCAL-ADDRESS")+"PREFIXES\tSTATE\tPATH-MTU\tLAST-HEARD")
	for _, one := range r.List {
		mtu, heard := "", "never"
		if one.PathMTU != 0 {
			mtu = fmt.Sprint(one.PathMTU)
		}
		if !one.LastHeard.IsZero() {
			heard = monitor.Age(now.Sub(one.LastHeard)) + " ago"
		}
		fmt.Fprintf(w, "%s\t%s%d\t%s\t%s\t%s\n", one.Address, local(one.LocalAddress), one.Prefixes, one.State, cmp.Or(mtu, "-"), heard)
	}
	w.Flush()
	return b.String()
}
