// Package control is the protocol between a running ipipd and its other commands: HTTP over
// a unix socket, one per process. It has a hard link for each tunnel, NAME.sock with the
// name that its interface is made with.
//
//	GET  /status             200, the status of each tunnel, a JSON array; 503 until they are ready
//	GET  /status?name=NAME   200, the status of one tunnel; 404 if there is none
//	GET  /samples            200, the counters of all tunnels, for ipipd monitor; 503 until they are ready
//	GET  /export             200, the configuration of what runs, secrets included
//	GET  /capture?name=NAME  200, a pcapng file that goes on until the client closes its side; 422 and a Refusal
//	POST /down?name=NAME     204, then the tunnel ends, and with the last one the process
//	POST /reload             200 and a Result; 422 and a Refusal. The body is a Request, or empty
//	POST /set, /add, /remove, /enable, /disable, /confirm   the same
//	POST /diff               200 and a Comparison; 422 and a Refusal. The body is a JSON array of files
//
// A link reserves the tunnel's name among all processes that share the directory, in any
// network namespace. Access to the socket is the right to end the tunnels and to read their
// secrets: it is created with mode 0600, in a directory that only its owner can write, root
// or the process's own user, and only these two are answered. Others may have read access to
// the directory, and see the tunnels' names only.
//
// A killed process leaves a stale socket, which refuses connections. The next process that
// needs the name, or lists the directory, replaces or removes it. Creating and removing
// sockets happens under a lock (lock.go), so that no process removes the new socket of
// another.
package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	suffix = ".sock"
	// processPrefix begins the file name of the process's socket, of which tunnels' are links: no tunnel's name has a colon.
	processPrefix = "process:"
	// connectTimeout bounds connect(2), which blocks only while the listener's backlog is full:
	// its process hangs.
	connectTimeout = time.Second
)

// MaxDir is the maximum length of a directory's path in bytes, so that the path of every
// socket in it fits sun_path, for tunnel names of up to 15 bytes.
const MaxDir = len(syscall.RawSockaddrUnix{}.Path) - 1 - len("/") - 15 - len(suffix)

// ErrNotRunning means that no tunnel of that name is running.
var ErrNotRunning = errors.New("no such tunnel")

// ErrStarting means that the tunnel's process is running and the tunnel is not ready.
var ErrStarting = errors.New("is starting")

// TakenError means that a running tunnel has the name.
type TakenError struct{ Name, Path string }

func (e *TakenError) Error() string {
	return fmt.Sprintf("name %s is taken: a running ipipd answers at %s", e.Name, e.Path)
}

// TimeoutError means that a process listens on the tunnel's socket and does not answer.
type TimeoutError struct {
	Name  string
	After time.Duration
}

func (e *TimeoutError) Error() string {
	return fmt.Sprintf("%s does not answer within %v: its process is stopped or hung", e.Name, e.After)
}

func path(dir, name string) string { return filepath.Join(dir, name+suffix) }

// Owns reports whether file is the path of a control socket in dir, by its suffix and folder.
func Owns(dir, file string) bool {
	if !strings.HasSuffix(file, suffix) {
		return false
	}
	own, err := os.Stat(dir)
	if err != nil {
		return false
	}
	other, err := os.Stat(filepath.Dir(file))
	return err == nil && os.SameFile(own, other)
}

// Process is one socket in a directory, stale or not.
type Process struct {
	// Names are the names of its tunnels, sorted.
	Names []string
	// links are the names of its files, without suffix: the tunnels' first, then its own.
	links []string
}

// ID identifies the process among those that run at the same time.
func (p *Process) ID() string { return p.links[len(p.links)-1] }

// Processes returns the sockets in dir, stale ones included, in the order of their first
// names. A directory that does not exist has none.
func Processes(dir string) ([]Process, error) {
	entries, err := os.ReadDir(dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	type inode struct{ device, number uint64 }
	var order []inode
	found := map[inode]*Process{}
	var own []func()
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok || name == "" || e.Type()&fs.ModeSocket == 0 {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		st := info.Sys().(*syscall.Stat_t)
		at := inode{uint64(st.Dev), uint64(st.Ino)}
		p := found[at]
		if p == nil {
			p = &Process{}
			found[at], order = p, append(order, at)
		}
		if strings.HasPrefix(name, processPrefix) {
			own = append(own, func() { p.links = append(p.links, name) })
			continue
		}
		p.Names, p.links = append(p.Names, name), append(p.links, name)
	}
	for _, add := range own {
		add()
	}
	processes := make([]Process, len(order))
	for i, at := range order {
		processes[i] = *found[at]
	}
	return processes, nil
}

// List returns the names of all tunnels in dir, those of stale sockets included, in no
// particular order.
func List(dir string) ([]string, error) {
	processes, err := Processes(dir)
	var names []string
	for _, p := range processes {
		names = append(names, p.Names...)
	}
	return names, err
}

// dial connects to the socket. ErrNotRunning means that no process listens.
func dial(path string) (net.Conn, error) {
	c, err := net.DialTimeout("unix", path, connectTimeout)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil, ErrNotRunning
	case err != nil:
		return nil, err
	}
	return c, nil
}

// isTimeout reports whether err is a timeout; EAGAIN, from a full backlog, is one too.
func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// removeStale removes a stale socket, and reports whether the path is free afterwards.
// The directory's lock is held.
func removeStale(path string) (free bool, err error) {
	c, err := dial(path)
	if err == nil {
		c.Close()
		return false, nil
	}
	if isTimeout(err) {
		return false, nil // a full backlog: the process hangs
	}
	if !errors.Is(err, ErrNotRunning) {
		return false, err
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return false, fmt.Errorf("%s is in the way and is not a socket: remove it", path)
	}
	return true, os.Remove(path)
}

// Sweep removes the files of p in dir if it is stale.
func (p *Process) Sweep(dir string) { Sweep(dir, p.links) }

// Sweep removes the stale sockets of these names in dir. It ignores errors, since a stale
// socket does no harm.
func Sweep(dir string, names []string) {
	if len(names) == 0 {
		return
	}
	unlock, err := lock(context.Background(), dir, lockTimeout)
	if err != nil {
		return
	}
	defer unlock()
	for _, name := range names {
		removeStale(path(dir, name))
	}
}

// sameSocket reports whether a and b are the same file. The inode number alone does not
// tell, since a file system may reuse it at once.
func sameSocket(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime())
}
