package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

// statusBytes is more than a status can have.
const statusBytes = 1 << 20

// Status reads the status of a tunnel into v, as json.Unmarshal does. It says
// ErrNotRunning where there is none, ErrStarting before it is ready, and *TimeoutError
// where none is told within timeout. A tunnel that ends meanwhile is one that is not
// running.
func Status(dir, name string, timeout time.Duration, v any) error {
	return ask(dir, name, timeout, http.MethodGet, "/status", func(r *http.Response) error {
		if r.StatusCode == http.StatusServiceUnavailable {
			return ErrStarting
		}
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s: is it an ipipd of another version?", name, r.Status)
		}
		text, err := io.ReadAll(io.LimitReader(r.Body, statusBytes))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, v); err != nil {
			return fmt.Errorf("%s answers something else than a status: %w", name, err)
		}
		return nil
	})
}

// Down ends a tunnel and waits until it is gone: interface, socket and all.
// timeout is for the answer, wait for the end; waiting is called again and again
// meanwhile, with how long it has been, and may be nil. It says ErrNotRunning where
// there is no tunnel, and *TimeoutError where nobody answers.
func Down(dir, name string, timeout, wait time.Duration, waiting func(time.Duration)) error {
	socket := path(dir, name)
	before, err := os.Lstat(socket)
	if errors.Is(err, os.ErrNotExist) {
		return ErrNotRunning
	}
	if err != nil {
		return err
	}
	err = ask(dir, name, timeout, http.MethodPost, "/down", func(r *http.Response) error {
		if r.StatusCode != http.StatusNoContent {
			return fmt.Errorf("%s answers %s: is it an ipipd of another version?", name, r.Status)
		}
		return nil
	})
	if err != nil && !brokenOff(err) {
		return err
	}
	for start := time.Now(); time.Since(start) < wait; time.Sleep(20 * time.Millisecond) {
		// Another may have the name again already, and that one stays.
		now, err := os.Lstat(socket)
		if err != nil || !same(before, now) {
			return nil
		}
		c, err := dial(socket)
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		if err == nil {
			c.Close()
		}
		if waiting != nil {
			waiting(time.Since(start))
		}
	}
	return fmt.Errorf("%s was told to end and its process still holds %s after %v: end it with kill -9", name, socket, wait)
}

// ask sends one request. A connection to ask a status by that breaks off is of a
// tunnel that ends, or has ended just now: it is asked again until it answers or
// is gone. Telling a tunnel to end is not repeated: the next one may be another.
func ask(dir, name string, timeout time.Duration, method, what string, read func(*http.Response) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return dial(path(dir, name))
		},
	}}
	for {
		r, err := http.NewRequestWithContext(ctx, method, "http://tunnel"+what, nil)
		if err != nil {
			return err
		}
		response, err := client.Do(r)
		if err == nil {
			err = read(response)
			response.Body.Close()
		}
		var about *url.Error // about a URL that nobody has heard of
		if errors.As(err, &about) {
			err = about.Err
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrNotRunning):
			return ErrNotRunning
		case timedOut(err), ctx.Err() != nil:
			return &TimeoutError{name, timeout}
		case method == http.MethodGet && brokenOff(err):
			time.Sleep(10 * time.Millisecond)
		default:
			return err
		}
	}
}

func brokenOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
