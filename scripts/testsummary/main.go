// Testsummary prints the summary of a test run, as the post-run command of gotestsum (see
// the Makefile): the slowest packages, the flaky tests, which passed only in the rerun, the
// failed tests, and as the last line "N passed, N failed, N skipped". It reads the events
// (`go doc test2json`) of the run and the rerun from the file GOTESTSUM_JSONFILE.
//
// It is stricter than gotestsum, which accepts any run without failures in the rerun. Here
// these fail, too: a package that failed as a whole, a subtest that the rerun did not find
// by its name, a data race, and flaky tests if there is more than one.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// maxFlaky is how many flaky tests a successful run may have.
const maxFlaky = 1

func main() {
	if err := run(os.Getenv("GOTESTSUM_JSONFILE"), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run reads the events in a file, and writes the output of flaky tests to another one
// beside it. It returns an error if the test run has failed.
func run(name string, w io.Writer) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	r := read(file)
	r.classify()
	flakyFile := strings.TrimSuffix(name, ".json") + ".flaky.txt"
	if err := os.Remove(flakyFile); err != nil && !os.IsNotExist(err) {
		return err
	}
	if len(r.flaky) > 0 {
		if err := os.WriteFile(flakyFile, []byte(r.flakyOutput()), 0o644); err != nil {
			return err
		}
	}
	r.write(w, flakyFile)
	if len(r.failed) > 0 {
		return errors.New("the run has failed")
	}
	return nil
}

// event is one line of go test -json.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// testID identifies a test, or a package if name is empty.
type testID struct{ pkg, name string }

func (id testID) String() string { return strings.TrimSpace(id.pkg + " " + id.name) }

// attempt is one run of a test. Its result is empty if it did not end.
type attempt struct {
	result string
	output strings.Builder
}

type results struct {
	attempts map[testID][]*attempt
	elapsed  map[string]time.Duration // of each package that has tests

	passed, skipped int
	flaky, failed   []testID
}

// read reads a stream of events. It ignores a truncated last line, as an interrupt leaves.
func read(in io.Reader) *results {
	r := &results{attempts: map[testID][]*attempt{}, elapsed: map[string]time.Duration{}}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if json.Unmarshal(line, &e) == nil && e.Package != "" { // not build output
			r.event(e)
		}
		if err != nil {
			return r
		}
	}
}

func (r *results) event(e event) {
	id := testID{e.Package, e.Test}
	// "run" begins a test, "start" a package.
	if e.Action == "run" || e.Action == "start" || len(r.attempts[id]) == 0 {
		r.attempts[id] = append(r.attempts[id], &attempt{})
	}
	current := r.attempts[id][len(r.attempts[id])-1]
	switch e.Action {
	case "output":
		current.output.WriteString(e.Output)
	case "pass", "fail", "skip":
		current.result = e.Action
		if e.Test == "" && e.Action != "skip" {
			r.elapsed[e.Package] += time.Duration(e.Elapsed * float64(time.Second))
		}
	}
}

// result returns the result of all attempts: pass, skip, flaky or fail.
func (r *results) result(id testID) string {
	attempts := r.attempts[id]
	last := attempts[len(attempts)-1].result
	for _, a := range attempts {
		switch {
		case a.result == "pass" || a.result == "skip":
		case last == "pass" && id.name != "" && !strings.Contains(a.output.String(), "DATA RACE"):
			return "flaky"
		default:
			return "fail"
		}
	}
	return last
}

// classify counts tests. A test with subtests does not count itself, nor does a failure
// that comes from a failed subtest.
func (r *results) classify() {
	inside := map[testID]map[string]bool{} // results of the tests of a package, or subtests of a test
	all := make([]testID, 0, len(r.attempts))
	for id := range r.attempts {
		all = append(all, id)
		for outer := id; outer.name != ""; {
			outer.name = outer.name[:max(0, strings.LastIndexByte(outer.name, '/'))]
			if inside[outer] == nil {
				inside[outer] = map[string]bool{}
			}
			inside[outer][r.result(id)] = true
		}
	}
	slices.SortFunc(all, func(a, b testID) int { return cmp.Or(cmp.Compare(a.pkg, b.pkg), cmp.Compare(a.name, b.name)) })
	for _, id := range all {
		holds := inside[id]
		switch result := r.result(id); {
		case result == "fail" && id.name == "" && holds["flaky"] && r.rerunsPassed(id):
		case result == "fail" && !holds["fail"]:
			r.failed = append(r.failed, id)
		case result == "flaky" && !holds["fail"] && !holds["flaky"]:
			r.flaky = append(r.flaky, id)
		case id.name == "" || result == "fail" || result == "flaky":
		case result == "skip":
			r.skipped++
		case holds == nil:
			r.passed++
		}
	}
	if len(r.flaky) > maxFlaky {
		r.failed = append(r.failed, r.flaky...)
	} else {
		r.passed += len(r.flaky)
	}
}

// rerunsPassed reports whether all reruns of the package passed.
func (r *results) rerunsPassed(id testID) bool {
	return !slices.ContainsFunc(r.attempts[id][1:], func(a *attempt) bool { return a.result != "pass" })
}

// flakyOutput returns the output of all attempts of the flaky tests.
func (r *results) flakyOutput() string {
	var s strings.Builder
	for _, id := range r.flaky {
		for i, a := range r.attempts[id] {
			fmt.Fprintf(&s, "=== %s, run %d: %s\n%s\n", id, i+1, cmp.Or(a.result, "did not end"), a.output.String())
		}
	}
	return s.String()
}

// write writes the summary. flakyFile is the name of the file with flakyOutput.
func (r *results) write(w io.Writer, flakyFile string) {
	slowest := make([]string, 0, len(r.elapsed))
	for pkg := range r.elapsed {
		slowest = append(slowest, pkg)
	}
	slices.SortFunc(slowest, func(a, b string) int { return cmp.Or(cmp.Compare(r.elapsed[b], r.elapsed[a]), cmp.Compare(a, b)) })
	if len(slowest) > 0 {
		fmt.Fprintln(w, "\nSlowest packages:")
	}
	for _, pkg := range slowest[:min(5, len(slowest))] {
		fmt.Fprintf(w, "  %6.1fs  %s\n", r.elapsed[pkg].Seconds(), pkg)
	}
	if len(r.flaky) > 0 {
		fmt.Fprintf(w, "\nFlaky, passed only when run again (what they printed: %s); more than %d in a run fail it:\n", flakyFile, maxFlaky)
		list(w, r.flaky)
	}
	if len(r.failed) > 0 {
		fmt.Fprintln(w, "\nFailed:")
		list(w, r.failed)
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", r.passed, len(r.failed), r.skipped)
}

func list(w io.Writer, ids []testID) {
	for _, id := range ids {
		fmt.Fprintf(w, "  %s\n", id)
	}
}
