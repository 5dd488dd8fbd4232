package config

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v4"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// Whatever a file has in it, each error has a position in the file. A file without errors is read back the same from
// what writeYAML writes of it, and its tunnels from what WriteYAML writes.
func FuzzParseYAML(f *testing.F) {
	for _, name := range goodFiles(f) {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, errs := parseYAML("f", data)
		if file != nil {
			_, more := file.configs()
			errs = append(errs, more...)
			if _, err := file.MarshalJSON(); err != nil && len(errs) == 0 {
				t.Errorf("no error, and no JSON: %v", err)
			}
		} else if len(errs) == 0 {
			t.Fatal("neither a file nor an error")
		}
		if n := strings.Count(errs.Error(), "\n") + 1; n > MaxShown+1 {
			t.Errorf("%d lines of errors", n)
		}
		lines := strings.Split(string(data), "\n")
		for _, err := range errs {
			p := err.Pos
			if p.File != "f" || p.Line < 1 || p.Line > len(lines) || p.Column < 1 || p.Column > utf8.RuneCountInString(lines[p.Line-1])+1 {
				t.Errorf("no such place: %v", err)
			}
			if strings.ContainsAny(err.Message, "\n\r") {
				t.Errorf("more than one line: %q", err.Message)
			}
		}
		if len(errs) == 0 {
			writtenAgain(t, file, "f.yaml", func(entries []Entry) []byte {
				var b bytes.Buffer
				if err := WriteYAML(&b, processOf(t, file), entries); err != nil {
					t.Fatal(err)
				}
				again, _ := parseYAML("f", b.Bytes())
				if got, want := processOf(t, again), processOf(t, file); got != want {
					t.Errorf("the process: %+v, want %+v", got, want)
				}
				return b.Bytes()
			})
		}
		if _, wrong := parseYAML("f", data); len(wrong) > 0 {
			return
		}
		written := writeYAML(t, file)
		again, wrong := parseYAML("f", written)
		if len(wrong) > 0 {
			t.Fatalf("%v\n%s", wrong, written)
		}
		if d := cmp.Diff(file, again, cmpopts.IgnoreTypes(Position{}), cmpopts.IgnoreUnexported(Tunnel{}), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s\n%s", d, written)
		}
	})
}

