package ipipd

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// maxLines is how long a file may be that is not a test: what is longer does not
// fit in a head. 400 is the aim.
const maxLines = 500

// pure are the rooms in which everything is a function on bytes and times that
// are handed in, and with which files: encap and tun have system calls as well.
var pure = []string{
	"mss/*.go", "keepalive/*.go", "internal/ipv4/*.go", "internal/packet/*.go",
	"encap/encap.go", "encap/decapsulate.go", "encap/ecn.go", "encap/drop.go", "encap/fragment.go",
	"encap/icmp.go", "encap/offload.go", "encap/outererror.go", "encap/pathmtu.go",
	"tun/coalesce.go", "tun/split.go",
}

// worldly are the packages that a pure file has no use for.
var worldly = map[string]string{
	"context":                "nothing there waits",
	"log":                    "an error is logged once, by whoever decides about it",
	"log/slog":               "an error is logged once, by whoever decides about it",
	"net":                    "sockets belong to the doors",
	"os":                     "files and processes belong to the doors",
	"sync":                   "a packet takes no lock: one goroutine owns what is changed",
	"syscall":                "system calls belong to the doors",
	"golang.org/x/sys/unix":  "system calls belong to the doors",
	"ipipd/internal/netlab":  "that is for tests",
	"ipipd/internal/control": "that is for tunnel and cmd",
}

// clocks are the functions of package time that know what time it is, or wait.
var clocks = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}

func TestEachPackageHasOneDocComment(t *testing.T) {
	docs, packages := map[string][]string{}, map[string]bool{}
	eachFile(t, func(name string, f *ast.File, _ int) {
		packages[path.Dir(name)] = true
		if f.Doc == nil {
			return
		}
		dir, first := path.Dir(name), "Package "+f.Name.Name+" "
		docs[dir] = append(docs[dir], name)
		if f.Name.Name == "main" {
			first = strings.ToUpper(path.Base(dir)[:1]) + path.Base(dir)[1:] + " "
		}
		if !strings.HasPrefix(f.Doc.Text(), first) {
			t.Errorf("%s: the doc comment begins with %.30q, want %q: go doc shows that line in its list", name, f.Doc.Text(), first)
		}
	})
	for dir := range packages {
		if len(docs[dir]) != 1 {
			t.Errorf("%s has doc comments in %q: want one, which says what the package is, its limits and its RFCs; go doc joins several in no sensible order", dir, docs[dir])
		}
	}
}

func TestFilesFitInAHead(t *testing.T) {
	eachFile(t, func(name string, _ *ast.File, lines int) {
		if lines > maxLines {
			t.Errorf("%s has %d lines, want %d at most: split it by topic", name, lines, maxLines)
		}
	})
}

func TestPureRoomsKnowNoWorld(t *testing.T) {
	matched := map[string]bool{}
	eachFile(t, func(name string, f *ast.File, _ int) {
		i := slices.IndexFunc(pure, func(pattern string) bool { ok, _ := path.Match(pattern, name); return ok })
		if i < 0 {
			return
		}
		matched[pure[i]] = true
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if why, ok := worldly[imported]; ok {
				t.Errorf("%s imports %s: %s", name, imported, why)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine: between the doors everything is a function on bytes", name)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clocks, n.Sel.Name) {
					t.Errorf("%s calls time.%s: time enters as an argument, so that tests need no clock", name, n.Sel.Name)
				}
			}
			return true
		})
	})
	for _, pattern := range pure {
		if !matched[pattern] {
			t.Errorf("no file is %s: say which file has its rules now", pattern)
		}
	}
}

// Whoever reads an error in the log should read it once, and from the one who
// decided what to do about it.
func TestOnlyTunnelAndCommandsLog(t *testing.T) {
	eachFile(t, func(name string, f *ast.File, _ int) {
		switch dir, _, _ := strings.Cut(name, "/"); dir {
		case "tunnel", "cmd", "bench", "scripts":
			return
		}
		for _, spec := range f.Imports {
			if spec.Path.Value == `"log"` || spec.Path.Value == `"log/slog"` {
				t.Errorf("%s imports %s: return the error; tunnel logs it, once", name, spec.Path.Value)
			}
		}
	})
}

// The laboratory of the tests runs commands and panics where a test would fail.
func TestTheProgramIsFreeOfTestCode(t *testing.T) {
	eachFile(t, func(name string, f *ast.File, _ int) {
		if strings.HasPrefix(name, "internal/netlab/") {
			return
		}
		for _, spec := range f.Imports {
			if spec.Path.Value == `"ipipd/internal/netlab"` || spec.Path.Value == `"testing"` {
				t.Errorf("%s imports %s: only tests may", name, spec.Path.Value)
			}
		}
	})
}

// eachFile calls f for each Go file of the module that is not a test, whatever
// system it is for, with its number of lines.
func eachFile(t *testing.T, f func(name string, file *ast.File, lines int)) {
	t.Helper()
	err := fs.WalkDir(os.DirFS("."), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (name != "." && strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata" || entry.Name() == "bin"):
			return fs.SkipDir
		case entry.IsDir() || path.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		f(name, parsed, files.File(parsed.FileStart).LineCount()-1) // it counts what follows the last newline
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
