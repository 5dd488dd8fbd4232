package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"ipipd/internal/doctor"
)

// Text of others (a rule, a name) stays on one line, and the last line counts the findings.
func TestWriteReport(t *testing.T) {
	r := &doctor.Report{
		Tunnels: []string{"a", "b"},
		Findings: []doctor.Finding{
			{Code: doctor.NoTUN, Severity: doctor.Broken, What: "no TUN", Why: "a tunnel needs one", Do: "modprobe tun"},
			{Code: doctor.FirewallDrops, Severity: doctor.Warning, Tunnel: "a", What: "a rule\n\x1b[2Jdrops", Why: "x", Do: "y"},
		},
		Skipped: []doctor.Skipped{
			{Check: "reachability", Tunnel: "b", Reason: "not root"}, {Check: "path-mtu", Tunnel: "a", Reason: "no answer"}, {Check: "path-mtu", Reason: "only 64"},
			{Check: "path-mtu", Tunnel: "b", Reason: "no answer"}, {Check: "path-mtu", Tunnel: "c", Reason: "no answer"}, {Check: "path-mtu", Tunnel: "d", Reason: "no answer"}, {Check: "path-mtu", Tunnel: "e", Reason: "no answer"},
		},
	}
	for _, x := range []struct {
		colour bool
		want   string
	}{
		{false, "broken: no TUN (no-tun)\n    why: a tunnel needs one\n    do:  modprobe tun\n" +
			"warning: a: a rule; ?[2Jdrops (firewall-drops)\n    why: x\n    do:  y\n" +
			"not checked: b: reachability: not root\nnot checked: a, b, c and 2 more: path-mtu: no answer\nnot checked: path-mtu: only 64\n2 tunnels: 1 broken, 1 warning, 0 notes, 7 not checked\n"},
		{true, "\x1b[31mbroken\x1b[0m: no TUN (no-tun)\n    why: a tunnel needs one\n    do:  modprobe tun\n" +
			"\x1b[33mwarning\x1b[0m: a: a rule; ?[2Jdrops (firewall-drops)\n    why: x\n    do:  y\n" +
			"not checked: b: reachability: not root\nnot checked: a, b, c and 2 more: path-mtu: no answer\nnot checked: path-mtu: only 64\n2 tunnels: 1 broken, 1 warning, 0 notes, 7 not checked\n"},
	} {
		var b bytes.Buffer
		if err := writeReport(&b, r, x.colour); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(x.want, b.String()); d != "" {
			t.Error(d)
		}
	}
}

// Of many findings of one code a few are written, and the others are counted.
func TestWriteReport_many(t *testing.T) {
	r := &doctor.Report{}
	for i := range 1000 {
		name := fmt.Sprint("t", i)
		r.Tunnels = append(r.Tunnels, name)
		r.Findings = append(r.Findings, doctor.Finding{Code: doctor.NoRoute, Severity: doctor.Broken, Tunnel: name, What: "no route"})
	}
	var b bytes.Buffer
	if err := writeReport(&b, r, false); err != nil {
		t.Fatal(err)
	}
	const end = "980 more with no-route, which --json has: t20, t21, t22 and 977 more\n1000 tunnels: 1000 broken, 0 warnings, 0 notes, 0 not checked\n"
	if n := strings.Count(b.String(), "\n"); n != 3*mostOfCode+2 || !strings.HasSuffix(b.String(), end) {
		t.Errorf("%d lines: %s", n, b.String())
	}
}

// Colours are for terminals.
func TestColours(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer terminal.Close()
	for _, x := range []struct {
		name        string
		environment map[string]string
		want        bool
	}{
		{"a terminal", map[string]string{"TERM": "xterm"}, true},
		{"NO_COLOR is empty", map[string]string{"TERM": "xterm", "NO_COLOR": ""}, true},
		{"NO_COLOR", map[string]string{"TERM": "xterm", "NO_COLOR": "1"}, false},
		{"dumb", map[string]string{"TERM": "dumb"}, false},
		{"none", nil, false},
	} {
		lookup := func(name string) (string, bool) { v, ok := x.environment[name]; return v, ok }
		if got := colours(terminal, lookup); got != x.want {
			t.Errorf("%s: %v", x.name, got)
		}
		if colours(new(bytes.Buffer), lookup) {
			t.Errorf("%s: a buffer has colours", x.name)
		}
	}
}

// Each flag of up is one of doctor.
func TestNewCmdDoctor_flags(t *testing.T) {
	s := &streams{new(bytes.Buffer), new(bytes.Buffer)}
	c := newCmdDoctor(s, nil)
	newCmdUp(s, nil).Flags().VisitAll(func(f *pflag.Flag) {
		if c.Flags().Lookup(f.Name) == nil {
			t.Errorf("--%s is missing", f.Name)
		}
	})
}

// docs/troubleshooting.md has the table of codes.
func TestNewCmdDoctor_docs(t *testing.T) {
	text, err := os.ReadFile("../../docs/troubleshooting.md")
	if os.IsNotExist(err) {
		t.Skip("there is no docs/troubleshooting.md") // the package is tested without the tree
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(text, []byte("\n"+doctor.CodeTable())) {
		t.Errorf("docs/troubleshooting.md is not what doctor finds: want\n%s", doctor.CodeTable())
	}
}