// processOf returns the settings of the process in a file without errors.
func processOf(t *testing.T, f *File) Process {
	t.Helper()
	process := DefaultProcess()
	for _, p := range processProperties {
		for _, s := range f.Process {
			if s.Property == p.Name {
				if err := p.Set(&process, s.Value); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return process
}

// writtenAgain fails the test unless the tunnels of f, disabled ones included, are read back the same from what export
// writes, and refused with their secrets hidden.
func writtenAgain(t *testing.T, f *File, name string, export func([]Entry) []byte) {
	t.Helper()
	entries := entriesOf(t, f)
	written := export(entries)
	again, errs := parse(name, written)
	if again != nil {
		_, more := again.configs()
		errs = append(errs, more...)
	}
	if len(errs) > 0 || len(again.Refused) > 0 {
		t.Fatalf("%v, %v\n%s", errs, again.Refused, written)
	}
	got := entriesOf(t, again)
	if len(got) != len(entries) {
		t.Fatalf("%d tunnels, want %d\n%s", len(got), len(entries), written)
	}
	for i := range got {
		a, b := &entries[i], &got[i]
		if changes := tunnel.Changes(&a.Config, &b.Config); len(changes) > 0 || a.Config.Disabled != b.Config.Disabled || !bytes.Equal(a.Config.IPsec.Secret, b.Config.IPsec.Secret) {
			t.Errorf("%s: %v differ\n%s", a.Config.Name, changes, written)
		}
	}
	secrets := 0
	for i := range entries {
		entries[i].HideSecret = true
		if len(entries[i].Config.IPsec.Secret) > 0 && !entries[i].Config.Disabled {
			secrets++
		}
	}
	if secrets == 0 {
		return
	}
	written = export(entries)
	again, errs = parse(name, written)
	_, more := again.configs()
	if len(errs)+len(more)+len(again.Refused) == 0 {
		t.Errorf("without its secrets it is not refused:\n%s", written)
	}
}

// entriesOf returns all tunnels of a file without errors.
func entriesOf(t *testing.T, f *File) []Entry {
	t.Helper()
	entries, err := f.Entries()
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// writeYAML writes f, with each text in double quotes.
func writeYAML(t *testing.T, f *File) []byte {
	text := func(s string) *yaml.Node {
		return &yaml.Node{Kind: yaml.ScalarNode, Style: yaml.DoubleQuotedStyle, Value: s}
	}
	mapping := func(settings []Setting) *yaml.Node {
		m := &yaml.Node{Kind: yaml.MappingNode}
		for i, s := range settings {
			value := text(s.Value)
			if properties[s.Property].Repeatable {
				if i == 0 || settings[i-1].Property != s.Property {
					m.Content = append(m.Content, text(s.Property), &yaml.Node{Kind: yaml.SequenceNode})
				}
				if list := m.Content[len(m.Content)-1]; s.Value != "" {
					list.Content = append(list.Content, value)
				}
				continue
			}
			m.Content = append(m.Content, text(s.Property), value)
		}
		return m
	}
	list := &yaml.Node{Kind: yaml.SequenceNode}
	for _, one := range f.Tunnels {
		list.Content = append(list.Content, mapping(one.Settings))
	}
	root := mapping(f.Process)
	root.Content = append(root.Content, text(defaultsKey), mapping(f.Defaults), text(tunnelsKey), list)
	written, err := yaml.Dump(root)
	if err != nil {
		t.Fatal(err)
	}
	return written
}

// Whatever text the properties take comes back from both forms of a file.
func FuzzWriteYAML(f *testing.F) {
	f.Add("ipip1", "a # b", "mellon", "/etc/ipipd/secret", "vpn.example.net")
	f.Add("to Riga: no. 5", "0123", "\xe7\x00\r\n$x?\\_", "- a", "<<")
	f.Add("a,b@c%d", "no\u2028\u0085\ufeff", "\"'#\t\x7f", "{a: [b]}", "\u202e")
	f.Fuzz(func(t *testing.T, name, comment, secret, file, id string) {
		e := Entry{Config: tunnel.Default()}
		settings := []Setting{{Property: "remote-address", Value: "192.0.2.1"}, {Property: "name", Value: name}, {Property: "comment", Value: comment},
			{Property: "ipsec-secret", Value: secret}, {Property: "ipsec-remote-id", Value: id}}
		if secret == "" {
			settings[3] = Setting{Property: "ipsec-secret-file", Value: file}
		}
		for _, s := range settings {
			_ = Set(&e.Config, s) // changes nothing if it is not accepted
		}
		if e.Config.Validate() != nil || e.Config.Name == "" {
			return
		}
		if utf8.ValidString(secret) && utf8.ValidString(file) && len(file) <= maxValue {
			same(t, "x.yaml", e, func(b *bytes.Buffer, entries []Entry) error { return WriteYAML(b, DefaultProcess(), entries) })
		}
		if secret != "" && e.Config.IPsec.RemoteID == "" {
			e.Config.Routes, e.Config.Addresses = exportedPrefixes()
			same(t, "x.rsc", e, writeRouterOS)
		}
	})
}

// exportedPrefixes returns routes and addresses that RouterOS can have, too.
func exportedPrefixes() ([]netstate.InterfaceRoute, []netstate.InterfaceAddress) {
	var c tunnel.Config
	for _, s := range []Setting{{Property: "route", Value: "10.20.0.0/16 metric 5 table 100"}, {Property: "route", Value: "0.0.0.0/0"},
		{Property: "address", Value: "10.255.0.1/30"}, {Property: "address", Value: "10.255.0.9 peer 10.255.0.10"}} {
		if err := Set(&c, s); err != nil {
			panic(err) // they are constants
		}
	}
	return c.Routes, c.Addresses
}
