package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Limits of a request. Clients are trusted, but scripts have bugs.
const (
	maxHeaderBytes = 4 << 10
	maxBodyBytes   = 64 << 10
	maxFilesBytes  = 32 << 20 // of a diff: two of the largest files, in base64
	maxClients     = 32       // at once; more wait
	ioTimeout      = 5 * time.Second
)

const diffPath = "/diff"

// goneHeader marks a 404 that means: there is no such tunnel. A 404 without it means that this
// version does not know the request.
const goneHeader = "No-Such-Tunnel"

// Server is the control socket of a process, and reserves the names of its tunnels.
type Server struct {
	dir      string
	path     string
	listener net.Listener
	info     fs.FileInfo // of the socket that Listen created

	mu    sync.Mutex
	names map[string]bool // the reserved ones
	http  *http.Server
}

// Handler is what a Server serves. Its functions are called concurrently, also while
// tunnels end.
type Handler struct {
	// Status returns a value for json.Marshal: the status of the tunnel of that name, or with
	// "" an array of all. It fails with ErrStarting or ErrNotRunning.
	Status func(name string) (any, error)
	// Remotes returns a value for json.Marshal: all remotes of the tunnel of that name. It fails as Status does.
	Remotes func(name string) (any, error)
	// Samples returns a value for json.Marshal: the counters of all tunnels. It fails as Status does.
	Samples func() (any, error)
	// Export returns a value for json.Marshal: the configuration of what runs. It fails as Status does.
	Export func() (any, error)
	// Down ends a tunnel. It is called after the answer is sent.
	Down func(name string)
	// Change and Diff fail with *Refusal, or any other error. A Change that fails has changed nothing.
	Change func(context.Context, Request) (Result, error)
	Diff   func(files []File) (Comparison, error)
	// Capture writes a capture until ctx is done or w fails. It may fail, as Status does or with *Refusal,
	// before it writes.
	Capture func(ctx context.Context, r CaptureRequest, w io.Writer) (CaptureResult, error)
}

// Listen makes the socket of a process in dir, and creates dir if it is missing. It reserves
// names, as Reserve does, and fails with *DirError if dir is not safe. Clients can connect
// from now on, and are answered once Serve runs.
func Listen(ctx context.Context, dir string, names ...string) (*Server, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, dir, lockTimeout)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := &Server{dir: dir, names: map[string]bool{}}
	for i, free := 1, false; !free; i++ {
		s.path = path(dir, processPrefix+strconv.Itoa(i))
		if free, err = removeStale(s.path); err != nil {
			return nil, err
		}
	}
	if s.listener, err = listenPrivate(s.path); err != nil {
		return nil, err
	}
	// Server.Close removes the socket, if it is still this one.
	s.listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if s.info, err = os.Lstat(s.path); err == nil && s.info.Mode().Perm() != 0o600 {
		err = fmt.Errorf("%s came into being with mode %04o instead of 0600", s.path, s.info.Mode().Perm())
	}
	if err == nil {
		err = s.link(names)
	}
	if err != nil {
		s.listener.Close()
		os.Remove(s.path)
		return nil, err
	}
	return s, nil
}

// Reserve reserves names of tunnels, all or none; names that it has already stay. It fails
// with *TakenError if a running tunnel of another process has one, and with *LockedError if
// another process holds the lock too long. Canceling ctx ends the wait for the lock.
func (s *Server) Reserve(ctx context.Context, names ...string) error {
	if len(names) == 0 {
		return nil
	}
	unlock, err := lock(ctx, s.dir, lockTimeout)
	if err != nil {
		return err
	}
	defer unlock()
	return s.link(names)
}

// link makes a hard link for each name. The directory's lock is held.
func (s *Server) link(names []string) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var made []string
	defer func() {
		if err != nil {
			s.unlinkLocked(made)
		}
	}()
	for _, name := range names {
		if s.names[name] {
			continue
		}
		link := path(s.dir, name)
		free, err := removeStale(link)
		if err != nil {
			return err
		}
		if !free {
			return &TakenError{name, link}
		}
		if err := os.Link(s.path, link); err != nil {
			return err
		}
		s.names[name], made = true, append(made, name)
	}
	return nil
}

// Release gives names up, as Close does all. Call it after the interfaces are gone.
func (s *Server) Release(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unlinkLocked(names)
}

// unlinkLocked needs no lock of the directory: no process replaces a socket that accepts
// connections. It removes nothing that has replaced a link.
func (s *Server) unlinkLocked(names []string) {
	for _, name := range names {
		if s.names[name] {
			s.remove(path(s.dir, name))
			delete(s.names, name)
		}
	}
}

func (s *Server) remove(path string) {
	if info, err := os.Lstat(path); err == nil && sameSocket(info, s.info) {
		os.Remove(path)
	}
}

// umaskMu serializes changes of the process's umask.
var umaskMu sync.Mutex

