package lint

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// readmeLines is how long README.md may be: the rest belongs into docs/.
const readmeLines = 150

func TestDocs_readmeLength(t *testing.T) {
	text, err := os.ReadFile(root + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(text, []byte("\n")); n > readmeLines {
		t.Errorf("README.md has %d lines, want %d at most: move what is not needed for a first tunnel to docs/", n, readmeLines)
	}
}

// Each file that a document links to exists, and each heading.
func TestDocs_links(t *testing.T) {
	files, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{}
	link := regexp.MustCompile(`\]\(([^()\s]+)\)`)
	for _, file := range append(files, root+"/README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(prose(string(text)), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			target, anchor, _ := strings.Cut(m[1], "#")
			if target == "" {
				target = file
			} else {
				target = path.Join(path.Dir(file), target)
			}
			linked[target] = true
			content, err := os.ReadFile(target)
			if err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
				continue
			}
			if anchor != "" && !anchors(string(content))[anchor] {
				t.Errorf("%s links to %s: there is no such heading", name, m[1])
			}
		}
	}
	for _, file := range files {
		if !linked[file] {
			t.Errorf("no document links to %s", file)
		}
	}
}

// The files and identifiers that docs/design.md names exist.
func TestDocs_design(t *testing.T) {
	text, err := os.ReadFile(root + "/docs/design.md")
	if err != nil {
		t.Fatal(err)
	}
	files, words := map[string]bool{}, map[string]bool{}
	word := regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`)
	err = fs.WalkDir(os.DirFS(root), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && name != "." && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "bin") {
			return fs.SkipDir
		}
		if ext := path.Ext(name); ext != ".go" && ext != ".c" {
			return nil
		}
		files[entry.Name()] = true
		source, err := os.ReadFile(path.Join(root, name))
		for _, w := range word.FindAll(source, -1) {
			words[string(w)] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`\w+\.(?:go|c)\b`).FindAllString(string(text), -1) {
		if !files[name] {
			t.Errorf("docs/design.md names the file %s: there is none", name)
		}
	}
	for _, span := range regexp.MustCompile("(?s)```.*?```|`[^`]+`").FindAllString(string(text), -1) {
		for _, w := range word.FindAllString(span, -1) {
			if mixed := regexp.MustCompile(`[a-z][A-Z]`).MatchString(w); mixed && !words[w] {
				t.Errorf("docs/design.md names %s: the code has no such word", w)
			}
		}
	}
}

// The tests and benchmarks that documents run by `go test` exist: with none that match it passes.
func TestDocs_goTest(t *testing.T) {
	files, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range append(files, root+"/README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range regexp.MustCompile("go test [^`#\n]*").FindAllString(string(text), -1) {
			folder := regexp.MustCompile(`\./\S+`).FindString(command)
			for _, m := range regexp.MustCompile(`-(run|bench)[ =](\S+)`).FindAllStringSubmatch(command, -1) {
				pattern, _, _ := strings.Cut(strings.Trim(m[2], "'"), "/") // a slash is before a subtest's name
				if pattern == "^$" {
					continue
				}
				seen++
				if !slices.ContainsFunc(testsOf(t, folder, map[string]string{"run": "Test", "bench": "Benchmark"}[m[1]]), regexp.MustCompile(pattern).MatchString) {
					t.Errorf("%s: %s: there is none of that name", filepath.Base(file), command)
				}
			}
		}
	}
	if seen < 4 {
		t.Errorf("%d are named", seen)
	}
}

// testsOf returns the names of the functions in a folder's tests that begin with begin.
func testsOf(t *testing.T, folder, begin string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(path.Join(root, folder, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s has no tests: %v", folder, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (`+begin+`\w+)\(`).FindAllStringSubmatch(string(text), -1) {
			names = append(names, m[1])
		}
	}
	return names
}

// prose returns a document without its blocks and spans of code.
func prose(text string) string {
	var b strings.Builder
	fenced := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```"):
			fenced = !fenced
		case !fenced && !strings.HasPrefix(line, "    "):
			b.WriteString(line)
		}
	}
	return regexp.MustCompile("`[^`]*`").ReplaceAllString(b.String(), "code")
}

// anchors returns the anchors that GitHub gives the headings of a document.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	fenced := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
		}
		heading := strings.TrimLeft(line, "#")
		if depth := len(line) - len(heading); fenced || depth == 0 || depth > 6 || !strings.HasPrefix(heading, " ") {
			continue
		}
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(heading))
		unique := anchor
		for n := 1; found[unique]; n++ {
			unique = fmt.Sprintf("%s-%d", anchor, n)
		}
		found[unique] = true
	}
	return found
}

func TestDocs_anchors(t *testing.T) {
	got := anchors("# Both ends\n```\n# no heading\n```\n## An MTU above the path's\n#hash\n### `--flag` (x, y)\n## Both ends\n")
	for _, want := range []string{"both-ends", "both-ends-1", "an-mtu-above-the-paths", "--flag-x-y"} {
		if !got[want] {
			t.Errorf("%q is missing in %v", want, got)
		}
	}
	if len(got) != 4 {
		t.Errorf("%v: want 4", got)
	}
}
