// Package sandbox takes from a process what it does not need once it has begun, to limit what
// an attacker gains who takes it over by a packet: capabilities, system calls (seccomp) and
// files (Landlock).
//
// It affects all threads of the process, current and future, and cannot be undone. Files and
// sockets that need more must be open before. What the kernel does not support is left out,
// and is in State.Missing.
package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The modes, values of Policy.Mode.
const (
	// Off drops capabilities only.
	Off = "off"
	// On has a refused system call fail with EPERM, and be in the kernel's audit log.
	On = "on"
	// Strict has a refused system call kill the process.
	Strict = "strict"
)

// Policy is what a process needs once it has begun.
type Policy struct {
	Mode string
	// EBPF is whether it may make eBPF programs and maps, and attach programs.
	EBPF bool
	// Sysctls is whether it writes what is in /proc/sys/net.
	Sysctls bool
	// Marks is whether it marks packets.
	Marks bool
	// Brokered is whether its parent does what takes a privilege (package privileged).
	Brokered bool
	// RuntimeDir is the folder in which it makes and removes sockets and files.
	RuntimeDir string
	// Remove are folders in which it removes files.
	Remove []string
	// Read are files and folders of the configuration: see Readable.
	Read []string
	// Names is whether it looks up DNS names.
	Names bool
	// AbstractSockets is whether it sends to sockets in the abstract namespace.
	AbstractSockets bool
}

// State is what is enforced. Its JSON is part of a tunnel's status in `print --json`.
type State struct {
	Mode string `json:"mode"`
	// Landlock is the version of the Landlock ABI that is enforced; 0: none is.
	Landlock int `json:"landlock-abi"`
	// Seccomp is whether the list of system calls is enforced.
	Seccomp    bool `json:"seccomp"`
	NoNewPrivs bool `json:"no-new-privs"`
	// EBPF is as in Policy.
	EBPF bool `json:"ebpf"`
	// Brokered is as in Policy.
	Brokered bool `json:"brokered"`
	// Capabilities are the ones that the process keeps. In JSON it is never null.
	Capabilities []Capability `json:"capabilities"`
	// Read has the folders and files of the configuration, and others that can be read, unless Landlock is 0.
	Read []string `json:"read,omitzero"`
	// Missing says what is not enforced, and why.
	Missing []string `json:"missing,omitzero"`
}

// Capability is a capability that the process keeps, and what for.
type Capability struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// String returns the State on one line.
func (s *State) String() string {
	parts := []string{}
	if s.Mode != Off {
		landlock, seccomp := "no landlock", "no seccomp"
		if s.Landlock > 0 {
			landlock = fmt.Sprintf("landlock ABI %d", s.Landlock)
		}
		if s.Seccomp {
			seccomp = "seccomp refuses"
			if s.Mode == Strict {
				seccomp = "seccomp kills"
			}
		}
		parts = append(parts, landlock, seccomp)
	}
	privs := "no-new-privs"
	if !s.NoNewPrivs {
		privs = "new privileges possible"
	}
	parts = append(parts, privs, s.CapabilityClause())
	if s.Brokered {
		parts = append(parts, "ipipd keep does what takes one")
	}
	return s.Mode + ": " + strings.Join(parts, ", ")
}

// CapabilityClause returns the names of Capabilities as a clause: "CAP_NET_ADMIN, CAP_NET_RAW stay".
func (s *State) CapabilityClause() string {
	if len(s.Capabilities) == 0 {
		return "no capability"
	}
	names := make([]string, len(s.Capabilities))
	for i, c := range s.Capabilities {
		names[i] = c.Name
	}
	stay := " stay"
	if len(names) == 1 {
		stay = " stays"
	}
	return strings.Join(names, ", ") + stay
}

// Readable returns the paths that Landlock has to let the process read, for paths to be read again after files were
// replaced by rename(2): of a file its folder, and its target's if it is a symbolic link; of a folder itself, and the
// target folders of the links in it. In place of the root folder it is the file alone.
func Readable(paths ...string) (readable []string) {
	add := func(path string) {
		if !slices.Contains(readable, path) {
			readable = append(readable, path)
		}
	}
	file := func(path string) {
		for _, path := range []string{path, target(path)} {
			if dir := filepath.Dir(path); dir != "/" {
				add(dir)
			} else {
				add(path)
			}
		}
	}
	for _, path := range paths {
		path, err := filepath.Abs(path)
		if err != nil {
			continue
		}
		info, err := os.Stat(path)
		switch {
		case err != nil: // of a tunnel that is not to run yet
			file(path)
		case info.IsDir():
			add(path)
			entries, _ := os.ReadDir(path)
			for _, e := range entries {
				if e.Type() == fs.ModeSymlink {
					file(target(filepath.Join(path, e.Name())))
				}
			}
		case info.Mode().IsRegular():
			file(path)
		}
	}
	return readable
}

// target returns path with its symbolic links resolved; path itself if they lead nowhere.
func target(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}

// Explain adds to err, if it is about a file that Landlock denies, which files can be read, and the remedy. s may be nil.
func (s *State) Explain(err error) error {
	var path *fs.PathError
	if s == nil || s.Landlock == 0 || !errors.As(err, &path) || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	absolute, e := filepath.Abs(path.Path)
	if e != nil || slices.ContainsFunc(s.Read, func(in string) bool { return within(in, absolute) }) {
		return err
	}
	where := "no new file: start ipipd again with it"
	if len(s.Read) > 0 {
		where = "what is in " + strings.Join(s.Read, ", ") + ": put it there, or start ipipd again with it"
	}
	return fmt.Errorf("%w: the sandbox lets this process read %s, or with --sandbox off", err, where)
}

// within reports whether path is folder, or in it.
func within(folder, path string) bool {
	rest, ok := strings.CutPrefix(path, folder)
	return ok && (rest == "" || rest[0] == '/' || folder == "/")
}
