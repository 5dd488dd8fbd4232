package sysctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Manager sets sysctls, and sets them back once no process needs them any more. It is not safe for
// concurrent use.
//
// The values before are recorded in a file of Dir for each network namespace. A process that needs the sysctls
// holds a shared lock on its byte 0, which ends with the process; one that changes the file or a sysctl holds
// byte 1. A process that gets byte 0 exclusively at its end is the last, and sets back what was not changed since.
type Manager struct {
	// Root is the file system: "" is /. Dir is the runtime-dir of ipipd.
	Root, Dir string

	file *os.File        // the file of Dir, while this process needs sysctls; else nil
	set  map[string]bool // sysctls that this process has set, and does not set again
	// open are the sysctls to set back: later the process may not be allowed to open them.
	open map[string]*os.File
}

// record is a sysctl that was set, and its value before.
type record struct {
	File string `json:"sysctl"`
	Was  int    `json:"was"`
	Set  int    `json:"set"`
}

// Bytes of the file that are locked.
const (
	users   = 0
	editing = 1
)

// Set sets the sysctls of settings that have another value, and returns them. One that this process has set
// before, and that was changed since, stays as it is, unless it is Ours. From now on this process needs what
// other processes have set, too, even without settings.
func (m *Manager) Set(settings []Setting) (done []Setting, err error) {
	if len(settings) == 0 && (m.file != nil || !m.recorded()) {
		return nil, nil
	}
	if err := m.begin(); err != nil {
		return nil, err
	}
	defer m.unlock()
	records := m.records()
	for _, r := range records { // set by other processes: opened now, to be set back later
		_, _ = m.sysctl(r.File)
	}
	if i := slices.IndexFunc(settings, func(s Setting) bool { return s.File == allRPFilter }); i >= 0 {
		settings = slices.Insert(slices.Clone(settings), i, m.keepFilters(settings)...)
	}
	for _, s := range settings {
		was, err := Read(m.root(), s.File)
		if err != nil || was == s.Value || m.set[s.File] && !s.Ours {
			continue // of an interface that is gone, for one
		}
		if !s.Ours && !slices.ContainsFunc(records, func(r record) bool { return r.File == s.File }) {
			records = append(records, record{s.File, was, s.Value})
			if err := m.store(records); err != nil { // first: a crash in between sets back nothing
				return done, err
			}
		}
		if err := m.write(s.File, s.Value); err != nil {
			return done, fmt.Errorf("%v: %w", s, err)
		}
		m.set[s.File] = true
		done = append(done, s)
	}
	return done, nil
}

var allRPFilter = conf("all", "rp_filter")

// keepFilters returns the settings with which other interfaces, and new ones, keep the rp_filter that they have by
// conf/all before it is lowered: the greater of both is in effect.
func (m *Manager) keepFilters(but []Setting) (settings []Setting) {
	all, err := Read(m.root(), allRPFilter)
	entries, readErr := fs.ReadDir(m.root(), "proc/sys/net/ipv4/conf")
	if err != nil || readErr != nil {
		return nil
	}
	for _, e := range entries {
		s := Setting{File: conf(e.Name(), "rp_filter"), Value: all}
		if own, err := Read(m.root(), s.File); err != nil || own >= all || slices.ContainsFunc(but, func(b Setting) bool { return b.File == s.File }) {
			continue
		}
		settings = append(settings, s)
	}
	return settings
}

// Restore ends this process's need of the sysctls. If no other process needs them it sets them back, also those
// of killed processes, and returns them. A value that was changed since stays. Without a record it does nothing.
func (m *Manager) Restore() (back []Setting, err error) {
	if m.file == nil {
		if !m.recorded() {
			return nil, nil
		}
		if err := m.begin(); err != nil {
			return nil, err
		}
	} else if err := lock(m.file, editing, unix.F_WRLCK, true); err != nil {
		return nil, err
	}
	defer m.Leave()
	switch err := lock(m.file, users, unix.F_WRLCK, false); {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return nil, nil
	case err != nil:
		return nil, err
	}
	var errs []error
	for _, r := range slices.Backward(m.records()) {
		if err := m.write(r.File, r.Was); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%v: %w", Setting{File: r.File, Value: r.Was}, err))
			continue
		}
		back = append(back, Setting{File: r.File, Value: r.Was})
	}
	if errs == nil {
		errs = append(errs, os.Remove(m.file.Name()))
	}
	return back, errors.Join(errs...)
}

