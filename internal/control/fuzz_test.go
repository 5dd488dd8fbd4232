package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Whatever a client sends is answered with a status of the protocol. Only a request of the protocol reaches the
// tunnels, and all of it.
func FuzzHandler(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return // the server of package net/http answers it
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		var called []string
		var asked Request
		h := Handler{
			Status: func(name string) (any, error) {
				switch name {
				case "starting":
					return nil, ErrStarting
				case "gone":
					return nil, ErrNotRunning
				}
				return []string{name}, nil
			},
			Samples: func() (any, error) { return nil, ErrStarting },
			Export:  func() (any, error) { return nil, ErrStarting },
			Down:    func(name string) { called = append(called, "down") },
			Change: func(_ context.Context, r Request) (Result, error) {
				called, asked = append(called, r.Action), r
				if len(r.Names) == 0 {
					return Result{}, &Refusal{Message: "no names", Input: true}
				}
				return Result{Name: r.Names[0]}, nil
			},
			Diff: func(files []File) (Comparison, error) {
				called = append(called, "diff")
				if len(files) == 0 {
					return Comparison{}, errors.New("no files")
				}
				return Comparison{Tunnels: []Difference{{Name: files[0].Name}}}, nil
			},
		}
		w := httptest.NewRecorder()
		h.handler().ServeHTTP(w, r)
		if known := []int{200, 204, 307, 400, 404, 405, 413, 422, 503}; !slices.Contains(known, w.Code) {
			t.Errorf("status %d", w.Code)
		}
		if len(called) == 0 {
			return
		}
		action := called[0]
		if len(called) > 1 || r.Method != http.MethodPost || r.URL.Path != "/"+action {
			t.Fatalf("%s %s: %v", r.Method, r.URL, called)
		}
		if !slices.Contains([]int{200, 204, 422}, w.Code) {
			t.Errorf("%s: status %d, and it is done", action, w.Code)
		}
		if action == "down" {
			return
		}
		if len(bytes.TrimSpace(body)) > 0 && !json.Valid(body) {
			t.Errorf("%s: done with %q", action, body)
		}
		if action == "diff" {
			return
		}
		var answer struct {
			Result
			Refusal
		}
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Errorf("the answer %q: %v", w.Body, err)
		}
		text, err := json.Marshal(asked)
		var again Request
		if err == nil {
			err = decode(bytes.NewReader(text), &again)
		}
		again.Action = action
		if d := cmp.Diff(asked, again, cmpopts.EquateEmpty()); err != nil || d != "" {
			t.Errorf("sent on it is %s: %v%s", text, err, d)
		}
	})
}
