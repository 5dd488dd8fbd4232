// Package config reads tunnels from files: YAML, of which JSON is a part, and RouterOS exports.
//
// A value is text, which tunnel.Property.Set parses as it does a flag's: YAML decides no type.
// Read returns all errors of all files, each with its line and column.
// Neither an error nor the JSON of a File has a secret in it. Nothing here starts a tunnel, or
// knows what runs.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"ipipd/internal/serviceuser"
	"ipipd/internal/tunnel"
)

// Position is a place in a file. Line and Column begin with 1; a column is a character.
type Position struct {
	File         string
	Line, Column int
}

// String returns file:line:column.
func (p Position) String() string { return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column) }

// Setting is one property as a file has it. A Repeatable property has one Setting for each value,
// and for an empty list one Setting whose Value is "".
type Setting struct {
	// Property is the name of a tunnel.Property or ProcessProperty, or DisabledKey.
	Property string
	// Value is in the notation of the flag.
	Value string
	Pos   Position
}

// DisabledKey is the key of tunnel.Config.Disabled in a file; its value is yes or no.
const DisabledKey = "disabled"

// DisabledHelp describes DisabledKey in one line.
const DisabledHelp = "yes: the tunnel is checked, and not started"

// Tunnel is one tunnel of a file: only what the file says of it, in the file's order.
type Tunnel struct {
	Settings []Setting
	Pos      Position

	// incomplete: a part of it could not be read as a Setting, and has an error of its own.
	incomplete bool
	// refused is why it must not be started although it can be read: see File.Refused.
	refused *Error
}

// File is what a file, or several, say.
type File struct {
	// Process are settings of the process.
	Process []Setting
	// Defaults hold for each Tunnel, also of other files, that does not set the property.
	Defaults []Setting
	Tunnels  []Tunnel
	// Files are the files that Read has read.
	Files []string
	// Refused has an error for each tunnel that can be read and must not be started: an export may have left
	// its secret out, and it would send in the clear. Read returns no tunnel.Config of it.
	Refused Errors
	// Exposed are the ones of Files that contain a secret and can be read by others than their owner.
	Exposed []string
	// Notes are lines for the operator, each with its position, about what was passed over.
	Notes []string
}

// Error is what is wrong at one place, and what is accepted there. It is one line.
type Error struct {
	Pos     Position
	Message string
}

func (e Error) Error() string { return e.Pos.String() + ": " + e.Message }

// Errors is everything that is wrong, up to maxErrors.
type Errors []Error

const (
	// MaxShown is how many errors Errors.Error prints: more than that mostly have one cause.
	MaxShown = 20
	// maxErrors bounds the memory that the errors of a large file take, if it is no configuration at all.
	maxErrors = 1000
)

// Error returns a line for each of the first 20 errors, and one that counts the others.
func (e Errors) Error() string {
	var lines []string
	for _, one := range e[:min(len(e), MaxShown)] {
		lines = append(lines, one.Error())
	}
	switch more := len(e) - MaxShown; {
	case len(e) >= maxErrors:
		lines = append(lines, fmt.Sprintf("and at least %d more", more))
	case more > 0:
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n")
}

func (e *Errors) add(pos Position, format string, args ...any) {
	if len(*e) < maxErrors {
		*e = append(*e, Error{pos, fmt.Sprintf(format, args...)})
	}
}

// maxSize is the size in bytes of the largest file: 30,000 tunnels.
const maxSize = 10 << 20

// Read reads the files of paths as one configuration: no name and no pair of outer addresses
// twice, the defaults of each file for the tunnels of all. It returns what they say, and the tunnels in the
// order of the files: the disabled ones too, but not the Refused ones. Its error is Errors, or that of a
// file that cannot be read, with its path. It does not block: a file that is not a regular one is an error.
func Read(paths ...string) (*File, []tunnel.Config, error) { return read(paths, false) }

// Stdin is the path by which ReadOnce reads standard input, stdinName the file name in its positions.
const (
	Stdin     = "-"
	stdinName = "<stdin>"
)

// ReadOnce is Read for a command that may block: it reads pipes, too, and Stdin.
func ReadOnce(paths ...string) (*File, []tunnel.Config, error) { return read(paths, true) }

// read is ReadOnce if once is set, else Read.
func read(paths []string, once bool) (*File, []tunnel.Config, error) {
	sources, err := load(paths, once)
	if err != nil {
		return nil, nil, err
	}
	return Parse(sources)
}

// Source is a file's name and content.
type Source struct {
	Name string
	Data []byte

	exposed bool // others than its owner can read it
}

// Load reads the files of paths for Parse; both together are ReadOnce. Its error has the path that cannot be read.
func Load(paths ...string) ([]Source, error) { return load(paths, true) }

func load(paths []string, once bool) (sources []Source, err error) {
	files, err := expand(paths, once)
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		s, err := loadFile(name, once)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
	}
	return sources, nil
}

