package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/url"
	"testing"
	"testing/iotest"
	"time"
)

// serveCapture serves captures by the socket of ipip1, and returns its folder.
func serveCapture(t *testing.T, capture func(context.Context, CaptureRequest, io.Writer) (CaptureResult, error)) (dir string) {
	t.Helper()
	dir = t.TempDir()
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	go s.Serve(Handler{Capture: capture})
	return dir
}

// A capture whose context ends still gets the rest of the stream and the result.
func TestCapture(t *testing.T) {
	asked := CaptureRequest{Name: "ipip1", Count: 5, Snaplen: 64, Drops: true, Inner: true}
	want := CaptureResult{Packets: 7, Missed: 1 << 40, Ended: true}
	dir := serveCapture(t, func(ctx context.Context, r CaptureRequest, w io.Writer) (CaptureResult, error) {
		if r != asked {
			t.Errorf("asked for %+v", r)
		}
		io.WriteString(w, "begin ")
		<-ctx.Done()
		_, err := io.WriteString(w, "end")
		return want, err
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out bytes.Buffer
	got, err := Capture(ctx, dir, "ipip1", patience, asked, writerFunc(func(p []byte) (int, error) {
		cancel()
		return out.Write(p)
	}))
	if err != nil || got != want || out.String() != "begin end" {
		t.Errorf("%+v, %v: %q", got, err, out.String())
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Capture returns an error of its own for each kind of failure.
func TestCapture_fails(t *testing.T) {
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		capture func(context.Context, CaptureRequest, io.Writer) (CaptureResult, error)
		w       io.Writer
		want    func(error) bool
	}{
		"no tunnel": {func(context.Context, CaptureRequest, io.Writer) (r CaptureResult, err error) { return r, ErrNotRunning }, io.Discard,
			func(err error) bool { return err == ErrNotRunning }},
		"starting": {func(context.Context, CaptureRequest, io.Writer) (r CaptureResult, err error) { return r, ErrStarting }, io.Discard,
			func(err error) bool { return err == ErrStarting }},
		"refused": {func(context.Context, CaptureRequest, io.Writer) (r CaptureResult, err error) {
			return r, &Refusal{Message: "no"}
		}, io.Discard,
			func(err error) bool { var r *Refusal; return errors.As(err, &r) && r.Message == "no" }},
		"cut off": {func(_ context.Context, _ CaptureRequest, w io.Writer) (r CaptureResult, err error) {
			io.WriteString(w, "begin")
			return r, broken
		}, io.Discard, func(err error) bool { return errors.Is(err, ErrCutOff) }},
		"not written": {func(ctx context.Context, _ CaptureRequest, w io.Writer) (r CaptureResult, err error) {
			for ctx.Err() == nil && err == nil {
				_, err = io.WriteString(w, "more")
			}
			return r, err
		}, iotest.TruncateWriter(writerFunc(func([]byte) (int, error) { return 0, broken }), 1), func(err error) bool { return errors.Is(err, broken) }},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Capture(t.Context(), serveCapture(t, test.capture), "ipip1", patience, CaptureRequest{Name: "ipip1"}, test.w); !test.want(err) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := Capture(t.Context(), t.TempDir(), "ipip1", patience, CaptureRequest{}, io.Discard); err != ErrNotRunning {
		t.Errorf("nobody listens: %v", err)
	}
	hang := make(chan struct{})
	dir := serveCapture(t, func(context.Context, CaptureRequest, io.Writer) (r CaptureResult, err error) {
		<-hang
		return r, broken
	})
	var timeout *TimeoutError
	if _, err := Capture(t.Context(), dir, "ipip1", shortWait, CaptureRequest{}, io.Discard); !errors.As(err, &timeout) {
		t.Errorf("no answer: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), shortWait)
	defer cancel()
	if result, err := Capture(ctx, dir, "ipip1", patience, CaptureRequest{}, io.Discard); err != nil || result != (CaptureResult{}) {
		t.Errorf("told to end before it has begun: %+v, %v", result, err)
	}
	close(hang)
}

// Writing to a client that reads nothing fails after captureStall.
func TestCaptureWriter_stall(t *testing.T) {
	before := captureStall
	captureStall = shortWait
	defer func() { captureStall = before }()
	ended := make(chan error, 1)
	dir := serveCapture(t, func(_ context.Context, _ CaptureRequest, w io.Writer) (r CaptureResult, err error) {
		for err == nil {
			_, err = w.Write(make([]byte, 1<<16))
		}
		ended <- err
		return r, err
	})
	taking := make(chan struct{})
	defer close(taking)
	go Capture(t.Context(), dir, "ipip1", patience, CaptureRequest{}, writerFunc(func(p []byte) (int, error) {
		<-taking
		return len(p), nil
	}))
	select {
	case err := <-ended:
		if !isTimeout(err) {
			t.Errorf("%v", err)
		}
	case <-time.After(patience):
		t.Fatal("it waits")
	}
}

func TestParseCapture(t *testing.T) {
	for _, r := range []CaptureRequest{{}, {Name: "a b&c=d"}, {Name: "x", Count: 1<<64 - 1, Snaplen: 65535, Drops: true, Complete: true, Inner: true, Outer: true}} {
		if got, err := parseCapture(r.query()); err != nil || got != r {
			t.Errorf("%+v becomes %+v, %v", r, got, err)
		}
	}
	for _, text := range []string{"count=-1", "count=x", "snaplen=65536", "drops=2", "inner=", "frob=1"} {
		q, err := url.ParseQuery(text)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := parseCapture(q); err == nil {
			t.Errorf("%s is %+v", text, r)
		}
	}
}
