package terminal

import (
	"io"
	"os"
	"strings"
	"testing"
)

// Draw writes only the lines that have changed, each at its row.
func TestScreen_Draw(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s := &Screen{out: w}
	var wrote strings.Builder
	draw := func(lines ...string) string {
		t.Helper()
		wrote.Reset()
		if err := s.Draw(lines); err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString("\x00"); err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 1)
		for {
			if _, err := io.ReadFull(r, one); err != nil {
				t.Fatal(err)
			}
			if one[0] == 0 {
				return wrote.String()
			}
			wrote.Write(one)
		}
	}
	for _, c := range []struct {
		lines []string
		want  string
	}{
		{[]string{"one", "", "three"}, "\x1b[0m\x1b[2J\x1b[1H\x1b[Kone\x1b[3H\x1b[Kthree"},
		{[]string{"one", "", "three"}, ""},
		{[]string{"one", "two", "three"}, "\x1b[2H\x1b[Ktwo"},
		{[]string{"1"}, "\x1b[1H\x1b[K1\x1b[2H\x1b[K\x1b[3H\x1b[K"},
		{nil, "\x1b[1H\x1b[K"},
	} {
		if got := draw(c.lines...); got != c.want {
			t.Errorf("%q: %q, want %q", c.lines, got, c.want)
		}
	}
	s.Forget()
	if got := draw("one"); got != "\x1b[0m\x1b[2J\x1b[1H\x1b[Kone" {
		t.Errorf("forgotten: %q", got)
	}
	// A pipe has no size, and what has another size is drawn anew.
	if width, height := s.Size(); width != 80 || height != 24 || s.drawn != nil {
		t.Errorf("%d %d, %q", width, height, s.drawn)
	}
	w.Close()
	if s.Draw([]string{"x"}) == nil {
		t.Error("no error of a terminal that is gone")
	}
}

// Close can be called twice, and Resume fails after it.
func TestScreen_Close(t *testing.T) {
	s := &Screen{in: os.Stdin, out: os.Stdout}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if s.Resume() == nil {
		t.Error("it is taken over again")
	}
}
