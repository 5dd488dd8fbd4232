package tunnel

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(engineProcessEnv) != "" {
		if err := serveEngine(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const engineProcessEnv = "IPIPD_TEST_ENGINE"

// applied is the answer of serveEngine to a list.
type applied struct {
	Error  string
	Status map[string]json.RawMessage // by name
}

// serveEngine applies each list of configurations in turn.
func serveEngine(in io.Reader, out io.Writer) error {
	e, err := NewEngine(EngineOptions{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	requests, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var lines []string
		if err := requests.Decode(&lines); err != nil {
			return e.Close() // EOF
		}
		configs, a := make([]Config, len(lines)), applied{}
		for i, line := range lines {
			if configs[i], err = parseConfig(line); err != nil {
				return err
			}
		}
		if err := e.Apply(context.Background(), configs); err != nil {
			a.Error = err.Error()
		}
		a.Status = map[string]json.RawMessage{}
		for name, t := range e.Tunnels() {
			if a.Status[name], err = t.Status().MarshalJSON(); err != nil {
				return err
			}
		}
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}
