// Closing writes the last lines of a test run, which gotestsum has run (see the
// Makefile) and calls it after: the slowest packages, the tests that passed only
// when they were run again, those that failed, and as the closing line
// "N passed, N failed, N skipped". It reads the events that gotestsum has written
// to GOTESTSUM_JSONFILE, of the first run and the second (`go doc test2json`).
//
// It is stricter than gotestsum, which is content when nothing fails the second
// time. Failed is also what was not run again by its name: a package that failed as
// a whole, a subtest whose name is another every time. So is a data race. And one
// flaky test may be the machine's doing: where there are two, both have failed.
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

// maxFlaky is how many tests may pass only the second time in a run that passes.
const maxFlaky = 1

func main() {
	if err := run(os.Getenv("GOTESTSUM_JSONFILE"), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run reads the events in a file, and writes the outputs of flaky tests to another
// beside it. Its error says why the run has failed.
func run(name string, w io.Writer) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	r := read(file)
	r.judge()
	outputs := strings.TrimSuffix(name, ".json") + ".flaky.txt"
	if err := os.Remove(outputs); err != nil && !os.IsNotExist(err) {
		return err
	}
	if len(r.flaky) > 0 {
		if err := os.WriteFile(outputs, []byte(r.outputs()), 0o644); err != nil {
			return err
		}
	}
	r.write(w, outputs)
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

// testID names a test, or with an empty name a package as a whole.
type testID struct{ pkg, name string }

func (id testID) String() string { return strings.TrimSpace(id.pkg + " " + id.name) }

// attempt is one run of a test. One without a result has not ended.
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

// read takes a stream of events to its end. A last line that is cut off, as an
// interrupt leaves it, is left out.
func read(in io.Reader) *results {
	r := &results{attempts: map[testID][]*attempt{}, elapsed: map[string]time.Duration{}}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if json.Unmarshal(line, &e) == nil && e.Package != "" { // not what a compiler says
			r.event(e)
		}
		if err != nil {
			return r
		}
	}
}

func (r *results) event(e event) {
	id := testID{e.Package, e.Test}
	// A package starts where a test is run.
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

// result is what came of all attempts at a test: pass, skip, flaky, or fail.
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

// judge counts tests. One that only holds subtests does not count beside them, nor
// does a failure beside the one inside it that it is made of.
func (r *results) judge() {
	inside := map[testID]map[string]bool{} // the results of what a package or test holds
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
		case result == "fail" && id.name == "" && holds["flaky"] && r.passedAgain(id):
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

// passedAgain is whether the package passed whenever something of it was run again.
func (r *results) passedAgain(id testID) bool {
	return !slices.ContainsFunc(r.attempts[id][1:], func(a *attempt) bool { return a.result != "pass" })
}

// outputs is what the flaky tests printed, every time.
func (r *results) outputs() string {
	var s strings.Builder
	for _, id := range r.flaky {
		for i, a := range r.attempts[id] {
			fmt.Fprintf(&s, "=== %s, run %d: %s\n%s\n", id, i+1, cmp.Or(a.result, "did not end"), a.output.String())
		}
	}
	return s.String()
}

// write is the closing lines; outputs is the name of the file with the flaky tests'.
func (r *results) write(w io.Writer, outputs string) {
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
		fmt.Fprintf(w, "\nFlaky, passed only when run again (what they printed: %s); more than %d in a run fail it:\n", outputs, maxFlaky)
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
