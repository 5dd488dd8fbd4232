package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"ipipd/internal/serviceuser"
)

const (
	lockFile = ".lock"
	// lockTimeout is enough for many processes that start at once, each of which may find
	// a hung one (connectTimeout).
	lockTimeout = 2 * time.Second
	lockPoll    = 5 * time.Millisecond
)

// DirError means that a directory is not safe for control sockets: another user could
// replace files in it.
type DirError struct {
	Dir, Problem string
	// Remedy is a command that repairs it, or "": then choose another directory.
	Remedy string
}

func (e *DirError) Error() string {
	return fmt.Sprintf("%s %s", e.Dir, e.Problem)
}

// LockedError means that another process held the lock of a directory for the whole
// timeout.
type LockedError struct {
	Path  string
	After time.Duration
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("%s is held by another process for more than %v: end that process (fuser %s)", e.Path, e.After, e.Path)
}

// lock locks dir against other processes that create or remove sockets, until unlock,
// which also removes the lock file. The kernel releases the lock (flock(2)) if the process
// ends. lock fails with *LockedError after timeout.
//
// The lock is on a file with mode 0600 and not on dir, since every process with read access
// to dir could lock that.
func lock(ctx context.Context, dir string, timeout time.Duration) (unlock func(), err error) {
	root, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			root.Close()
		}
	}()
	for end := time.Now().Add(timeout); ; {
		f, err := tryLock(root)
		if err == nil {
			return func() {
				root.Remove(lockFile) // while locked, so that it is still this file
				f.Close()
				root.Close()
			}, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return nil, err
		}
		if !time.Now().Before(end) {
			return nil, &LockedError{filepath.Join(dir, lockFile), timeout}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// tryLock fails with EWOULDBLOCK if another process holds the lock.
func tryLock(root *os.Root) (_ *os.File, err error) {
	f, err := root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	ours, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !ours.Mode().IsRegular() || ours.Mode().Perm()&0o077 != 0 || !trustedOwner(ours) {
		file := filepath.Join(root.Name(), lockFile)
		return nil, fmt.Errorf("%s is in the way, and is not a file that only its owner may read: rm %s", file, file)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, os.NewSyscallError("flock", err)
	}
	// The previous holder may have removed the file after this OpenFile.
	if now, err := root.Lstat(lockFile); err != nil || !os.SameFile(ours, now) {
		return nil, os.NewSyscallError("flock", syscall.EWOULDBLOCK)
	}
	return f, nil
}

// openDir opens dir, or fails with *DirError if another user could replace files in it.
func openDir(dir string) (*os.Root, error) {
	link, err := os.Lstat(dir) // dir may be a symbolic link that another user owns
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	info, err := root.Stat(".")
	if err == nil {
		err = checkDir(dir, link, info)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

func checkDir(dir string, link, info fs.FileInfo) error {
	for _, i := range []fs.FileInfo{link, info} {
		if !trustedOwner(i) {
			return &DirError{Dir: dir, Problem: fmt.Sprintf("belongs to uid %d, who could replace what is in it", owner(i))}
		}
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return &DirError{dir, fmt.Sprintf("may be written by others (mode %04o)", mode), "chmod go-w " + dir}
	}
	return nil
}

// trustedOwner reports whether a file belongs to root, to the user of this process or, for root's commands, to
// the user that the service runs as.
func trustedOwner(info fs.FileInfo) bool {
	uid := owner(info)
	return uid == 0 || uid == os.Geteuid() || os.Geteuid() == 0 && uid == serviceuser.UID()
}

func owner(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }
