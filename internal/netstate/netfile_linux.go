package netstate

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"
)

// netFile is a file in /proc/net of a network namespace. It is safe for concurrent use.
type netFile struct {
	mu   sync.Mutex
	keep bool     // reads leave it open, for the next one
	file *os.File // nil: not open
}

// open opens the file for all later reads. It is no error if the file does not exist yet, as without
// its kernel module, or only root may read it: then a read opens it.
func (f *netFile) open(name string) error {
	f.mu.Lock()
	f.keep = true
	f.mu.Unlock()
	if _, err := f.read(name); !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
		return err
	}
	return nil
}

// read returns the present content.
func (f *netFile) read(name string) (content []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file != nil {
		if content, err = readAll(f.file); err == nil {
			return content, nil
		}
		f.closeLocked() // its kernel module has been unloaded
	}
	// The calling thread's namespace: /proc/net is that of the process's first thread. Without a descriptor
	// left, open(2) does not say whether the file exists.
	name = "/proc/thread-self/net/" + name
	if _, err := os.Stat(name); err != nil {
		return nil, err
	}
	if f.file, err = os.Open(name); err != nil {
		return nil, err
	}
	if !f.keep {
		defer f.closeLocked()
	}
	return readAll(f.file)
}

// readAll reads a file from its beginning.
func readAll(file *os.File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(file, 0, math.MaxInt64))
}

func (f *netFile) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keep = false
	f.closeLocked()
}

func (f *netFile) closeLocked() {
	if f.file != nil {
		_ = f.file.Close()
		f.file = nil
	}
}
