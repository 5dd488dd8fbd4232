// Package control is how `print` and `down` talk to a running tunnel: HTTP over
// a unix socket, one per tunnel, named after it.
//
//	GET  /status   200, the tunnel's status as JSON; 503 until the tunnel is ready
//	POST /down     204, and then the tunnel ends
//
// The socket is the claim on the name: who holds a live one holds the name,
// among all the processes that share a folder, whichever network namespace they
// are in. It is never open to others: it comes into being with mode 0600 in a
// folder that only its owner can write, root or the process's own user, and whoever
// can use it can end the tunnel. Others may be able to read the folder: that lets
// them see the tunnels' names, and do nothing.
//
// A process that is killed leaves its socket behind. Such a stale one refuses
// connections, and is replaced or removed by whoever comes across it. Both, and
// claiming, happen under a lock (lock.go), so that nobody takes away what another
// has just made.
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
	// connectTimeout is for the kernel alone: whoever has a backlog that is
	// full for this long is there, and hung.
	connectTimeout = time.Second
)

// MaxDir is the length in bytes of the longest folder whose sockets still have a
// path that the kernel takes (sun_path), whatever their tunnels' names.
const MaxDir = len(syscall.RawSockaddrUnix{}.Path) - 1 - len("/") - 15 - len(suffix)

// ErrNotRunning is that there is no tunnel of that name, or none any more.
var ErrNotRunning = errors.New("no such tunnel")

// ErrStarting is that the tunnel's process is there and the tunnel is not ready.
var ErrStarting = errors.New("is starting")

// TakenError is that a live tunnel has the name.
type TakenError struct{ Name, Path string }

func (e *TakenError) Error() string {
	return fmt.Sprintf("name %s is taken: a running ipipd answers at %s", e.Name, e.Path)
}

// TimeoutError is that a process has the tunnel's socket open and does not
// answer.
type TimeoutError struct {
	Name  string
	After time.Duration
}

func (e *TimeoutError) Error() string {
	return fmt.Sprintf("%s does not answer within %v: its process is stopped or hung", e.Name, e.After)
}

func path(dir, name string) string { return filepath.Join(dir, name+suffix) }

// List are the names that have a socket in dir, live or not, in no useful order.
// A folder that does not exist has none.
func List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok && name != "" && e.Type()&fs.ModeSocket != 0 {
			names = append(names, name)
		}
	}
	return names, nil
}

// dial connects to the socket, and says ErrNotRunning where nobody listens.
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

// timedOut is true of what a full backlog gives as well (EAGAIN).
func timedOut(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// removeStale removes the socket of a process that is no more, and says whether
// the name is free afterwards. The caller has the lock.
func removeStale(path string) (free bool, err error) {
	c, err := dial(path)
	if err == nil {
		c.Close()
		return false, nil
	}
	if timedOut(err) {
		return false, nil // its backlog is full: there, if hung
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

// Sweep removes the sockets in dir that nobody listens at any more, of those
// named. What cannot be removed stays: it does no harm but to the eye.
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

// same tells one socket from the next of its name: a file system may give the
// inode that has just become free away again, but time has passed.
func same(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime())
}
