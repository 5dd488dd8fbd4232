package monitor

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for in, want := range map[string][2]string{
		"plain":                            {"plain", "plain"},
		"\x1b[31mred\x1b]0;title\x07":      {"?[31mred?]0;title?", "?[31mred?]0;title?"},
		"\u009b31m":                        {"?31m", "?31m"}, // CSI as a C1 control
		"two\nlines\tand a tab":            {"two lines and a tab", "two lines and a tab"},
		"a\u202eb\u2066c\u200d\ufeff":      {"abc", "a?b?c??"},
		"Zürich 東京 \U0001f600":             {"Zürich 東京 \U0001f600", "Z?rich ?? ?"},
		"e\u0301\u0301\u0301\u0301\u20dd.": {"e\u0301\u0301.", "e?????."},
		"\xff\xfe":                         {"??", "??"},
		"a\u00a0b\u3000c\u2028d":           {"a b c?d", "a?b?c?d"},
		"\ue000":                           {"", "?"},
	} {
		if got := [2]string{clean(in, true), clean(in, false)}; got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestFit(t *testing.T) {
	for _, c := range []struct {
		in    string
		width int
		right bool
		want  string
	}{
		{"abc", 5, false, "abc  "},
		{"abc", 5, true, "  abc"},
		{"abcdef", 5, false, "abcd~"},
		{"東京都", 5, false, "東京~"},
		{"東京都", 4, false, "東~ "},
		{"東京都", 6, false, "東京都"},
		{"東", 1, false, " "},
		{"ab", 1, false, "a"},
		{"e\u0301x", 2, false, "e\u0301x"},
		{"abc", 0, false, ""},
		{"", 2, true, "  "},
	} {
		if got := fit(c.in, c.width, c.right); got != c.want {
			t.Errorf("fit(%q, %d) = %q, want %q", c.in, c.width, got, c.want)
		}
	}
}

func TestWrap(t *testing.T) {
	for _, c := range []struct {
		in            string
		width, indent int
		want          []string
	}{
		{"", 10, 2, []string{""}},
		{"short", 10, 2, []string{"short"}},
		{"key: one two three", 10, 5, []string{"key: one", "     two", "     three"}},
		{"abcdefghij", 4, 1, []string{"abcd", " efg", " hij"}},
		{"東京都東京都", 5, 0, []string{"東京", "都東", "京都"}},
		{"東", 1, 0, []string{"東"}},
		{"a b", 1, 0, []string{"a", "b"}},
		{"      one: two", 8, 6, []string{"      on", "  e: two"}},
		{"blanks      ", 8, 0, []string{"blanks"}},
	} {
		if got := wrap(c.in, c.width, c.indent); !slices.Equal(got, c.want) {
			t.Errorf("wrap(%q, %d, %d) = %q, want %q", c.in, c.width, c.indent, got, c.want)
		}
	}
}

func TestSI(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0", 0.4: "0", 0.6: "1", 812: "812", 999.4: "999", 999.6: "1.00k", 1234: "1.23k", 9994: "9.99k", 9996: "10.0k",
		99949: "99.9k", 99951: "100k", 999499: "999k", 999501: "1.00M", 1.5e9: "1.50G", 1e30: ">999E", -1: "0",
	} {
		if got := si(n); got != want {
			t.Errorf("si(%v) = %q, want %q", n, got, want)
		}
	}
	for n, want := range map[float64]string{0: "0", 0.01: "0.1", 0.25: "0.2", 3.5: "3.5", 9.94: "9.9", 12.3: "12", 1e4: "10.0k"} {
		if got := few(n); got != want {
			t.Errorf("few(%v) = %q, want %q", n, got, want)
		}
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		250 * time.Microsecond: "250us", 1500 * time.Microsecond: "1.5ms", 12 * time.Millisecond: "12ms", 1200 * time.Millisecond: "1.2s", 200 * time.Second: "3m20s",
	} {
		if got := short(d); got != want {
			t.Errorf("short(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestGraph(t *testing.T) {
	for _, c := range []struct {
		values  []float64
		top     float64
		unicode bool
		want    string
	}{
		{[]float64{0, 1, 4, 8}, 0, true, " ▁▄█"},
		{[]float64{0, 1, 4, 8}, 16, true, " ▁▂▄"},
		{[]float64{0, 0.001, 8}, 0, false, " .#"},
		{[]float64{0, 0}, 0, true, "  "},
		{nil, 0, true, ""},
	} {
		if got := graph(c.values, c.top, c.unicode); got != c.want {
			t.Errorf("graph(%v, %v) = %q, want %q", c.values, c.top, got, c.want)
		}
	}
}

// Whatever is written, it is shown without control characters, in valid UTF-8 and within its width.
func FuzzClean(f *testing.F) {
	f.Add("\x1b[2J東\u0301\u202e", 3)
	f.Fuzz(func(t *testing.T, text string, width int) {
		width %= 1000
		for _, shown := range []bool{true, false} {
			got := clean(text, shown)
			if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }) {
				t.Fatalf("%q is shown as %q", text, got)
			}
			if clean(got, shown) != got {
				t.Fatalf("%q is not clean: %q", got, clean(got, shown))
			}
			if w := max(width, 0); textWidth(fit(got, width, false)) != w {
				t.Fatalf("fit(%q, %d) is %q", got, width, fit(got, width, false))
			}
			for _, line := range wrap(got, width, max(width, 0)/3) {
				if n := textWidth(line); n > max(width, 1)+1 {
					t.Fatalf("%q has %d columns of %d", line, n, width)
				}
			}
		}
	})
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Minute: "0s", 0: "0s", 59*time.Second + 999*time.Millisecond: "59s", time.Minute: "1m0s",
		time.Hour - 1: "59m59s", time.Hour: "1h0m", 24*time.Hour - 1: "23h59m", 50 * time.Hour: "2d2h",
	} {
		if got := Age(d); got != want {
			t.Errorf("age(%v) = %s, want %s", d, got, want)
		}
	}
}
