package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// events returns go test -json output. Each line is "package action", "package test
// action", or "package test output TEXT".
func events(lines string) string {
	var s strings.Builder
	for line := range strings.Lines(lines) {
		f := strings.Fields(line)
		switch len(f) {
		case 2:
			fmt.Fprintf(&s, "{\"Action\":%q,\"Package\":%q,\"Elapsed\":2}\n", f[1], f[0])
		case 3:
			fmt.Fprintf(&s, "{\"Action\":%q,\"Package\":%q,\"Test\":%q}\n", f[2], f[0], f[1])
		case 4:
			fmt.Fprintf(&s, "{\"Action\":%q,\"Package\":%q,\"Test\":%q,\"Output\":%q}\n", f[2], f[0], f[1], f[3]+"\n")
		}
	}
	return s.String()
}

func TestRun(t *testing.T) {
	const flaky = `
		p start
		p TestOnce run
		p TestOnce output slow
		p TestOnce fail
		p TestGood run
		p TestGood pass
		p fail
		p start
		p TestOnce run
		p TestOnce output fast
		p TestOnce pass
		p pass
	`
	for _, c := range []struct {
		name, events string
		want         []string // lines
		fails        bool
	}{
		{"passed-and-skipped", `
			p start
			p TestCases run
			p TestCases/one run
			p TestCases/one pass
			p TestCases/two run
			p TestCases/two skip
			p TestCases pass
			p pass
			q start
			q skip
		`, []string{"     2.0s  p", "1 passed, 0 failed, 1 skipped"}, false},
		{"flaky", flaky, []string{"  p TestOnce", "2 passed, 0 failed, 0 skipped"}, false},
		{"two-flaky", flaky + strings.ReplaceAll(flaky, "p ", "q "),
			[]string{"  p TestOnce", "  q TestOnce", "Failed:", "2 passed, 2 failed, 0 skipped"}, true},
		{"flaky-subtest", `
			p start
			p TestCases run
			p TestCases/a/b run
			p TestCases/a/b fail
			p TestCases fail
			p fail
			p start
			p TestCases run
			p TestCases/a/b run
			p TestCases/a/b pass
			p TestCases pass
			p pass
		`, []string{"  p TestCases/a/b", "1 passed, 0 failed, 0 skipped"}, false},
		{"always-fails", `
			p start
			p TestCases run
			p TestCases/one run
			p TestCases/one fail
			p TestCases fail
			p fail
			p start
			p TestCases run
			p TestCases/one run
			p TestCases/one fail
			p TestCases fail
			p fail
		`, []string{"Failed:", "  p TestCases/one", "0 passed, 1 failed, 0 skipped"}, true},
		// gotestsum passes the next four.
		{"a-subtest-that-is-not-found-again", `
			p start
			p TestCases run
			p TestCases/4711 run
			p TestCases/4711 fail
			p TestCases fail
			p fail
			p start
			p TestCases run
			p TestCases pass
			p pass
		`, []string{"  p TestCases/4711", "0 passed, 1 failed, 0 skipped"}, true},
		{"a-package-that-fails-as-a-whole", `
			p start
			p TestGood run
			p TestGood pass
			p fail
			p start
			p pass
		`, []string{"  p", "1 passed, 1 failed, 0 skipped"}, true},
		{"a-package-that-fails-as-a-whole-when-run-again", strings.Replace(flaky, "p pass", "p fail", 1),
			[]string{"  p", "2 passed, 1 failed, 0 skipped"}, true},
		{"a-data-race", strings.Replace(flaky, "slow", "DATA~RACE", 1),
			[]string{"Failed:", "  p TestOnce", "1 passed, 1 failed, 0 skipped"}, true},
		{"a-panic-ends-the-others", `
			p start
			p TestPanic run
			p TestOther run
			p TestPanic fail
			p fail
		`, []string{"  p TestOther", "  p TestPanic", "0 passed, 2 failed, 0 skipped"}, true},
		{"does-not-build", "p start\np fail\n", []string{"  p", "0 passed, 1 failed, 0 skipped"}, true},
		{"interrupted", `
			p start
			p TestGood run
			p TestGood pass
			p TestLong run
		`, []string{"  p TestLong", "1 passed, 1 failed, 0 skipped"}, true},
		{"nothing", "", []string{"0 passed, 0 failed, 0 skipped"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "test.json")
			stream := `{"ImportPath":"p","Action":"build-output","Output":"# p\n"}` + "\n" + events(c.events) + `{"Action":"ru`
			stream = strings.ReplaceAll(stream, "~", " ")
			if err := os.WriteFile(file, []byte(stream), 0o644); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			err := run(file, &out)
			got := out.String()
			for _, want := range c.want {
				if !strings.Contains("\n"+got, "\n"+want+"\n") {
					t.Errorf("the line %q is missing", want)
				}
			}
			if last := c.want[len(c.want)-1]; !strings.HasSuffix(got, "\n"+last+"\n") {
				t.Errorf("the last line is not %q", last)
			}
			if (err != nil) != c.fails {
				t.Errorf("error %v", err)
			}
			if t.Failed() {
				t.Log(got)
			}
		})
	}
}

// The output of both attempts of a flaky test is kept.
func TestResultsFlakyOutput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "test.json")
	stream := events("p start\np TestOnce run\np TestOnce output slow\np TestOnce fail\np fail\np start\np TestOnce run\np TestOnce output fast\np TestOnce pass\np pass\n")
	if err := os.WriteFile(file, []byte(stream), 0o644); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := run(file, &out); err != nil {
		t.Fatal(err)
	}
	flakyFile := strings.TrimSuffix(file, ".json") + ".flaky.txt"
	if !strings.Contains(out.String(), flakyFile) {
		t.Errorf("the summary does not name %s:\n%s", flakyFile, out.String())
	}
	got, err := os.ReadFile(flakyFile)
	if want := "=== p TestOnce, run 1: fail\nslow\n\n=== p TestOnce, run 2: pass\nfast\n\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v: want %q", got, err, want)
	}
	// The file of the previous run is removed.
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := run(file, &out); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(flakyFile); !os.IsNotExist(err) {
		t.Errorf("the outputs of the run before: %v", err)
	}
}