// Parse parses sources as one configuration, and returns what Read does. Its error is Errors.
func Parse(sources []Source) (*File, []tunnel.Config, error) {
	all := &File{}
	var files []string
	var errs Errors
	for _, s := range sources {
		files = append(files, s.Name)
		if len(s.Data) > maxSize {
			errs.add(Position{s.Name, 1, 1}, "a file of more than 10 MB: want the tunnels in several")
			continue
		}
		file, wrong := parse(s.Name, s.Data)
		errs = append(errs, wrong...)
		if file != nil {
			if s.exposed && file.hasSecret() {
				file.Exposed = []string{s.Name}
			}
			all.Process = append(all.Process, file.Process...)
			all.Defaults = append(all.Defaults, file.Defaults...)
			all.Tunnels = append(all.Tunnels, file.Tunnels...)
			all.Exposed = append(all.Exposed, file.Exposed...)
			all.Notes = append(all.Notes, file.Notes...)
		}
	}
	all.Files = files
	configs, wrong := all.configs()
	if errs = append(errs, wrong...); len(errs) > 0 {
		slices.SortStableFunc(errs, func(a, b Error) int {
			return cmp.Or(
				cmp.Compare(slices.Index(files, a.Pos.File), slices.Index(files, b.Pos.File)),
				cmp.Compare(a.Pos.Line, b.Pos.Line),
				cmp.Compare(a.Pos.Column, b.Pos.Column),
			)
		})
		return nil, nil, errs
	}
	return all, configs, nil
}

// loadFile reads one file, up to maxSize + 1 bytes. It reads a pipe only if once is set.
func loadFile(name string, once bool) (s Source, err error) {
	f := os.Stdin
	if !once || name != stdinName {
		if f, err = openFile(name, once); err != nil {
			return s, err
		}
		defer f.Close()
	}
	s.Name = name
	if s.Data, err = io.ReadAll(io.LimitReader(f, maxSize+1)); err != nil {
		return s, err
	}
	info, err := f.Stat()
	s.exposed = err == nil && info.Mode().IsRegular() && readByOthers(info)
	return s, nil
}

// readByOthers reports whether others than a file's owner can read it; the service's group, if it is the file's, counts
// as its owner.
func readByOthers(info fs.FileInfo) bool {
	if int(info.Sys().(*syscall.Stat_t).Gid) == serviceuser.GID() {
		return info.Mode()&0o004 != 0
	}
	return info.Mode()&0o044 != 0
}

// Conceal returns the shell command that takes from others the right to read a file of File.Exposed.
func Conceal(name string) string {
	if info, err := os.Stat(name); err == nil && int(info.Sys().(*syscall.Stat_t).Gid) == serviceuser.GID() {
		return "chmod 640 " + name
	}
	return "chmod 600 " + name
}

// openFile opens a regular file, or a pipe if once is set; any other is an error.
func openFile(name string, once bool) (*os.File, error) {
	flag := syscall.O_NONBLOCK // a FIFO without a writer would block
	if info, err := os.Stat(name); err == nil && once && info.Mode()&fs.ModeNamedPipe != 0 {
		flag = 0
	}
	f, err := os.OpenFile(name, os.O_RDONLY|flag, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() && flag != 0 {
		err = fmt.Errorf("%s: neither a file nor a folder: want one, which a reload can read again", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *File) hasSecret() bool {
	secret := func(s Setting) bool { return properties[s.Property].Secret }
	return slices.ContainsFunc(f.Defaults, secret) ||
		slices.ContainsFunc(f.Tunnels, func(t Tunnel) bool { return slices.ContainsFunc(t.Settings, secret) })
}

// parse parses data as a RouterOS export if name ends in .rsc, or if it has no extension, as a pipe's, and data begins
// with a menu; else as YAML. The File is nil if nothing of it can be understood.
func parse(name string, data []byte) (*File, Errors) {
	if ext := filepath.Ext(name); strings.EqualFold(ext, ".rsc") || ext == "" && beginsWithMenu(data) {
		return parseRouterOS(name, data)
	}
	return parseYAML(name, data)
}

// beginsWithMenu reports whether the first line of data that is no comment begins with the path of a menu of
// RouterOS. YAML with tunnels in it never does.
func beginsWithMenu(data []byte) bool {
	for line := range bytes.Lines(bytes.TrimPrefix(data, []byte("\ufeff"))) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return line[0] == '/' || bytes.HasPrefix(line, []byte("interface ")) || bytes.HasPrefix(line, []byte("ip "))
		}
	}
	return false
}

// extensions are the file name extensions that are read from a folder.
var extensions = []string{".yaml", ".yml", ".json", ".rsc"}

// expand returns paths with each folder replaced by its files that have one of the extensions and are not hidden,
// in order of name.
func expand(paths []string, once bool) ([]string, error) {
	var files []string
	for _, path := range paths {
		switch {
		case path == Stdin && !once:
			return nil, errors.New("-: standard input: want a file, which a reload can read again")
		case path == Stdin:
			files = append(files, stdinName)
			continue
		}
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: want a configuration, such as /etc/ipipd/ipipd.yaml, or a folder of them", err)
		}
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			files = append(files, path)
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		before := len(files)
		for _, e := range entries {
			name := e.Name()
			if !e.IsDir() && !strings.HasPrefix(name, ".") && slices.Contains(extensions, filepath.Ext(name)) {
				files = append(files, filepath.Join(path, name))
			}
		}
		if len(files) == before {
			return nil, fmt.Errorf("%s: no configuration in this folder: want files named *%s", path, strings.Join(extensions, ", *"))
		}
	}
	return files, nil
}
