package metrics

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

// Limits of clients, who may be anybody.
const (
	maxHeaderBytes = 8 << 10
	maxScrapes     = 2 // answers made at once; further requests wait
	readTimeout    = 5 * time.Second
	writeTimeout   = 10 * time.Second
	idleTimeout    = 2 * time.Minute // longer than the usual interval of scrapes
)

// Options are what a server serves. Its functions are called concurrently.
type Options struct {
	// Version is ipipd's version.
	Version string
	// Snapshot returns the counters; nil before the tunnels are ready.
	Snapshot func() *Snapshot
	// Ready returns nil once all tunnels are started, and before that the reason for the wait.
	Ready func() error
	// Page serves GET and HEAD of all other paths: package page.
	Page http.Handler
	// Host is this host's name; "" if it has none.
	Host string
}

// NewServer returns a server of metrics, for a Listener of Listen:
//
//	GET /metrics   the text format of Prometheus
//	GET /healthz   200 as long as the process answers
//	GET /readyz    200 once all tunnels are started; 503 and the reason before
//	GET /...       Options.Page
func NewServer(o Options) *http.Server {
	own := prometheus.NewRegistry()
	own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	all := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		families, err := own.Gather()
		return append(gather(o.Version, o.Snapshot()), families...), err // after an error, too, the families that there are
	})
	mux := http.NewServeMux()
	// Not compressed: that would take more processor time than all the rest, and clients are on this host or a
	// network next to it.
	mux.Handle("GET /metrics", inTurn(promhttp.HandlerFor(all, promhttp.HandlerOpts{
		DisableCompression: true, ErrorHandling: promhttp.ContinueOnError,
	})))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Ready(); err != nil {
			plain(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		plain(w, http.StatusOK, "ready")
	})
	mux.Handle("GET /", o.Page)
	return &http.Server{
		Handler:        guard(mux, o.Host),
		ReadTimeout:    readTimeout,
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: maxHeaderBytes,
	}
}

// inTurn lets next make at most maxScrapes answers at once, each in memory, so that a client that reads slowly holds up
// no other. The listener's limit of connections bounds the memory.
func inTurn(next http.Handler) http.Handler {
	turns := make(chan struct{}, maxScrapes)
	var size atomic.Int64 // of the last answer: the next will be about as long
	made := func(r *http.Request, header http.Header) *answer {
		select {
		case turns <- struct{}{}:
		case <-r.Context().Done(): // the client has gone
			return nil
		}
		defer func() { <-turns }()
		a := &answer{header: header, status: http.StatusOK}
		last := int(size.Load())
		a.body.Grow(last + last/8)
		next.ServeHTTP(a, r)
		size.Store(int64(a.body.Len()))
		return a
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a := made(r, w.Header()); a != nil {
			w.Header().Set("Content-Length", strconv.Itoa(a.body.Len()))
			w.WriteHeader(a.status)
			_, _ = a.body.WriteTo(w) // the client is gone
		}
	})
}

// answer is an http.ResponseWriter that buffers what is written.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, text)
}

// guard prevents DNS rebinding: a foreign web page whose name resolves to a loopback address could read this server
// by a browser of this host. Its requests have that name in Host: of names only localhost and own are accepted.
func guard(next http.Handler, own string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		at, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if at != nil && at.IP.IsLoopback() && !namesAddress(r.Host, own) {
			http.Error(w, "Host is a name: want an address, localhost, or the name of this host", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// namesAddress reports whether a request's host, with a port or without, is an address, localhost, own or empty.
func namesAddress(host, own string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || strings.EqualFold(host, "localhost") || strings.EqualFold(host, own) || host == ""
}
