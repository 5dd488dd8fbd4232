package monitor

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/drop"
	"ipipd/internal/tunnel"
	"ipipd/internal/warning"
)

var start = time.Date(2026, 11, 27, 18, 0, 0, 0, time.UTC)

// running returns a sample of a tunnel that has run for that many seconds.
func running(name string, second int, bytes uint64) tunnel.Sample {
	n := uint64(second)
	return tunnel.Sample{
		Name: name, Interface: tunnel.InterfaceName(name), LocalAddress: "192.0.2.1", RemoteAddress: "198.51.100.1",
		Started: true, Running: true, KeepaliveState: "up", FastPath: true, MTU: 1480, PathMTU: 1500,
		LastHeard: start.Add(time.Duration(second)*time.Second - 400*time.Millisecond),
		RxPackets: n * bytes / 1000, RxBytes: n * bytes, TxPackets: n * bytes / 500, TxBytes: n * bytes / 2,
		ProbesSent: n, ProbesAnswered: n, ProbesHaveAnswers: true, RoundTrip: 12300 * time.Microsecond,
	}
}

// samples returns what a process answers in that second, with tunnels in different states.
func samples(second int) *Answer {
	heavy := running("ipip2", second, 125_000_000)
	heavy.Comment = "to \x1b[31mRiga\x1b[0m 東京\n\u202e<script>"
	heavy.Encrypted, heavy.Established, heavy.FastPath = true, true, false
	heavy.Warnings = []tunnel.Warning{
		{Code: "interface-moved", Severity: warning.Note, Text: "a note"},
		{Code: "fragments", Severity: warning.Warning, Text: "packets leave\nin fragments", Remedy: "lower the MTU", Since: start},
	}
	if second%2 == 0 { // an uneven rate
		heavy.RxBytes += 60_000_000
	}
	lost := running("ipip10", second, 0)
	lost.Running, lost.KeepaliveState, lost.LastHeard = false, "lost", start.Add(-200*time.Second)
	lost.Drops[drop.TooBig] = uint64(second * 3)
	lost.Drops[drop.QueueFull] = uint64(second)
	waiting := running("Büro Berlin (Haus 3)", second, 0)
	waiting.Running, waiting.KeepaliveState, waiting.WaitingFor, waiting.LastHeard = false, "waiting", "route to 203.0.113.7", time.Time{}
	waiting.RoundTrip, waiting.PathMTU, waiting.FastPath = 0, 0, false
	noSA := running("secret", second, 0)
	noSA.Running, noSA.Encrypted, noSA.LastHeard, noSA.RoundTrip = false, true, time.Time{}, 0
	disabled := tunnel.Sample{Name: "later", Interface: "later", RemoteAddress: "office.example", Disabled: true, Comment: "for later"}
	a := &Answer{Samples: tunnel.Samples{Tunnels: []tunnel.Sample{lost, running("ipip1", second, 1234), heavy, waiting, noSA, disabled}}}
	return a
}

