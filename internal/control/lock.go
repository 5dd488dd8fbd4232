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
)

const (
	lockFile = ".lock"
	// lockTimeout is for many who start at once, each of whom may come across a
	// stale socket or a hung one (connectTimeout).
	lockTimeout = 2 * time.Second
	lockPoll    = 5 * time.Millisecond
)

// FolderError is that a folder is not one to make a control socket in: somebody else
// could replace what is in it.
type FolderError struct {
	Dir, Problem string
	// Remedy is a command that mends it, "" if there is none but to choose another.
	Remedy string
}

func (e *FolderError) Error() string {
	return fmt.Sprintf("%s %s", e.Dir, e.Problem)
}

// LockedError is that another process holds the lock of a folder and does not give it
// back.
type LockedError struct {
	Path  string
	After time.Duration
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("%s is held by another process for more than %v: end that process (fuser %s)", e.Path, e.After, e.Path)
}

// lock keeps others from claiming and removing sockets in dir until unlock is called,
// which removes the lock's file again. The lock goes with the process that has it.
// A *LockedError says that it was not to be had within timeout.
//
// It is a file of its own with mode 0600, not dir, which every process that may read
// it could lock.
func lock(ctx context.Context, dir string, timeout time.Duration) (unlock func(), err error) {
	folder, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			folder.Close()
		}
	}()
	for end := time.Now().Add(timeout); ; {
		f, err := tryLock(folder)
		if err == nil {
			return func() {
				folder.Remove(lockFile) // while it is locked: it is nobody else's
				f.Close()
				folder.Close()
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

// tryLock says EWOULDBLOCK where another has the lock.
func tryLock(folder *os.Root) (_ *os.File, err error) {
	f, err := folder.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
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
	if !ours.Mode().IsRegular() || ours.Mode().Perm()&0o077 != 0 || !trusted(ours) {
		file := filepath.Join(folder.Name(), lockFile)
		return nil, fmt.Errorf("%s is in the way, and is not a file that only its owner may read: rm %s", file, file)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, os.NewSyscallError("flock", err)
	}
	// Who had it may have removed the file since it was opened here.
	if now, err := folder.Lstat(lockFile); err != nil || !os.SameFile(ours, now) {
		return nil, os.NewSyscallError("flock", syscall.EWOULDBLOCK)
	}
	return f, nil
}

// openFolder refuses, by *FolderError, a folder in which somebody else could put
// another file in the place of ours.
func openFolder(dir string) (*os.Root, error) {
	link, err := os.Lstat(dir) // the way there may be somebody else's as well
	if err != nil {
		return nil, err
	}
	folder, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	info, err := folder.Stat(".")
	if err == nil {
		err = checkFolder(dir, link, info)
	}
	if err != nil {
		folder.Close()
		return nil, err
	}
	return folder, nil
}

func checkFolder(dir string, link, info fs.FileInfo) error {
	for _, i := range []fs.FileInfo{link, info} {
		if !trusted(i) {
			return &FolderError{Dir: dir, Problem: fmt.Sprintf("belongs to uid %d, who could replace what is in it", owner(i))}
		}
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return &FolderError{dir, fmt.Sprintf("may be written by others (mode %04o)", mode), "chmod go-w " + dir}
	}
	return nil
}

// trusted is true of what belongs to root or to the user of this process.
func trusted(info fs.FileInfo) bool { return owner(info) == 0 || owner(info) == os.Geteuid() }

func owner(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }
