// Package page serves the tunnels of a process to browsers, as one HTML page about all of them and one
// about each, with what they carried and dropped in the last ten minutes.
//
// It is made on the host, of one embedded template, and needs no script; with one it brings itself up to
// date. It loads nothing from elsewhere, and its Content-Security-Policy has a browser refuse what is not
// its own. It changes nothing, and has neither passwords nor TLS: the server it is mounted in decides
// who reaches it.
//
// However many clients ask, the counters are read once a second at most, for the history once an Interval at most, and
// pages are made one at a time. No worker waits for any of it.
package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"ipipd/internal/history"
	"ipipd/internal/tunnel"
)

const (
	// Interval is the shortest time between two readings of the history.
	Interval = 5 * time.Second
	// idleInterval is the longest time between two readings, while nothing is carried.
	idleInterval = 4 * Interval
	// Span is how long the history is.
	Span = 10 * time.Minute
	// readings is how many readings a history holds: 7 MiB for 1,000 tunnels.
	readings = int(Span/Interval) + 1
	// fresh is how old counters may be to be served again.
	fresh = time.Second
	// window is the time over which rates shown as numbers are averaged.
	window = 2 * Interval
)

// Options are what a Page shows.
type Options struct {
	// Version is ipipd's version, Host this host's name.
	Version, Host string
	// Samples returns the counters of all tunnels; nil before they are ready. One goroutine at a time calls it.
	Samples func() *tunnel.Samples
	// Compare orders names.
	Compare func(a, b string) int
}

// Page is an http.Handler of GET and HEAD:
//
//	/              all tunnels
//	/tunnel/NAME   one of them
//	/NAME          redirects to it
type Page struct {
	options Options
	mux     *http.ServeMux
	now     func() time.Time // time.Now except in tests

	mu        sync.Mutex // guards the rest; held while a view is made, not while it is sent
	histories map[string]*history.History
	started   time.Time // of the history's first reading
	last      time.Time // of the history's last reading
	counted   uint64    // packets and drops of all tunnels at the last reading
	busy      bool      // whether counted changed at the last reading
	samples   *tunnel.Samples
	taken     time.Time // when samples were read
	index     []byte    // the page of all tunnels made of samples; nil until it is asked for
	size      int       // length of the last index page: a buffer of about that size is allocated for the next

	rates   []history.Rate // buffer that series reuses
	columns columns
}

// New makes a Page whose history is empty until Run is called.
func New(o Options) *Page {
	p := &Page{options: o, mux: http.NewServeMux(), now: time.Now, histories: map[string]*history.History{}}
	p.mux.HandleFunc("GET /{$}", p.serveIndex)
	p.mux.HandleFunc("GET /tunnel/{name}", p.serveTunnel)
	p.mux.HandleFunc("GET /{name}", p.redirect)
	return p
}

// Run reads the counters every Interval until ctx ends; less often while no tunnel carries packets, so that an idle
// process is seldom woken.
func (p *Page) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait := Interval; ctx.Err() == nil; {
		select {
		case <-timer.C:
			wait = min(2*wait, idleInterval)
			if p.read(p.now()) {
				wait = Interval
			}
			timer.Reset(wait)
		case <-ctx.Done():
		}
	}
}

// read reads the counters, and returns whether packets or drops were counted between the last two readings.
func (p *Page) read(now time.Time) (busy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.takeLocked(now)
	return p.busy
}

// takeLocked reads what runs.
func (p *Page) takeLocked(now time.Time) {
	p.samples, p.taken, p.index = p.options.Samples(), now, nil
	if p.samples != nil && (p.last.IsZero() || now.Sub(p.last) >= Interval) {
		p.recordLocked(now)
	}
}

// recordLocked adds samples to the history of each tunnel, and forgets tunnels that are gone.
func (p *Page) recordLocked(now time.Time) {
	p.last = now
	if p.started.IsZero() {
		p.started = now
	}
	var counted uint64
	runs := make(map[string]bool, len(p.samples.Tunnels))
	for i := range p.samples.Tunnels {
		s := &p.samples.Tunnels[i]
		if !s.Started {
			continue
		}
		runs[s.Name] = true
		if p.histories[s.Name] == nil {
			p.histories[s.Name] = history.New(readings)
		}
		p.histories[s.Name].Add(history.Sample{
			Time:      now,
			RxPackets: s.RxPackets, RxBytes: s.RxBytes,
			TxPackets: s.TxPackets, TxBytes: s.TxBytes,
			Drops: s.Drops,
		})
		counted += s.RxPackets + s.TxPackets
		for _, n := range s.Drops {
			counted += n
		}
	}
	for name := range p.histories {
		if !runs[name] {
			delete(p.histories, name)
		}
	}
	p.busy, p.counted = counted != p.counted, counted
}

