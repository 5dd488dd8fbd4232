package config

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// script writes commands in one form: a line for the menu, a line for the command, constant values in quotes.
func script(commands []command) []byte {
	var b bytes.Buffer
	for _, c := range commands {
		fmt.Fprintf(&b, "%s\n", c.menu)
		if c.verb == "" {
			b.WriteByte(';') // what follows is neither a comment nor a path
		}
		b.WriteString(c.verb)
		for _, w := range c.words {
			b.WriteByte(' ')
			switch {
			case w.unset:
				b.WriteString("!" + w.key)
				continue
			case w.key != "":
				b.WriteString(w.key + "=")
			}
			if w.raw != "" {
				b.WriteString(w.raw)
				continue
			}
			b.WriteByte('"')
			for _, c := range []byte(w.value) {
				switch {
				case c < ' ' || c > '~':
					fmt.Fprintf(&b, `\%02X`, c)
				case strings.IndexByte(`"\$?`, c) >= 0:
					b.Write([]byte{'\\', c})
				default:
					b.WriteByte(c)
				}
			}
			b.WriteByte('"')
		}
		if isBlank(b.Bytes()[b.Len()-1]) {
			b.WriteByte(';') // an escaped blank in front of the end of the line would continue it
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}

func TestScanRouterOS(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"header line", "/ip route\nadd a=1\nadd a=2", "/ip route\nadd a=\"1\"\n/ip route\nadd a=\"2\"\n"},
		{"one line", "/ip route add a=1", "/ip route\nadd a=\"1\"\n"},
		{"one line does not change the menu", "/ip route\n/ip address add a=1\nadd a=2", "/ip address\nadd a=\"1\"\n/ip route\nadd a=\"2\"\n"},
		{"slashes", "/ip/route/add a=1\n/ip/address\nadd\n/ip/dns set a=1", "/ip route\nadd a=\"1\"\n/ip address\nadd\n/ip dns\nset a=\"1\"\n"},
		{"no slash", "interface ipip add\n/system clock\nip route add\nset\nip/address\nadd", "/interface ipip\nadd\n/ip route\nadd\n/system clock\nset\n/ip address\nadd\n"},
		{"below the menu", "/ip\nroute add\nroute\nadd\n.. address add\n..\nroute add\n/\nip route add", strings.Repeat("/ip route\nadd\n", 2) + "/ip address\nadd\n" + strings.Repeat("/ip route\nadd\n", 2)},
		{"semicolon", "/ip route; add a=1;add a=\"2;3\"; # a\nadd", "/ip route\nadd a=\"1\"\n/ip route\nadd a=\"2;3\"\n/ip route\n; \"#\" \"a\"\n/ip route\nadd\n"},
		{"comments", "# a\n  # b \\\n/ip route\nadd a=#b #c\n #interrupted \n#interruptedly", "/ip route\nadd a=\"#b\" \"#c\"\n/ip route\n#interrupted\n"},
		{"unquoted", "/a add a=![]#@*{}<>?'b c=d=e", "/a\nadd a=\"![]#@*{}<>\\?'b\" c=\"d=e\"\n"},
		{"bracket that is not closed", "/a\nadd a=[b c=( d=[e]\nadd a=[b]", "/a\nadd a=\"[b\" c=\"(\" d=\"[e]\"\n/a\nadd a=[b]\n"},
		{"quoted", `/a add a="(it's) \"x\" \\ \$ \_\? \r\n\t\E7"`, "/a\nadd a=\"(it's) \\\"x\\\" \\\\ \\$  \\? \\0D\\0A\\09\\E7\"\n"},
		{"continuations", "/a\r\nadd \\\r\n    a=\\\r\n    b c=\"d \\\n  \te\\\r\n    f\" !g\\\n    h i\\\nj=k", "/a\nadd a=\"b\" c=\"d ef\" !gh ij=\"k\"\n"},
		{"a backslash at the end of a value", "/a\nadd a=\"b\\\\\"\nadd b=c\\\\\nadd", "/a\nadd a=\"b\\\\\"\n/a\nadd b=\"c\\\\\"\n/a\nadd\n"},
		{"expressions", "/a set [ find a=\"]\" b=[c] ] d=[e f] g={h;\ni} j=($k . \"l\") m=$n o=\"$p\" q=5$", "/a\nset [ find a=\"]\" b=[c] ] d=[e f] g={h;\ni} j=($k . \"l\") m=$n o=\"$p\" q=\"5\\$\"\n"},
		{"expression behind a continuation", "/a set b=\\\n    [ c ]", "/a\nset b=[ c ]\n"},
		{"variables", `/a set $a "$(b)" $[c] $_ ($) $- $.`, "/a\nset $a \"$(b)\" $[c] $_ ($) \"\\$-\" \"\\$.\"\n"},
		{"quotes in braces", "/a set b={ \"\\\"}\" c \"\n# \" } d", "/a\nset b={ \"\\\"}\" c \"\n# \" } \"d\"\n"},
		{"not unset", "/a set !b=c ! \"!d\"", "/a\nset \"!b=c\" \"!\" \"!d\"\n"},
		{"arguments without a verb, above the menu", "/a\n.. b c=d", "/\nb c=\"d\"\n"},
		{"arguments without a verb", "/tool fetch url=a\n/a\nb=c", "/tool\nfetch url=\"a\"\n/a\n; b=\"c\"\n"},
		{"script", "/a\n:local b 1; :if ($b=1) do={\n:put 2\n}\nadd", "/a\n:local \"b\" \"1\"\n/a\n:if ($b=1) do={\n:put 2\n}\n/a\nadd\n"},
		{"byte order mark", "\ufeff/a\nadd", "/a\nadd\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			commands, errs := scanRouterOS("x.rsc", []byte(tt.in))
			if diff := cmp.Diff(tt.want, string(script(commands))); diff != "" || errs != nil {
				t.Errorf("errors %v, (-want +got)\n%s", errs, diff)
			}
		})
	}
}