// Leave ends this process's need without setting anything back: the next process does.
func (m *Manager) Leave() {
	if m.file != nil {
		_ = m.file.Close()
		for _, f := range m.open {
			_ = f.Close()
		}
		m.file, m.set, m.open = nil, nil, nil
	}
}

// path returns the path of the file, for the network namespace of the calling thread.
func (m *Manager) path() string {
	var s unix.Stat_t
	_ = unix.Stat("/proc/thread-self/ns/net", &s)
	return filepath.Join(m.Dir, "sysctl:"+strconv.FormatUint(s.Ino, 10))
}

// recorded reports whether the file exists.
func (m *Manager) recorded() bool {
	_, err := os.Stat(m.path())
	return err == nil
}

// begin opens the file, if it is not open, makes this process one of its users, and locks it for editing until unlock.
func (m *Manager) begin() error {
	if m.file != nil {
		return lock(m.file, editing, unix.F_WRLCK, true)
	}
	for {
		f, err := os.OpenFile(m.path(), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		var s unix.Stat_t
		err = errors.Join(lock(f, editing, unix.F_WRLCK, true), lock(f, users, unix.F_RDLCK, true), unix.Fstat(int(f.Fd()), &s))
		if err == nil && s.Nlink > 0 { // else the last user has just removed it
			m.file, m.set, m.open = f, map[string]bool{}, map[string]*os.File{}
			return nil
		}
		_ = f.Close()
		if err != nil {
			return err
		}
	}
}

func (m *Manager) unlock() { _ = lock(m.file, editing, unix.F_UNLCK, true) }

// lock locks or unlocks a byte of a file: a lock of the open file description (OFD), which ends with it.
func lock(f *os.File, which int64, kind int16, wait bool) error {
	command := unix.F_OFD_SETLK
	if wait {
		command = unix.F_OFD_SETLKW
	}
	for {
		err := unix.FcntlFlock(f.Fd(), command, &unix.Flock_t{Type: kind, Start: which, Len: 1})
		if err != unix.EINTR {
			return os.NewSyscallError("fcntl", err)
		}
	}
}

// records returns the records of the file whose sysctl still has the value that was set.
func (m *Manager) records() (records []record) {
	// The file is never truncated: bytes after the JSON value are left of a longer one.
	_ = json.NewDecoder(io.NewSectionReader(m.file, 0, 1<<20)).Decode(&records)
	return slices.DeleteFunc(records, func(r record) bool {
		now, err := Read(m.root(), r.File)
		return err != nil || now != r.Set
	})
}

func (m *Manager) store(records []record) error {
	b, err := json.Marshal(records)
	if err == nil {
		_, err = m.file.WriteAt(append(b, '\n'), 0)
	}
	return err
}

// sysctl returns a sysctl open for writing; to open it takes root, or CAP_NET_ADMIN.
func (m *Manager) sysctl(file string) (f *os.File, err error) {
	if f = m.open[file]; f == nil {
		if f, err = os.OpenFile(filepath.Join(m.Root, "/proc/sys", file), os.O_WRONLY, 0); err == nil {
			m.open[file] = f
		}
	}
	return f, err
}

func (m *Manager) write(file string, value int) error {
	f, err := m.sysctl(file)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(value)), 0)
	}
	var path *os.PathError
	switch {
	case errors.Is(err, syscall.EROFS):
		return errors.New("/proc/sys is read-only here: set it on the host, or by docker run --sysctl")
	case errors.As(err, &path):
		return path.Err
	}
	return err
}

func (m *Manager) root() fs.FS { return os.DirFS(filepath.Join(m.Root, "/")) }