// listenPrivate creates the socket file with mode 0600, so that others cannot connect at
// any moment. On Linux bind(2) uses the mode of the socket descriptor, less the umask,
// even if the directory has a default ACL. Other systems need the umask.
func listenPrivate(path string) (net.Listener, error) {
	if runtime.GOOS != "linux" {
		umaskMu.Lock()
		defer umaskMu.Unlock()
		defer syscall.Umask(syscall.Umask(0o177))
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), 0o600) })
	}}
	return lc.Listen(context.Background(), "unix", path)
}

// handler returns the http.Handler that serves h.
func (h Handler) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		v, err := h.Status(r.URL.Query().Get("name"))
		respond(w, v, err)
	})
	mux.HandleFunc("GET /remotes", func(w http.ResponseWriter, r *http.Request) {
		v, err := h.Remotes(r.URL.Query().Get("name"))
		respond(w, v, err)
	})
	mux.HandleFunc("GET /samples", func(w http.ResponseWriter, _ *http.Request) {
		v, err := h.Samples()
		respond(w, v, err)
	})
	mux.HandleFunc("GET /export", func(w http.ResponseWriter, _ *http.Request) {
		v, err := h.Export()
		respond(w, v, err)
	})
	mux.HandleFunc("POST /down", func(w http.ResponseWriter, r *http.Request) {
		name := r.URL.Query().Get("name")
		// Send the answer before the process starts to end.
		w.WriteHeader(http.StatusNoContent)
		_ = http.NewResponseController(w).Flush()
		h.Down(name)
	})
	mux.HandleFunc("GET /capture", h.capture)
	for _, action := range actions {
		mux.HandleFunc("POST /"+action, func(w http.ResponseWriter, r *http.Request) {
			request := Request{}
			if err := decode(r.Body, &request); err != nil && err != io.EOF { // empty
				badRequest(w, err)
				return
			}
			request.Action = action
			liftDeadlines(w)
			result, err := h.Change(r.Context(), request)
			respond(w, result, err)
		})
	}
	mux.HandleFunc("POST "+diffPath, func(w http.ResponseWriter, r *http.Request) {
		var files []File
		if err := decode(r.Body, &files); err != nil {
			badRequest(w, err)
			return
		}
		liftDeadlines(w)
		compared, err := h.Diff(files)
		respond(w, compared, err)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.MaxBytesHandler(mux, bodyLimit(r.URL.Path)).ServeHTTP(w, r)
	})
}

// bodyLimit returns the largest body, in bytes, that a request of that path may have.
func bodyLimit(path string) int64 {
	if path == diffPath {
		return maxFilesBytes
	}
	return maxBodyBytes
}

// Serve answers clients until Close.
func (s *Server) Serve(h Handler) error {
	server := &http.Server{
		Handler:           h.handler(),
		ReadHeaderTimeout: ioTimeout,
		ReadTimeout:       ioTimeout,
		WriteTimeout:      ioTimeout,
		IdleTimeout:       ioTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
	s.mu.Lock()
	s.http = server
	s.mu.Unlock()
	if err := server.Serve(&guardedListener{s.listener, make(chan struct{}, maxClients)}); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("control socket %s: %w", s.path, err)
	}
	return nil
}

// liftDeadlines lifts ioTimeout once a request has been read: its handler may wait for DNS.
func liftDeadlines(w http.ResponseWriter) {
	c := http.NewResponseController(w)
	_ = c.SetReadDeadline(time.Time{}) // when it passes, the request's context is canceled
	_ = c.SetWriteDeadline(time.Time{})
}

// respond answers with v as JSON, or with err.
func respond(w http.ResponseWriter, v any, err error) {
	if err != nil {
		refuse(w, err)
		return
	}
	text, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(text)
}

// badRequest answers a request that is malformed, 400, or whose body is too large, 413.
func badRequest(w http.ResponseWriter, err error) {
	status := http.StatusBadRequest
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		status = http.StatusRequestEntityTooLarge
	}
	http.Error(w, err.Error(), status)
}

// refuse answers with err: 503 while starting, 404 without such a tunnel, else 422 and a Refusal.
func refuse(w http.ResponseWriter, err error) {
	var refusal *Refusal
	switch {
	case errors.Is(err, ErrStarting):
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	case errors.Is(err, ErrNotRunning):
		w.Header().Set(goneHeader, "1")
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	case !errors.As(err, &refusal):
		refusal = &Refusal{Message: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	_ = json.NewEncoder(w).Encode(refusal)
}

// Close releases all names: it removes the socket and its links, unless another process has
// replaced them, and disconnects clients. Call it after the interfaces are gone, since a client's
// Down waits for the links to go.
func (s *Server) Close() error {
	s.mu.Lock()
	s.unlinkLocked(slices.Collect(maps.Keys(s.names)))
	server := s.http
	s.mu.Unlock()
	s.remove(s.path)
	err := s.listener.Close()
	if server != nil {
		err = server.Close()
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