// refreshLocked reads samples again if they are not fresh.
func (p *Page) refreshLocked(now time.Time) {
	if p.samples == nil || now.Sub(p.taken) >= fresh {
		p.takeLocked(now)
	}
}

func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.mux.ServeHTTP(w, r) }

func (p *Page) serveIndex(w http.ResponseWriter, r *http.Request) {
	status, text := p.makeIndex(p.now())
	send(w, r, status, text)
}

// makeIndex returns the page of all tunnels: the last one made if its samples are fresh.
func (p *Page) makeIndex(now time.Time) (status int, text []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refreshLocked(now)
	status = http.StatusOK
	if p.samples == nil {
		status = http.StatusServiceUnavailable
	}
	if p.index == nil {
		p.index = execute("index", p.indexView(), p.size+p.size/8)
		p.size = len(p.index)
	}
	return status, p.index
}

func (p *Page) serveTunnel(w http.ResponseWriter, r *http.Request) {
	status, text := p.makeTunnel(p.now(), r.PathValue("name"))
	send(w, r, status, text)
}

// makeTunnel makes the page of one tunnel.
func (p *Page) makeTunnel(now time.Time, name string) (status int, text []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refreshLocked(now)
	status = http.StatusOK
	v := p.tunnelView(name)
	if v.Missing != "" {
		status = http.StatusNotFound
	}
	if p.samples == nil {
		status = http.StatusServiceUnavailable
	}
	return status, execute("tunnel", v, 0)
}

// redirect redirects /NAME to the page of that tunnel, by a relative URL: a reverse proxy may serve all this below
// a path of its own.
func (p *Page) redirect(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	p.mu.Lock()
	p.refreshLocked(p.now())
	found := p.findLocked(name) != nil
	p.mu.Unlock()
	if !found {
		http.Error(w, "there is no such page, and no tunnel of that name", http.StatusNotFound)
		return
	}
	w.Header().Set("Location", "tunnel/"+url.PathEscape(name))
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusFound)
}

// findLocked returns the tunnel whose name, or else whose interface's name, is name; nil if there is none.
func (p *Page) findLocked(name string) (found *tunnel.Sample) {
	if p.samples == nil {
		return nil
	}
	for i := range p.samples.Tunnels {
		switch s := &p.samples.Tunnels[i]; name {
		case s.Name:
			return s
		case s.Interface:
			found = s
		}
	}
	return found
}

//go:embed page.html
var source string

var pages = template.Must(template.New("page").Parse(source))

// policy is the Content-Security-Policy: it allows the style and the script of page.html, by their hashes, what the
// script fetches from this server, and data: for the empty icon, which keeps browsers from asking for another.
var policy = func() string {
	text := execute("index", view{}, 0)
	return fmt.Sprintf("default-src 'none'; style-src '%s'; script-src '%s'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		hash(text, "style"), hash(text, "script"))
}()

// hash returns the hash, as a CSP source, of the content of the first element of that name.
func hash(page []byte, element string) string {
	_, after, _ := bytes.Cut(page, []byte("<"+element+">"))
	content, _, found := bytes.Cut(after, []byte("</"+element+">"))
	if !found {
		panic("page.html has no " + element)
	}
	sum := sha256.Sum256(content)
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// execute makes a page of about size bytes. It panics on an error of the template: tests make every kind of page.
func execute(name string, v view, size int) []byte {
	var b bytes.Buffer
	b.Grow(size)
	if err := pages.ExecuteTemplate(&b, name, v); err != nil {
		panic(err) // http.Server logs it, and goes on
	}
	return b.Bytes()
}

// send sends a page. Its headers forbid browsers to cache it, to let other origins load it, and to send referrers.
func send(w http.ResponseWriter, r *http.Request, status int, text []byte) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	h.Set("Content-Security-Policy", policy)
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, err := w.Write(text)
		_ = err // the client is gone
	}
}