func newModel(only string) *Model {
	return NewModel(time.Second, only, func(a, b string) int { // as ipip2 stands before ipip10
		if len(a) != len(b) && strings.HasPrefix(a, "ipip") && strings.HasPrefix(b, "ipip") {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
}

// after returns a Model after 13 rounds, a second apart, and when the last one was.
func after(only string) (*Model, time.Time) {
	m, now := newModel(only), start
	for second := range 13 {
		now = start.Add(time.Duration(second) * time.Second)
		m.Update(now, []Reading{
			{Process: "process:1", At: now, Answer: samples(second)},
			{Process: "process:2", Links: []string{"stuck"}, State: StateSilent, Problem: "stuck does not answer within 2s: its process is stopped or hung: end it with kill -9"},
		})
	}
	return m, now
}

// golden compares lines with a file of testdata, or writes it, with UPDATE_GOLDEN set.
func golden(t *testing.T, name string, lines []string) {
	t.Helper()
	file, got := "testdata/"+name+".txt", strings.ReplaceAll(strings.Join(lines, "\n"), "\x1b", "^[")+"\n"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s: %s", file, d)
	}
}

func TestView_Frame(t *testing.T) {
	colour := Options{Styles: true, Colours: true, Unicode: true}
	for _, c := range []struct {
		name          string
		options       Options
		width, height int
		only          string
		keys          string
	}{
		{"table-40", Options{Unicode: true}, 40, 12, "", ""},
		{"table-80", Options{Unicode: true}, 80, 14, "", ""},
		{"table-200", Options{Unicode: true}, 200, 20, "", ""},
		{"table-200-ascii", Options{}, 200, 20, "", ""},
		{"table-colour", colour, 100, 14, "", ""},
		{"table-no-colour", Options{Styles: true, Unicode: true}, 100, 14, "", ""},
		{"table-sorted", Options{Unicode: true}, 100, 14, "", "ssr"},
		{"table-filter", Options{Unicode: true}, 100, 14, "", "/riGA"},
		{"table-none", Options{Unicode: true}, 60, 10, "", "/nosuch\r"},
		{"help-80", Options{}, 80, 24, "", "?"},
		{"page-40", Options{Unicode: true}, 40, 20, "ipip10", ""},
		{"page-80", Options{Unicode: true}, 80, 24, "ipip2", ""},
		{"page-200", colour, 200, 24, "ipip10", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, now := after(c.only)
			v := NewView(m, c.options)
			v.Frame(now, c.width, c.height)
			keys, _ := ParseKeys([]byte(c.keys), true)
			for _, key := range keys {
				v.Handle(key)
			}
			if v.page != "" {
				v.Detail = []string{"                 name: " + v.page, "              comment: \x1b[2Jhostile", "              too-big: longer than the path MTU, and DF forbids fragments; the sender is told by ICMP 3/4; remedy: none needed; if TCP stalls, see that the sender gets the ICMP"}
			}
			golden(t, c.name, v.Frame(now, c.width, c.height))
		})
	}
}

// visible returns a line without the styles of Options.paint, and fails the test if anything else in it is not
// clean.
func visible(t *testing.T, line string) string {
	t.Helper()
	for _, code := range codes {
		if code != "" {
			line = strings.ReplaceAll(line, "\x1b["+code+"m", "")
		}
	}
	line = strings.ReplaceAll(line, endStyle, "")
	if clean(line, true) != line {
		t.Fatalf("%q", line)
	}
	return line
}

// Whatever keys are pressed in terminals of any size, each line fits, and what operators wrote stays text.
func TestView_random(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 2))
		m, now := after([]string{"", "", "ipip2"}[r.IntN(3)])
		v := NewView(m, Options{Styles: true, Colours: r.IntN(2) == 0, Unicode: r.IntN(2) == 0})
		for range 30 {
			key := Key(r.IntN(130))
			if r.IntN(2) == 0 {
				key = -Key(r.IntN(12)) - 1
			}
			if v.Handle(key); r.IntN(20) == 0 {
				now = now.Add(45 * time.Second)
				m.Update(now, nil)
			}
			v.Detail = []string{strings.Repeat("long ", r.IntN(40)), "k\x1b: v\x07"}
			width, height := []int{1, 2, 3, 7, 40, 80, 200, 10000}[r.IntN(8)], []int{1, 2, 3, 4, 5, 7, 24, 1000}[r.IntN(8)]
			lines := v.Frame(now, width, height)
			if len(lines) == 0 || len(lines) > height {
				t.Fatalf("seed %d: %d lines of %d", seed, len(lines), height)
			}
			for _, line := range lines {
				if n := textWidth(visible(t, line)); n > width && !(width == 1 && n == 2) {
					t.Fatalf("seed %d: %d columns of %d: %q", seed, n, width, line)
				}
			}
		}
	}
}

func TestView_Handle(t *testing.T) {
	m, now := after("")
	v := NewView(m, Options{})
	press := func(keys ...Key) (a Action) {
		t.Helper()
		for _, key := range keys {
			a = v.Handle(key)
			v.Frame(now, 80, 10)
		}
		return a
	}
	v.Frame(now, 80, 10)
	first := v.selected
	if press(KeyDown); v.selected == first {
		t.Error("down selects the same")
	}
	if press(KeyEnd, KeyDown); v.selected != "stuck" {
		t.Errorf("the last is %q", v.selected)
	}
	if press(KeyHome, KeyUp, KeyPageUp); v.selected != first {
		t.Errorf("the first is %q", v.selected)
	}
	press('G', KeyEnter)
	if v.page != "stuck" {
		t.Fatalf("page %q", v.page)
	}
	if press(KeyLeft); v.page != "" || v.selected != "stuck" {
		t.Errorf("back: page %q, selected %q", v.page, v.selected)
	}
	// What is typed into the filter is no command.
	if a := press('/', 'i', 'q', '?', KeyBackspace, KeyBackspace, 'p', 'i', 'p', '1'); a != Stay || v.filter != "ipip1" || v.help {
		t.Errorf("filter %q", v.filter)
	}
	if press(KeyEnter, KeyEnter); v.page != "ipip1" {
		t.Errorf("the first that matches is %q", v.page)
	}
	if a := press(KeyEscape, 'q'); a != Quit {
		t.Errorf("q: %v", a)
	}
	if press(KeyEscape); v.filter != "" {
		t.Errorf("Escape leaves the filter %q", v.filter)
	}
	for key, want := range map[Key]Action{KeyInterrupt: Quit, KeySuspend: Suspend, KeyRedraw: Redraw, 'x': Stay} {
		if a := press(key); a != want {
			t.Errorf("key %d: %v, want %v", key, a, want)
		}
		if a := press('/', key); key < 0 && a != want {
			t.Errorf("key %d in the filter: %v, want %v", key, a, want)
		}
		press(KeyEscape)
	}
	// The keys s and right go to the next column, S and left back.
	before := v.sortBy
	for range sortable() {
		press('s')
	}
	if v.sortBy != before {
		t.Errorf("sorted by %s after all columns", v.sortBy)
	}
	if press('S', 's', KeyLeft, KeyRight); v.sortBy != before {
		t.Errorf("sorted by %s", v.sortBy)
	}
}