// A column counts characters, and a byte order mark is none.
func TestScanRouterOS_position(t *testing.T) {
	commands, _ := scanRouterOS("x.rsc", []byte("\ufeff/a add é=1 \\\r\n    b=2\r\n# c\r\nadd"))
	var got []string
	for _, c := range commands {
		got = append(got, c.pos.String())
		for _, w := range c.words {
			got = append(got, w.pos.String())
		}
	}
	if diff := cmp.Diff([]string{"x.rsc:1:1", "x.rsc:1:8", "x.rsc:2:5", "x.rsc:4:1"}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// Commands are read back the same from what script writes, and tunnels from what WriteRouterOS writes. Errors have a
// position in the file.
func FuzzParseRouterOS(f *testing.F) {
	files, err := filepath.Glob("testdata/routeros/*.rsc")
	if err != nil || len(files) == 0 {
		f.Fatalf("no exports: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read, errs := parseRouterOS("x.rsc", data)
		lines := bytes.Count(data, []byte("\n")) + 1
		check := func(p Position) {
			if p.File != "x.rsc" || p.Line < 1 || p.Line > lines || p.Column < 1 || p.Column > len(data)+1 {
				t.Errorf("%v is not within the %d lines of the file", p, lines)
			}
		}
		for _, err := range errs {
			check(err.Pos)
			if !utf8.ValidString(err.Message) || strings.ContainsAny(err.Message, "\r\n") {
				t.Errorf("error %q is not one line of text", err.Message)
			}
		}
		for _, note := range read.Notes {
			if !utf8.ValidString(note) || strings.ContainsAny(note, "\r\n") {
				t.Errorf("note %q is not one line of text", note)
			}
		}
		for _, tunnel := range read.Tunnels {
			check(tunnel.Pos)
			for _, s := range tunnel.Settings {
				check(s.Pos)
				if s.Property != "ipsec-secret" && !utf8.ValidString(s.Value) {
					t.Errorf("%s: %q is not UTF-8", s.Property, s.Value)
				}
			}
		}
		if _, more := read.configs(); len(errs)+len(more) == 0 && len(read.Refused) == 0 && named(read) {
			writtenAgain(t, read, "x.rsc", func(entries []Entry) []byte {
				var b bytes.Buffer
				if _, err := WriteRouterOS(&b, DefaultProcess(), entries); err != nil {
					t.Fatal(err)
				}
				return b.Bytes()
			})
		}
		commands, errs := scanRouterOS("x.rsc", data)
		if errs != nil {
			return
		}
		written := script(commands)
		again, errs := scanRouterOS("x.rsc", written)
		withoutPositions(commands)
		withoutPositions(again)
		if !reflect.DeepEqual(commands, again) || errs != nil {
			t.Errorf("%+v\nwritten as\n%s\nread again %+v\nerrors %v", commands, written, again, errs)
		}
	})
}

// named reports whether each tunnel has a name, as tunnels that run do.
func named(f *File) bool {
	return !slices.ContainsFunc(f.Tunnels, func(t Tunnel) bool { return find(t.Settings, "name", "") == nil })
}

func withoutPositions(commands []command) {
	for i := range commands {
		commands[i].pos = Position{}
		for j := range commands[i].words {
			commands[i].words[j].pos = Position{}
		}
	}
}
