package lint

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

// root is the module's folder.
const root = "../.."

// maxLines is how long a file may be that is not a test: what is longer does not
// fit in a head. 400 is the aim.
const maxLines = 500

// topLevel is what may stand at the module's root, beside hidden files, what git ignores
// (bin, ipipd).
var topLevel = []string{
	"cmd", "encap", "mss", "keepalive", "tun", "internal", "test", "docs", "packaging", "scripts",
	"go.mod", "go.sum", "Makefile", "LICENSE", "README.md", "bin", "ipipd",
}

// pureFiles have only functions on bytes and on times that are handed in. tun has
// system calls as well.
var pureFiles = []string{
	"encap/*.go", "mss/*.go", "keepalive/*.go", "internal/ipv4/*.go", "internal/packet/*.go", "internal/drop/*.go", "internal/history/*.go", "internal/monitor/*.go",
	"internal/fib/*.go", "tun/coalesce.go", "tun/split.go",
}

// forbiddenImports are the packages that a pure file has no use for.
var forbiddenImports = map[string]string{
	"context":                "nothing there waits",
	"log":                    "an error is logged once, by whoever decides about it",
	"log/slog":               "an error is logged once, by whoever decides about it",
	"net":                    "sockets belong to underlay",
	"os":                     "files and processes belong to tun, underlay and cmd",
	"sync":                   "a packet takes no lock: one goroutine owns what is changed",
	"syscall":                "system calls belong to tun and underlay",
	"golang.org/x/sys/unix":  "system calls belong to tun and underlay",
	"ipipd/internal/control": "that is for tunnel and cmd",
}

// clocks are the functions of package time that read the clock, or wait.
var clocks = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}

func TestFiles_topLevel(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if name := entry.Name(); !strings.HasPrefix(name, ".") && !slices.Contains(topLevel, name) {
			t.Errorf("%s stands at the module's root: what is not one of %q belongs below one of them", name, topLevel)
		}
	}
}

func TestFiles_docComment(t *testing.T) {
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

func TestFiles_length(t *testing.T) {
	eachFile(t, func(name string, _ *ast.File, lines int) {
		if lines > maxLines {
			t.Errorf("%s has %d lines, want %d at most: split it by topic", name, lines, maxLines)
		}
	})
}

func TestFiles_pure(t *testing.T) {
	matched := map[string]bool{}
	eachFile(t, func(name string, f *ast.File, _ int) {
		i := slices.IndexFunc(pureFiles, func(pattern string) bool { ok, _ := path.Match(pattern, name); return ok })
		if i < 0 {
			return
		}
		matched[pureFiles[i]] = true
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if why, ok := forbiddenImports[imported]; ok {
				t.Errorf("%s imports %s: %s", name, imported, why)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine: a pure file has functions on bytes only", name)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clocks, n.Sel.Name) {
					t.Errorf("%s calls time.%s: time enters as an argument, so that tests need no clock", name, n.Sel.Name)
				}
			}
			return true
		})
	})
	for _, pattern := range pureFiles {
		if !matched[pattern] {
			t.Errorf("no file is %s: say which file has its rules now", pattern)
		}
	}
}

// eachFile calls f for each Go file of the module that is not a test, whatever
// system it is for, with its path from the module's root and its number of lines.
func eachFile(t *testing.T, f func(name string, file *ast.File, lines int)) {
	t.Helper()
	eachGoFile(t, func(name string, file *ast.File, lines int) {
		if !strings.HasSuffix(name, "_test.go") {
			f(name, file, lines)
		}
	})
}

// eachGoFile is eachFile, tests included.
func eachGoFile(t *testing.T, f func(name string, file *ast.File, lines int)) {
	t.Helper()
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (name != "." && strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata" || entry.Name() == "bin"):
			return fs.SkipDir
		case entry.IsDir() || path.Ext(name) != ".go":
			return nil
		}
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, path.Join(root, name), nil, parser.ParseComments)
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