// The page of a tunnel that is gone says so, and closes once the tunnel is forgotten.
func TestView_pageGone(t *testing.T) {
	m, now := after("")
	v := NewView(m, Options{})
	v.Frame(now, 80, 24)
	v.Handle(KeyEnter)
	m.Update(now, nil)
	if lines := v.Frame(now, 80, 24); !strings.Contains(lines[0], "gone for 0s") {
		t.Errorf("%q", lines[0])
	}
	m.Update(now.Add(2*keepGone), nil)
	if lines := v.Frame(now, 80, 24); !strings.HasPrefix(lines[0], "0 tunnels") || v.page != "" {
		t.Errorf("%q", lines)
	}
}

func TestParseKeys(t *testing.T) {
	for _, c := range []struct {
		in    string
		final bool
		want  []Key
		rest  int
	}{
		{"q\r\n\x7f\x08\x03\x1a\x0c", false, []Key{'q', KeyEnter, KeyEnter, KeyBackspace, KeyBackspace, KeyInterrupt, KeySuspend, KeyRedraw}, 0},
		{"\x1b[A\x1bOB\x1b[5~\x1b[1~x", false, []Key{KeyUp, KeyDown, KeyPageUp, KeyHome, 'x'}, 0},
		{"a\x1b", false, []Key{'a'}, 1},
		{"a\x1b", true, []Key{'a', KeyEscape}, 0},
		{"\x1b[", false, nil, 2},
		{"\x1b[1;5", false, nil, 5},
		{"\x1b[1;5C", false, nil, 0}, // with Ctrl
		{"\x1b\x1b[A", false, []Key{KeyEscape, KeyUp}, 0},
		{"\x1bq", false, []Key{KeyEscape, 'q'}, 0},
		{"\x1b[", true, []Key{KeyEscape}, 0},
		{"東é\x00\x01", false, []Key{'東', 'é'}, 0},
		{"\xe6\x9d", false, nil, 2},
		{"\xe6\x9d", true, nil, 0},
		{"\xffz", false, []Key{'z'}, 0},
		{"\x1b[200~pasted\x1b[201~", false, []Key{'p', 'a', 's', 't', 'e', 'd'}, 0},
	} {
		got, rest := ParseKeys([]byte(c.in), c.final)
		if d := cmp.Diff(c.want, got); d != "" || rest != c.rest {
			t.Errorf("ParseKeys(%q, %v): rest %d, want %d\n%s", c.in, c.final, rest, c.rest, d)
		}
	}
}

// Whatever a terminal sends, ParseKeys leaves over no more than a key may have, and nothing at the end of the input.
func FuzzParseKeys(f *testing.F) {
	f.Add([]byte("\x1b[1;5A\xe6\x9d\xb1q\x1b"))
	f.Fuzz(func(t *testing.T, in []byte) {
		keys, rest := ParseKeys(in, false)
		if rest > maxSequence+1 || rest > len(in) {
			t.Fatalf("%d bytes left of %q", rest, in)
		}
		more, left := ParseKeys(in[len(in)-rest:], true)
		if left != 0 || len(keys)+len(more) > len(in) {
			t.Fatalf("%q: %v, %v, %d left", in, keys, more, left)
		}
		for _, key := range append(keys, more...) {
			if key >= 0 && (key < 0x20 || key >= 0x7f && key < 0xa0) {
				t.Fatalf("%q has the key %q", in, rune(key))
			}
		}
	})
}

func BenchmarkView_Frame(b *testing.B) {
	m, now := newModel(""), start
	for second := range 13 {
		a := &Answer{}
		for i := range 1000 {
			a.Tunnels = append(a.Tunnels, running(fmt.Sprintf("ipip%d", i), second, uint64(i)))
		}
		now = start.Add(time.Duration(second) * time.Second)
		m.Update(now, []Reading{{Process: "1", At: now, Answer: a}})
	}
	v := NewView(m, Options{Styles: true, Colours: true, Unicode: true})
	v.Handle('s')
	for b.Loop() {
		v.Frame(now, 200, 50)
	}
}
