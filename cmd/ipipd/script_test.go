package main

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"ipipd/test/netlab"
)

// programs are the programs that the tests can run by name: the test binary acts as each.
var programs = map[string]func(){"ipipd": main}

func TestMain(m *testing.M) { testscript.Main(m, programs) }

// The scripts of testdata/script run the program without privileges.
func TestRun_scripts(t *testing.T) {
	testscript.Run(t, scriptParams(nil, filepath.Join("testdata", "script", "*.txtar")))
}

// scriptParams returns the parameters for the scripts that match pattern. They add these
// commands to testscript's own:
//
//	exits STATUS program [args...]	the program must end with this exit status
//	retry program [args...]		repeat the program until it succeeds
//	oneline stdout|stderr		the output must be one line, with its newline
func scriptParams(environment []string, pattern string) testscript.Params {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		panic("no scripts: " + pattern)
	}
	return testscript.Params{
		Files:               files,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Vars = append(e.Vars, environment...)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				want, err := strconv.Atoi(args[0])
				if neg || err != nil {
					ts.Fatalf("usage: exits STATUS program [args...]")
				}
				err = ts.Exec(args[1], args[2:]...)
				got := 0
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					got = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if got != want {
					ts.Fatalf("exit status %d, want %d\nstdout: %s\nstderr: %s", got, want, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
				}
			},
			"retry": func(ts *testscript.TestScript, neg bool, args []string) {
				var err error
				for end := time.Now().Add(netlab.Timeout()); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
					if err = ts.Exec(args[0], args[1:]...); (err == nil) != neg {
						return
					}
				}
				ts.Fatalf("still not after %v: %v\nstdout: %s\nstderr: %s", netlab.Timeout(), err, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
			},
			"oneline": func(ts *testscript.TestScript, neg bool, args []string) {
				text := ts.ReadFile(args[0])
				if (strings.Count(text, "\n") == 1 && strings.HasSuffix(text, "\n")) == neg {
					ts.Fatalf("%s is %q", args[0], text)
				}
			},
		},
	}
}
