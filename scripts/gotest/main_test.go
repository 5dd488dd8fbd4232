package main

import (
	"bytes"
	"strings"
	"testing"
)

// stream is what go test -json prints for a package with a test that passes, one
// that is skipped, one with a failing subtest, and a package that crashes.
const stream = `
{"Action":"run","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"pass","Package":"p","Test":"TestGood","Elapsed":0.1}
{"Action":"run","Package":"p","Test":"TestRoot"}
{"Action":"output","Package":"p","Test":"TestRoot","Output":"=== RUN   TestRoot\n"}
{"Action":"output","Package":"p","Test":"TestRoot","Output":"    a_test.go:9: needs root\n"}
{"Action":"output","Package":"p","Test":"TestRoot","Output":"--- SKIP: TestRoot (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestRoot","Elapsed":0}
{"Action":"run","Package":"p","Test":"TestCases"}
{"Action":"run","Package":"p","Test":"TestCases/one"}
{"Action":"pass","Package":"p","Test":"TestCases/one","Elapsed":0}
{"Action":"run","Package":"p","Test":"TestCases/two"}
{"Action":"output","Package":"p","Test":"TestCases/two","Output":"    a_test.go:20: got 1, want 2\n"}
{"Action":"fail","Package":"p","Test":"TestCases/two","Elapsed":0}
{"Action":"fail","Package":"p","Test":"TestCases","Elapsed":0}
{"Action":"fail","Package":"p","Elapsed":0.2}
{"Action":"run","Package":"q","Test":"TestCrash"}
{"Action":"output","Package":"q","Test":"TestCrash","Output":"panic: out of range\n"}
{"Action":"output","Package":"q","Output":"exit status 2\n"}
{"Action":"fail","Package":"q","Test":"TestCrash","Elapsed":0}
{"Action":"fail","Package":"q","Elapsed":0.2}
{"Action":"output","Package":"r","Output":"FAIL\tr [build failed]\n"}
{"Action":"fail","Package":"r","Elapsed":0}
{"Action":"output","Package":"s","Output":"?   \ts\t[no test files]\n"}
{"Action":"skip","Package":"s","Elapsed":0}
{"Action":"output","Package":"s","Output":"not the end of`

func TestSummaryTellsSkippedAndFailedFromPassed(t *testing.T) {
	var out bytes.Buffer
	s := newSummary(&out)
	s.read(strings.NewReader(stream))
	s.close()
	got := out.String()
	for _, want := range []string{
		"  needs root\n      --- SKIP: p TestRoot\n",
		"got 1, want 2",
		"panic: out of range",
		"r [build failed]",
		"not the end of", // a line that is not JSON is not swallowed
		"\nFailed:\n  p TestCases/two\n      a_test.go:20: got 1, want 2\n  p TestCases\n  q TestCrash\n  r\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing", want)
		}
	}
	// TestGood and TestCases/one; TestCases/two, TestCrash and r; TestRoot.
	if !strings.HasSuffix(got, "\n2 passed, 3 failed, 1 skipped\n") {
		t.Errorf("wrong closing line")
	}
	if t.Failed() {
		t.Log(got)
	}
}
