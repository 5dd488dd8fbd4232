// Gotest runs go test and says at the end which tests were skipped and why: a
// test that needs root, a namespace or a program that is not there must not pass
// for one that passed. Its arguments are those of go test.
//
// What fails is shown with everything it printed, and at the end again with the
// first line of each thing it logged; what passes, as one line per package. The
// closing line is "N passed, N failed, N skipped".
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strings"
)

func main() {
	args := append([]string{"test", "-json"}, os.Args[1:]...)
	cmd := exec.Command("go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// An interrupt from the terminal reaches go test too. It ends by itself, and
	// what it has to say by then is still worth reading.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := newSummary(os.Stdout)
	s.read(out)
	err = cmd.Wait()
	s.close()
	if err != nil || s.failed > 0 {
		os.Exit(1)
	}
}

// event is a line of go test -json; see `go doc test2json`.
type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

// testID names a test, or with an empty name the package as a whole.
type testID struct{ pkg, name string }

type summary struct {
	w                       io.Writer
	output                  map[testID][]string // of what has not ended yet
	parents                 map[testID]bool     // tests that have subtests
	perPackage              map[string]int      // tests ended
	reasons                 map[string][]string // why skipped → tests
	passed, failed, skipped int
	failures                []failure
}

// failure is what failed, by its package and name, and what it logged.
type failure struct {
	name   string
	logged []string
}

func newSummary(w io.Writer) *summary {
	return &summary{
		w:          w,
		output:     map[testID][]string{},
		parents:    map[testID]bool{},
		perPackage: map[string]int{},
		reasons:    map[string][]string{},
	}
}

// read takes the stream to its end. A line that is not JSON is shown as it is.
func (s *summary) read(r io.Reader) {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				s.event(e)
			} else {
				s.w.Write(line)
			}
		}
		if err != nil {
			return
		}
	}
}

func (s *summary) event(e event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(s.w, e.Output)
	case "run":
		if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
			s.parents[testID{e.Package, e.Test[:i]}] = true
		}
	case "output":
		s.output[id] = append(s.output[id], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageEnds(id, e)
		} else {
			s.testEnds(id, e)
		}
		delete(s.output, id)
	}
}

// testEnds counts a test. A test that only holds subtests is not counted beside
// them, unless it failed.
func (s *summary) testEnds(id testID, e event) {
	name := e.Package + " " + e.Test
	switch {
	case e.Action == "fail":
		inSubtest := s.failedUnder(name + "/")
		s.failures = append(s.failures, failure{name, logged(s.output[id])})
		fmt.Fprintf(s.w, "FAIL %s (%.1fs)\n%s", name, e.Elapsed, strings.Join(s.output[id], ""))
		if inSubtest {
			return
		}
		s.failed++
	case e.Action == "skip":
		s.skipped++
		why := reason(s.output[id])
		s.reasons[why] = append(s.reasons[why], name)
	case s.parents[id]:
		return
	default:
		s.passed++
	}
	s.perPackage[e.Package]++
}

func (s *summary) failedUnder(prefix string) bool {
	return slices.ContainsFunc(s.failures, func(f failure) bool { return strings.HasPrefix(f.name, prefix) })
}

func (s *summary) packageEnds(id testID, e event) {
	switch n := s.perPackage[e.Package]; {
	case e.Action == "fail":
		if !s.failedUnder(e.Package + " ") {
			// Nothing in it failed by name: it did not build, or it crashed.
			s.failed++
			s.failures = append(s.failures, failure{name: e.Package})
		}
		fmt.Fprintf(s.w, "FAIL %s (%.1fs)\n%s", e.Package, e.Elapsed, strings.Join(s.output[id], ""))
	case e.Action == "pass" && n > 0:
		fmt.Fprintf(s.w, "ok   %-28s %4d tests  %6.1fs\n", e.Package, n, e.Elapsed)
	}
}

func (s *summary) close() {
	if len(s.reasons) > 0 {
		fmt.Fprintln(s.w, "\nSkipped, and why:")
		var reasons []string
		for r := range s.reasons {
			reasons = append(reasons, r)
		}
		slices.Sort(reasons)
		for _, r := range reasons {
			fmt.Fprintf(s.w, "  %s\n", r)
			for _, t := range s.reasons[r] {
				fmt.Fprintf(s.w, "      --- SKIP: %s\n", t)
			}
		}
	}
	if len(s.failures) > 0 {
		fmt.Fprintln(s.w, "\nFailed:")
		for _, f := range s.failures {
			fmt.Fprintf(s.w, "  %s\n", f.name)
			for _, l := range f.logged {
				fmt.Fprintf(s.w, "      %s\n", strings.TrimSpace(l))
			}
		}
	}
	fmt.Fprintf(s.w, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}

var logPrefix = regexp.MustCompile(`^\s+\w+\.go:\d+: `)

// logged is the first line of each thing that a test logged, with file and line.
func logged(lines []string) (first []string) {
	for _, l := range lines {
		if logPrefix.MatchString(l) {
			first = append(first, l)
		}
	}
	return first
}

// reason finds in what a skipped test printed the last thing it logged.
func reason(lines []string) string {
	l := logged(lines)
	if len(l) == 0 {
		return "no reason given"
	}
	return strings.TrimSpace(logPrefix.ReplaceAllString(l[len(l)-1], ""))
}
