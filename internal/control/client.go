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
	"strings"
	"syscall"
	"time"
)

// maxStatusBytes is more than any status has.
const maxStatusBytes = 1 << 20

// Status reads the status of a tunnel into v, as json.Unmarshal does. It fails with
// ErrNotRunning if there is no such tunnel or it ends meanwhile, ErrStarting before it is
// ready, and *TimeoutError if there is no answer within timeout.
func Status(dir, name string, timeout time.Duration, v any) error {
	return request(dir, name, timeout, http.MethodGet, "/status", func(r *http.Response) error {
		if r.StatusCode == http.StatusServiceUnavailable {
			return ErrStarting
		}
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s: is it an ipipd of another version?", name, r.Status)
		}
		text, err := io.ReadAll(io.LimitReader(r.Body, maxStatusBytes))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, v); err != nil {
			return fmt.Errorf("%s answers something else than a status: %w", name, err)
		}
		return nil
	})
}

// Down ends a tunnel and waits until its interface and socket are gone. timeout bounds the
// answer, wait the end of the process. progress, which may be nil, is called about every
// 20 ms with the time waited so far. Down fails with ErrNotRunning if there is no such
// tunnel, and *TimeoutError if there is no answer.
func Down(dir, name string, timeout, wait time.Duration, progress func(time.Duration)) error {
	socket := path(dir, name)
	before, err := os.Lstat(socket)
	if errors.Is(err, os.ErrNotExist) {
		return ErrNotRunning
	}
	if err != nil {
		return err
	}
	err = request(dir, name, timeout, http.MethodPost, "/down", func(r *http.Response) error {
		if r.StatusCode != http.StatusNoContent {
			return fmt.Errorf("%s answers %s: is it an ipipd of another version?", name, r.Status)
		}
		return nil
	})
	if err != nil && !isDisconnect(err) {
		return err
	}
	for start := time.Now(); time.Since(start) < wait; time.Sleep(20 * time.Millisecond) {
		// Another tunnel may already have taken the name.
		now, err := os.Lstat(socket)
		if err != nil || !sameSocket(before, now) {
			return nil
		}
		c, err := dial(socket)
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		if err == nil {
			c.Close()
		}
		if progress != nil {
			progress(time.Since(start))
		}
	}
	return fmt.Errorf("%s was told to end and its process still holds %s after %v: end it with kill -9", name, socket, wait)
}

// request sends one request and passes the response to read. A GET that is cut off means
// that the tunnel is ending: it is retried until there is an answer or no listener. A POST
// is not retried: the next listener may be another tunnel.
func request(dir, name string, timeout time.Duration, method, what string, read func(*http.Response) error) error {
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
		var about *url.Error // its URL would only confuse
		if errors.As(err, &about) {
			err = about.Err
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrNotRunning):
			return ErrNotRunning
		case isTimeout(err), ctx.Err() != nil:
			return &TimeoutError{name, timeout}
		case method == http.MethodGet && isDisconnect(err):
			time.Sleep(10 * time.Millisecond)
		default:
			return err
		}
	}
}

// isDisconnect reports whether the server closed the connection before it answered. net/http
// does not export the error of one that was closed before the request was written.
func isDisconnect(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		err != nil && strings.Contains(err.Error(), "http: server closed idle connection")
}
