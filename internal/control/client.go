package control

import (
	"bytes"
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

// maxAnswerBytes is more than the answer about 10,000 tunnels takes.
const maxAnswerBytes = 64 << 20

// Status reads the status of a tunnel into v, as json.Unmarshal does. It fails with
// ErrNotRunning if there is no such tunnel or it ends meanwhile, ErrStarting before it is
// ready, and *TimeoutError if there is no answer within timeout.
func Status(dir, name string, timeout time.Duration, v any) error {
	return request(path(dir, name), name, timeout, http.MethodGet, "/status?name="+url.QueryEscape(name), nil, readJSON(name, v))
}

// Remotes reads all remotes of a tunnel, as Handler.Remotes returned them, into v. It fails as Status does.
func Remotes(dir, name string, timeout time.Duration, v any) error {
	return request(path(dir, name), name, timeout, http.MethodGet, "/remotes?name="+url.QueryEscape(name), nil, readJSON(name, v))
}

// Statuses reads the statuses of all tunnels of p, an array, into v. It fails as Status does.
func (p *Process) Statuses(dir string, timeout time.Duration, v any) error {
	return p.request(dir, timeout, http.MethodGet, "/status", nil, readJSON(p.links[0], v))
}

// Samples reads what p has counted, as Handler.Samples returned it, into v. It fails as Status does.
func (p *Process) Samples(dir string, timeout time.Duration, v any) error {
	return p.request(dir, timeout, http.MethodGet, "/samples", nil, readJSON(p.links[0], v))
}

// Export reads the configuration of what p runs, as Handler.Export returned it, into v. It fails as Status does.
func (p *Process) Export(dir string, timeout time.Duration, v any) error {
	return p.request(dir, timeout, http.MethodGet, "/export", nil, readJSON(p.links[0], v))
}

// readJSON returns a function that reads the answer of the process with that name into v.
func readJSON(name string, v any) func(*http.Response) error {
	return func(r *http.Response) error {
		text, err := answer(name, r)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, v); err != nil {
			return fmt.Errorf("%s answers something else than JSON: %w", name, err)
		}
		return nil
	}
}

// Change makes p do what r says. It fails with *Refusal if that is not possible; then nothing has changed.
func (p *Process) Change(dir string, timeout time.Duration, r Request) (result Result, err error) {
	body, err := json.Marshal(r)
	if err == nil {
		err = p.answers(dir)
	}
	if err != nil {
		return result, err
	}
	err = p.request(dir, timeout, http.MethodPost, "/"+r.Action, body, readJSON(p.links[0], &result))
	return result, err
}

// Diff returns what p would change on a reload of the configuration of files, or without any of its
// own. It fails with *Refusal.
func (p *Process) Diff(dir string, timeout time.Duration, files []File) (c Comparison, err error) {
	body, err := json.Marshal(files)
	if err == nil {
		err = p.answers(dir)
	}
	if err != nil {
		return c, err
	}
	err = p.request(dir, timeout, http.MethodPost, diffPath, body, readJSON(p.links[0], &c))
	return c, err
}

// hungAfter is how long a process may leave a request that takes no work without an answer: then it counts as hung.
var hungAfter = 2 * time.Second

// answers fails with *TimeoutError if p is hung, so that nobody waits for it as long as for a change.
func (p *Process) answers(dir string) error {
	return p.request(dir, hungAfter, http.MethodGet, "/", nil, func(*http.Response) error { return nil }) // 404
}

// answer returns the body of a response, or the error that its status stands for.
func answer(name string, r *http.Response) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r.Body, maxAnswerBytes))
	if err != nil {
		return nil, err
	}
	switch r.StatusCode {
	case http.StatusOK:
		return text, nil
	case http.StatusServiceUnavailable:
		return nil, ErrStarting
	case http.StatusRequestEntityTooLarge:
		return nil, fmt.Errorf("what %s is asked for has more than %d KiB: ask for it in several steps", name, bodyLimit(r.Request.URL.Path)>>10)
	case http.StatusUnprocessableEntity:
		var refusal Refusal
		if err := json.Unmarshal(text, &refusal); err == nil {
			return nil, &refusal
		}
	case http.StatusNotFound:
		if r.Header.Get(goneHeader) != "" {
			return nil, ErrNotRunning
		}
	}
	return nil, fmt.Errorf("%s answers %s: is it an ipipd of another version?", name, r.Status)
}

// request asks by the first link of p that is there: a tunnel may end meanwhile.
func (p *Process) request(dir string, timeout time.Duration, method, what string, body []byte, read func(*http.Response) error) (err error) {
	for _, link := range p.links {
		err = request(path(dir, link), link, timeout, method, what, body, read)
		if !errors.Is(err, ErrNotRunning) {
			break
		}
	}
	return err
}

// Down ends a tunnel and waits until its interface and its link of the socket are gone. timeout bounds the wait for the
// answer, wait the time until the link is gone. progress, which may be nil, is called about every
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
	err = request(socket, name, timeout, http.MethodPost, "/down?name="+url.QueryEscape(name), nil, func(r *http.Response) error {
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
func request(socket, name string, timeout time.Duration, method, what string, body []byte, read func(*http.Response) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return dial(socket)
		},
	}}
	for {
		r, err := http.NewRequestWithContext(ctx, method, "http://tunnel"+what, bytes.NewReader(body))
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
