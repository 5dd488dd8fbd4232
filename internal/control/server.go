package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// Bounds of what a client may ask of the daemon: it is the operator, and may
// still be a script that went wrong.
const (
	headerBytes = 4 << 10
	bodyBytes   = 1 << 10
	ioTimeout   = 5 * time.Second
)

// Server is the claim on a tunnel's name, and answers for the tunnel.
type Server struct {
	path     string
	listener net.Listener
	info     fs.FileInfo // of the socket: to know ours from another's

	mu   sync.Mutex
	http *http.Server
}

// Listen claims name in dir, which is made if it is missing. A *TakenError says
// that a live tunnel has it, a *FolderError that dir is not safe, a *LockedError that
// others hold its lock. From then on clients can connect; they are answered from
// Serve on. The end of ctx ends the waiting for the lock.
func Listen(ctx context.Context, dir, name string) (*Server, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, dir, lockTimeout)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := &Server{path: path(dir, name)}
	free, err := removeStale(s.path)
	if err != nil {
		return nil, err
	}
	if !free {
		return nil, &TakenError{name, s.path}
	}
	if s.listener, err = listenPrivate(s.path); err != nil {
		return nil, err
	}
	// Close removes the socket by itself, if it still is ours.
	s.listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if s.info, err = os.Lstat(s.path); err == nil && s.info.Mode().Perm() != 0o600 {
		err = fmt.Errorf("%s came into being with mode %04o instead of 0600", s.path, s.info.Mode().Perm())
	}
	if err != nil {
		s.listener.Close()
		os.Remove(s.path)
		return nil, err
	}
	return s, nil
}

// umask guards the process's umask.
var umask sync.Mutex

// listenPrivate makes the socket with mode 0600, so that there is no moment at which
// others could connect. Linux makes the file with the mode that the socket has before
// bind, less the umask, and also where the folder has a default ACL. Elsewhere it
// takes the umask.
func listenPrivate(path string) (net.Listener, error) {
	if runtime.GOOS != "linux" {
		umask.Lock()
		defer umask.Unlock()
		defer syscall.Umask(syscall.Umask(0o177))
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), 0o600) })
	}}
	return lc.Listen(context.Background(), "unix", path)
}

// Serve answers clients until Close. status is what /status shows, in the form
// that json.Marshal takes, and nil while the tunnel is not ready; down is called for
// each /down, when its answer is on its way. Both may be called at any time, also
// while the tunnel ends.
func (s *Server) Serve(status func() any, down func()) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		v := status()
		if v == nil {
			http.Error(w, ErrStarting.Error(), http.StatusServiceUnavailable)
			return
		}
		text, err := json.Marshal(v)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(text)
	})
	mux.HandleFunc("POST /down", func(w http.ResponseWriter, _ *http.Request) {
		// The answer is on its way before the process begins to end.
		w.WriteHeader(http.StatusNoContent)
		_ = http.NewResponseController(w).Flush()
		down()
	})
	server := &http.Server{
		Handler:           http.MaxBytesHandler(mux, bodyBytes),
		ReadHeaderTimeout: ioTimeout,
		ReadTimeout:       ioTimeout,
		WriteTimeout:      ioTimeout,
		IdleTimeout:       ioTimeout,
		MaxHeaderBytes:    headerBytes,
	}
	s.mu.Lock()
	s.http = server
	s.mu.Unlock()
	if err := server.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("control socket %s: %w", s.path, err)
	}
	return nil
}

// Close gives the name back: the socket is removed, unless somebody else has put
// another in its place, and clients are cut off. Call it when the tunnel is gone:
// the end of the socket is what Down waits for. It waits for nobody: while our socket
// answers, nobody else replaces it, with or without the lock.
func (s *Server) Close() error {
	if info, err := os.Lstat(s.path); err == nil && same(info, s.info) {
		os.Remove(s.path)
	}
	s.mu.Lock()
	server := s.http
	s.mu.Unlock()
	err := s.listener.Close()
	if server != nil {
		err = server.Close()
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
