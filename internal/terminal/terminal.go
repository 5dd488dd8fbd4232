// Package terminal draws on the whole screen of a terminal, by the sequences of ECMA-48 and the
// alternate screen of xterm: Close brings back what was there before.
package terminal

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/term"
)

const (
	// Alternate screen; no cursor; lines that are too long are cut and do not wrap.
	enter = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"
	// A terminal without an alternate screen goes on below the last line.
	leave = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[999H\r\n\x1b[?1049l"
)

// Screen is a terminal that shows lines. Close may be called at any time by any goroutine, the other
// methods by one.
type Screen struct {
	in, out *os.File
	before  *term.State
	drawn   []string // the lines on the screen; nil: unknown
	width   int      // as Size returned them
	height  int

	mu     sync.Mutex
	raw    bool
	closed bool
}

// Is reports whether both are terminals.
func Is(in, out *os.File) bool {
	return term.IsTerminal(int(in.Fd())) && term.IsTerminal(int(out.Fd()))
}

// Open takes over the screen. Keys, also those that would send signals, can be read from in one by one. After an error
// a Screen that is not nil has to be closed, too.
func Open(in, out *os.File) (*Screen, error) {
	before, err := term.GetState(int(in.Fd()))
	if err != nil {
		return nil, err
	}
	s := &Screen{in: in, out: out, before: before}
	return s, s.Resume()
}

// Resume takes the screen over again.
func (s *Screen) Resume() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return os.ErrClosed
	}
	_, err := term.MakeRaw(int(s.in.Fd()))
	s.raw = err == nil
	s.mu.Unlock()
	if err == nil {
		_, err = s.out.WriteString(enter)
	}
	s.Forget()
	return err
}

// Suspend restores the screen until Resume.
func (s *Screen) Suspend() error {
	_, err := s.out.WriteString(leave)
	return errors.Join(err, s.restore())
}

// Close restores the screen. Afterwards Resume fails.
func (s *Screen) Close() error {
	s.mu.Lock()
	was := s.raw && !s.closed
	s.closed = true
	s.mu.Unlock()
	err := s.restore() // first: the terminal may take no more output
	if was {
		_, e := s.out.WriteString(leave)
		err = errors.Join(err, e)
	}
	return err
}

// restore sets the terminal's modes back to before.
func (s *Screen) restore() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.raw {
		return nil
	}
	s.raw = false
	return term.Restore(int(s.in.Fd()), s.before)
}

// Size returns the columns and lines of the screen: 80 and 24 if the terminal does not know.
func (s *Screen) Size() (width, height int) {
	width, height, err := term.GetSize(int(s.out.Fd()))
	if err != nil || width <= 0 || height <= 0 {
		width, height = 80, 24
	}
	if width != s.width || height != s.height {
		s.Forget() // each terminal rearranges its lines in its own way
	}
	s.width, s.height = width, height
	return width, height
}

// Forget makes the next Draw draw everything.
func (s *Screen) Forget() { s.drawn = nil }

// Draw shows lines, which fit the screen. It writes those that have changed.
func (s *Screen) Draw(lines []string) error {
	var b strings.Builder
	if s.drawn == nil {
		b.WriteString("\x1b[0m\x1b[2J")
	}
	for i := range max(len(lines), len(s.drawn)) {
		line := ""
		if i < len(lines) {
			line = lines[i]
		}
		if i < len(s.drawn) && s.drawn[i] == line || i >= len(s.drawn) && line == "" {
			continue
		}
		// Erased first: behind the last column the cursor stays on it.
		b.WriteString("\x1b[" + strconv.Itoa(i+1) + "H\x1b[K" + line)
	}
	s.drawn = append(make([]string, 0, len(lines)), lines...)
	if b.Len() == 0 {
		return nil
	}
	_, err := s.out.WriteString(b.String())
	return err
}
