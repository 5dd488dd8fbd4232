package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// CaptureRequest is what is to be captured.
type CaptureRequest struct {
	// Name is the name of the tunnel.
	Name string
	// Count is the number of packets after which it ends; 0 is never.
	Count uint64
	// Snaplen is how many bytes of each packet are kept; 0 is all.
	Snaplen int
	// Drops: only packets that are dropped.
	Drops bool
	// Complete keeps every packet, whatever it costs the tunnel.
	Complete bool
	// Inner, Outer: only inner, or only outer packets; neither set: both.
	Inner, Outer bool
}

// CaptureResult is the outcome of a capture.
type CaptureResult struct {
	Packets uint64
	Missed  uint64 // packets that were not written
	// Ended: the tunnel has ended.
	Ended bool
}

// captureEnd is how long the rest of a capture may take once it is to end.
const captureEnd = 5 * time.Second

// captureBuffer is how many bytes are read at once: more than the process writes at once.
const captureBuffer = 128 << 10

// captureStall is how long a client may read nothing although there is something to read: then its capture
// ends. Tests change it.
var captureStall = time.Minute

// query returns r as the query of a URL.
func (r *CaptureRequest) query() url.Values {
	q := url.Values{"name": {r.Name}}
	if r.Count > 0 {
		q.Set("count", strconv.FormatUint(r.Count, 10))
	}
	if r.Snaplen > 0 {
		q.Set("snaplen", strconv.Itoa(r.Snaplen))
	}
	for name, on := range map[string]bool{"drops": r.Drops, "complete": r.Complete, "inner": r.Inner, "outer": r.Outer} {
		if on {
			q.Set(name, "1")
		}
	}
	return q
}

// parseCapture is the inverse of query. It refuses parameters that this version does not know.
func parseCapture(q url.Values) (r CaptureRequest, err error) {
	for name := range q {
		v := q.Get(name)
		switch name {
		case "name":
			r.Name = v
		case "count":
			r.Count, err = strconv.ParseUint(v, 10, 64)
		case "snaplen":
			var n uint64
			n, err = strconv.ParseUint(v, 10, 16)
			r.Snaplen = int(n)
		case "drops":
			r.Drops, err = strconv.ParseBool(v)
		case "complete":
			r.Complete, err = strconv.ParseBool(v)
		case "inner":
			r.Inner, err = strconv.ParseBool(v)
		case "outer":
			r.Outer, err = strconv.ParseBool(v)
		default:
			err = errors.New("not known")
		}
		if err != nil {
			return r, fmt.Errorf("%s: %w", name, err)
		}
	}
	return r, nil
}

// The trailers of a capture: a CaptureResult.
const (
	trailerPackets = "Packets"
	trailerMissed  = "Missed"
	trailerEnded   = "Ended"
)

// capture answers GET /capture. The request's context is done when the client closes its connection, or only
// its own side of it: then it gets the end of the file.
func (h Handler) capture(w http.ResponseWriter, r *http.Request) {
	request, err := parseCapture(r.URL.Query())
	if err != nil {
		badRequest(w, err)
		return
	}
	liftDeadlines(w)
	out := &captureWriter{w: w, controller: http.NewResponseController(w)}
	result, err := h.Capture(r.Context(), request, out)
	if !out.begun {
		if err == nil {
			err = errors.New("nothing was captured")
		}
		refuse(w, err)
		return
	}
	if err != nil {
		panic(http.ErrAbortHandler) // no proper end: the file is cut off
	}
	w.Header().Set(trailerPackets, strconv.FormatUint(result.Packets, 10))
	w.Header().Set(trailerMissed, strconv.FormatUint(result.Missed, 10))
	w.Header().Set(trailerEnded, strconv.FormatBool(result.Ended))
	_ = out.controller.SetWriteDeadline(time.Now().Add(captureEnd))
}

// captureWriter writes an answer of unknown length, and flushes what each Write writes.
type captureWriter struct {
	w          http.ResponseWriter
	controller *http.ResponseController
	begun      bool
}

func (c *captureWriter) Write(p []byte) (n int, err error) {
	if !c.begun {
		c.begun = true
		header := c.w.Header()
		header.Set("Content-Type", "application/x-pcapng")
		header.Set("Trailer", trailerPackets+", "+trailerMissed+", "+trailerEnded)
	}
	if err := c.controller.SetWriteDeadline(time.Now().Add(captureStall)); err != nil {
		return 0, err
	}
	if n, err = c.w.Write(p); err != nil {
		return n, err
	}
	return n, c.controller.Flush()
}

// Capture copies a capture of a tunnel to w, until ctx is done: then the file gets its end. timeout bounds
// the wait for its beginning. It fails with ErrNotRunning, ErrStarting, *Refusal, *TimeoutError, or the error
// of w; with ErrCutOff if the process is killed, or w takes nothing for captureStall.
func Capture(ctx context.Context, dir, link string, timeout time.Duration, r CaptureRequest, w io.Writer) (result CaptureResult, err error) {
	conn, err := dial(path(dir, link))
	if err != nil {
		if isTimeout(err) {
			err = &TimeoutError{link, timeout}
		}
		return result, err
	}
	defer conn.Close()
	transport := &http.Transport{
		DisableKeepAlives: true, DisableCompression: true, ResponseHeaderTimeout: timeout, ReadBufferSize: captureBuffer,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	request, err := http.NewRequest(http.MethodGet, "http://tunnel/capture?"+r.query().Encode(), nil)
	if err != nil {
		return result, err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = conn.(*net.UnixConn).CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(captureEnd))
	})
	defer stop()
	response, err := transport.RoundTrip(request)
	switch {
	case err != nil && ctx.Err() != nil:
		return result, nil
	case isTimeout(err):
		return result, &TimeoutError{link, timeout}
	case isDisconnect(err):
		return result, ErrNotRunning
	case err != nil:
		return result, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		_, err := answer(link, response)
		return result, err
	}
	if _, err := io.CopyBuffer(w, &captureReader{response.Body}, make([]byte, captureBuffer)); err != nil {
		return result, err
	}
	result.Packets, _ = strconv.ParseUint(response.Trailer.Get(trailerPackets), 10, 64)
	result.Missed, _ = strconv.ParseUint(response.Trailer.Get(trailerMissed), 10, 64)
	result.Ended, _ = strconv.ParseBool(response.Trailer.Get(trailerEnded))
	return result, nil
}

// ErrCutOff means that a capture has no proper end.
var ErrCutOff = errors.New("the capture is cut off")

// captureReader marks errors of reading with ErrCutOff, to tell them from errors of writing.
type captureReader struct{ io.Reader }

func (r *captureReader) Read(p []byte) (n int, err error) {
	if n, err = r.Reader.Read(p); err != nil && err != io.EOF {
		err = fmt.Errorf("%w: %w", ErrCutOff, err)
	}
	return n, err
}
