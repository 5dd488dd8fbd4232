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

// Limits of a request. Clients are trusted, but scripts have bugs.
const (
	maxHeaderBytes = 4 << 10
	maxBodyBytes   = 1 << 10
	ioTimeout      = 5 * time.Second
)

// Server reserves a tunnel's name and serves its control socket.
type Server struct {
	path     string
	listener net.Listener
	info     fs.FileInfo // of the socket that Listen created

	mu   sync.Mutex
	http *http.Server
}

// Listen reserves name in dir, and creates dir if it is missing. It fails with *TakenError
// if a running tunnel has the name, *DirError if dir is not safe, and *LockedError if
// another process holds the lock too long. Clients can connect from now on, and are
// answered once Serve runs. Canceling ctx ends the wait for the lock.
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
	// Server.Close removes the socket, if it is still this one.
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

// Serve answers clients until Close. status returns a value for json.Marshal, or nil while
// the tunnel is not ready; down is called for each POST /down, after the answer is sent.
// Both are called concurrently, also while the tunnel ends.
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
		// Send the answer before the process starts to end.
		w.WriteHeader(http.StatusNoContent)
		_ = http.NewResponseController(w).Flush()
		down()
	})
	server := &http.Server{
		Handler:           http.MaxBytesHandler(mux, maxBodyBytes),
		ReadHeaderTimeout: ioTimeout,
		ReadTimeout:       ioTimeout,
		WriteTimeout:      ioTimeout,
		IdleTimeout:       ioTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
	s.mu.Lock()
	s.http = server
	s.mu.Unlock()
	if err := server.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("control socket %s: %w", s.path, err)
	}
	return nil
}

// Close releases the name: it removes the socket, unless another has replaced it, and
// disconnects clients. Call it after the interface is gone, since Down waits for the
// socket to go. It needs no lock: no process replaces a socket that accepts connections.
func (s *Server) Close() error {
	if info, err := os.Lstat(s.path); err == nil && sameSocket(info, s.info) {
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
