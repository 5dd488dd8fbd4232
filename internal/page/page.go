// Package page serves the tunnels of a process to browsers, as one HTML page about all of them and one
// about each, with what they carried and dropped in the last ten minutes.
//
// It is made on the host, of one embedded template, and needs no script; with one it brings itself up to
// date. It loads nothing from elsewhere, and its Content-Security-Policy has a browser refuse what is not
// its own. It changes nothing, and has neither passwords nor TLS: the server it is mounted in decides
// who reaches it.
//
// However many look at it, the counters are read once in fresh at most, for the history once in Interval; pages are made one at a time. What carries packets waits for none of it.
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
	// Interval is the time between two readings of the history.
	Interval = 5 * time.Second
	// idleInterval is the longest time between two, while nothing is carried.
	idleInterval = 4 * Interval
	// Span is how long the history is.
	Span = 10 * time.Minute
	// readings are those of a history: of 1,000 tunnels 7 MiB.
	readings = int(Span/Interval) + 1
	// fresh is how old a page may be that is shown to the next one.
	fresh = time.Second
	// window is that of the rates which are shown as numbers.
	window = 2 * Interval
)

// Options are what a Page shows.
type Options struct {
	// Version is that of ipipd, Host the name of this host.
	Version, Host string
	// Samples returns what runs; nil before there is something. It is called by one goroutine at a time.
	Samples func() *tunnel.Samples
	// Compare orders names.
	Compare func(a, b string) int
}

// Page is an http.Handler of GET and HEAD:
//
//	/              all tunnels
//	/tunnel/NAME   one of them
//	/NAME          leads there
type Page struct {
	options Options
	mux     *http.ServeMux
	now     func() time.Time // time.Now, but in tests

	mu        sync.Mutex // of what follows; held while a page is made, not while it is sent
	histories map[string]*history.History
	started   time.Time // of the first reading
	last      time.Time // of the last one
	counted   uint64    // packets and drops by then
	busy      bool      // whether there were more than before it
	samples   *tunnel.Samples
	taken     time.Time // when samples were
	index     []byte    // the page of samples; nil if nobody has asked for it
	size      int       // of the last index: the next will be about as long

	rates   []history.Rate // memory of series
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

// Run reads the counters once in Interval, until ctx ends; of tunnels that carry nothing less often, so that
// an idle process is woken seldom.
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

// read reads the counters, and returns whether one has changed since the reading before.
func (p *Page) read(now time.Time) (busy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.take(now)
	return p.busy
}

// take reads what runs. The caller holds mu.
func (p *Page) take(now time.Time) {
	p.samples, p.taken, p.index = p.options.Samples(), now, nil
	if p.samples != nil && (p.last.IsZero() || now.Sub(p.last) >= Interval) {
		p.record(now)
	}
}

// record adds samples to the history of each tunnel, and forgets tunnels that are gone. The caller holds mu.
func (p *Page) record(now time.Time) {
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

// refresh has samples that are fresh. The caller holds mu.
func (p *Page) refresh(now time.Time) {
	if p.samples == nil || now.Sub(p.taken) >= fresh {
		p.take(now)
	}
}

func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.mux.ServeHTTP(w, r) }

func (p *Page) serveIndex(w http.ResponseWriter, r *http.Request) {
	status, text := p.makeIndex(p.now())
	send(w, r, status, text)
}

// makeIndex makes the page of all tunnels, or has it from the last that asked.
func (p *Page) makeIndex(now time.Time) (status int, text []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refresh(now)
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
	p.refresh(now)
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

// redirect leads from /NAME to the page of that tunnel, by a relative address: a proxy may have put all
// this below another.
func (p *Page) redirect(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	p.mu.Lock()
	p.refresh(p.now())
	found := p.find(name) != nil
	p.mu.Unlock()
	if !found {
		http.Error(w, "there is no such page, and no tunnel of that name", http.StatusNotFound)
		return
	}
	w.Header().Set("Location", "tunnel/"+url.PathEscape(name))
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusFound)
}

// find returns the tunnel of a name, of its configuration or that of its interface; nil if there is none.
// The caller holds mu.
func (p *Page) find(name string) (found *tunnel.Sample) {
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

// policy is the Content-Security-Policy: the style and the script of page.html, by their hashes, and what
// the script asks this server for. The icon is an empty one, so that no browser asks for another.
var policy = func() string {
	text := execute("index", view{}, 0)
	return fmt.Sprintf("default-src 'none'; style-src '%s'; script-src '%s'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		hash(text, "style"), hash(text, "script"))
}()

// hash is that of the content of the one element of that name.
func hash(page []byte, element string) string {
	_, after, _ := bytes.Cut(page, []byte("<"+element+">"))
	content, _, found := bytes.Cut(after, []byte("</"+element+">"))
	if !found {
		panic("page.html has no " + element)
	}
	sum := sha256.Sum256(content)
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// execute makes a page of about size bytes. It has no errors: tests make each of them.
func execute(name string, v view, size int) []byte {
	var b bytes.Buffer
	b.Grow(size)
	if err := pages.ExecuteTemplate(&b, name, v); err != nil {
		panic(err) // http.Server logs it, and goes on
	}
	return b.Bytes()
}

// send sends a page. No browser keeps it, gives it to another page, or tells others where it was.
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
