package monitor

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// wide are the runes that take two columns of a terminal: those of Unicode's East Asian Width W and F,
// in ranges that include what is not assigned.
var wide = &unicode.RangeTable{
	R16: []unicode.Range16{
		{0x1100, 0x115f, 1}, {0x231a, 0x231b, 1}, {0x2329, 0x232a, 1}, {0x23e9, 0x23ec, 1}, {0x23f0, 0x23f0, 1},
		{0x23f3, 0x23f3, 1}, {0x25fd, 0x25fe, 1}, {0x2614, 0x2615, 1}, {0x2648, 0x2653, 1}, {0x267f, 0x267f, 1},
		{0x2693, 0x2693, 1}, {0x26a1, 0x26a1, 1}, {0x26aa, 0x26ab, 1}, {0x26bd, 0x26be, 1}, {0x26c4, 0x26c5, 1},
		{0x26ce, 0x26ce, 1}, {0x26d4, 0x26d4, 1}, {0x26ea, 0x26ea, 1}, {0x26f2, 0x26f3, 1}, {0x26f5, 0x26f5, 1},
		{0x26fa, 0x26fa, 1}, {0x26fd, 0x26fd, 1}, {0x2705, 0x2705, 1}, {0x270a, 0x270b, 1}, {0x2728, 0x2728, 1},
		{0x274c, 0x274c, 1}, {0x274e, 0x274e, 1}, {0x2753, 0x2755, 1}, {0x2757, 0x2757, 1}, {0x2795, 0x2797, 1},
		{0x27b0, 0x27b0, 1}, {0x27bf, 0x27bf, 1}, {0x2b1b, 0x2b1c, 1}, {0x2b50, 0x2b50, 1}, {0x2b55, 0x2b55, 1},
		{0x2e80, 0x303e, 1}, {0x3041, 0x4dbf, 1}, {0x4e00, 0xa4cf, 1}, {0xa960, 0xa97f, 1}, {0xac00, 0xd7a3, 1},
		{0xf900, 0xfaff, 1}, {0xfe10, 0xfe19, 1}, {0xfe30, 0xfe6f, 1}, {0xff00, 0xff60, 1}, {0xffe0, 0xffe6, 1},
	},
	R32: []unicode.Range32{
		{0x16fe0, 0x18aff, 1}, {0x1aff0, 0x1b2ff, 1}, {0x1f004, 0x1f004, 1}, {0x1f0cf, 0x1f0cf, 1}, {0x1f18e, 0x1f18e, 1},
		{0x1f191, 0x1f19a, 1}, {0x1f1e6, 0x1f320, 1}, {0x1f32d, 0x1f64f, 1}, {0x1f680, 0x1f6ff, 1}, {0x1f7e0, 0x1f7f0, 1},
		{0x1f900, 0x1faff, 1}, {0x20000, 0x3fffd, 1},
	},
}

// marks is how many combining marks a character may have: more of them would cover other lines.
const marks = 2

// clean returns what can be shown of a text that an operator or a peer wrote: on one line, without
// control characters, so without escape sequences, and without characters that turn the direction of
// text. Unless utf8Shown is set, characters beyond ASCII become "?".
func clean(text string, utf8Shown bool) string {
	n := 0
	return strings.Map(func(r rune) rune {
		switch {
		case r < utf8.RuneSelf && unicode.IsPrint(r):
			n = 0
			return r
		case r == '\t' || r == '\n':
			return ' '
		case !utf8Shown, r == utf8.RuneError, unicode.IsControl(r), r == '\u2028', r == '\u2029':
			return '?'
		case unicode.In(r, unicode.Mn, unicode.Me):
			if n++; n > marks {
				return -1
			}
			return r
		case !unicode.IsPrint(r): // formats (bidi, joiners), private use, not assigned, other blanks
			if unicode.Is(unicode.Zs, r) {
				return ' '
			}
			return -1
		}
		n = 0
		return r
	}, text)
}

// runeWidth returns how many columns a rune of a clean text takes.
func runeWidth(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me), r >= 0x1160 && r <= 0x11ff: // jamo that complete a syllable
		return 0
	case unicode.Is(wide, r):
		return 2
	}
	return 1
}

// textWidth returns how many columns a clean text takes.
func textWidth(s string) (n int) {
	for _, r := range s {
		n += runeWidth(r)
	}
	return n
}

// cut returns the beginning of a clean text that fits width, and how many columns it takes.
func cut(s string, width int) (string, int) {
	n := 0
	for i, r := range s {
		w := runeWidth(r)
		if n+w > width {
			return s[:i], n
		}
		n += w
	}
	return s, n
}

// fit returns a clean text in exactly width columns: cut, with a mark, or padded with blanks, on the
// left if right is set.
func fit(s string, width int, right bool) string {
	part, n := cut(s, width)
	if len(part) < len(s) && width > 1 {
		part, n = cut(s, width-1)
		part, n = part+"~", n+1
	}
	blanks := strings.Repeat(" ", max(0, width-n))
	if right {
		return blanks + part
	}
	return part + blanks
}

// wrap breaks a clean text into lines of width columns, at blanks where there are any. All but the first
// begin with indent blanks.
func wrap(s string, width, indent int) (lines []string) {
	width = max(width, 1)
	if indent > width/2 {
		indent = min(2, width/2)
	}
	prefix := ""
	for {
		room := max(1, width-len(prefix))
		part, _ := cut(s, room)
		if part == "" && s != "" { // a wide rune in one column
			_, size := utf8.DecodeRuneInString(s)
			part = s[:size]
		}
		if len(part) == len(s) {
			return append(lines, prefix+s)
		}
		if at := strings.LastIndexByte(part, ' '); at > 0 && s[len(part)] != ' ' && strings.TrimSpace(part[:at]) != "" {
			part = part[:at]
		}
		lines = append(lines, strings.TrimRight(prefix+part, " "))
		s = strings.TrimLeft(s[len(part):], " ")
		if s == "" {
			return lines
		}
		prefix = strings.Repeat(" ", indent)
	}
}

// si formats a number with three digits and the prefix of a unit in five columns at most: 999, 1.23k, 45.6M.
func si(n float64) string {
	if !(n >= 0.5) {
		return "0"
	}
	if n < 999.5 {
		return fmt.Sprintf("%.0f", n)
	}
	for _, unit := range "kMGTPE" {
		n /= 1000
		switch {
		case n < 9.995:
			return fmt.Sprintf("%.2f%c", n, unit)
		case n < 99.95:
			return fmt.Sprintf("%.1f%c", n, unit)
		case n < 999.5:
			return fmt.Sprintf("%.0f%c", n, unit)
		}
	}
	return ">999E"
}

// few formats a number of which fractions matter: 0.2, 3.5, 12.
func few(n float64) string {
	if n > 0 && n < 9.95 {
		return fmt.Sprintf("%.1f", max(n, 0.1))
	}
	return si(n)
}

// Age formats a time in its two largest units, 3m20s; 0s if it is negative (clock set back).
func Age(d time.Duration) string {
	s := max(int64(d/time.Second), 0)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 60*60:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	case s < 24*60*60:
		return fmt.Sprintf("%dh%dm", s/60/60, s/60%60)
	}
	return fmt.Sprintf("%dd%dh", s/60/60/24, s/60/60%24)
}

// short formats a time to five columns: 250us, 12ms, 1.2s.
func short(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%dus", d/time.Microsecond)
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1fms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%dms", d/time.Millisecond)
	case d < 100*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return Age(d)
}

// The bars of a graph, from the lowest to the highest.
var (
	unicodeBars = []rune(" ▁▂▃▄▅▆▇█")
	asciiBars   = []rune(" .:-=+*%#")
)

// graph draws a bar for each value. The highest bar stands for the largest value, or for top if that is more.
func graph(values []float64, top float64, utf8Shown bool) string {
	bars := asciiBars
	if utf8Shown {
		bars = unicodeBars
	}
	for _, v := range values {
		top = max(top, v)
	}
	var b strings.Builder
	for _, v := range values {
		level := 0
		if v > 0 {
			level = min(len(bars)-1, max(1, int(math.Ceil(v/top*float64(len(bars)-1)))))
		}
		b.WriteRune(bars[level])
	}
	return b.String()
}
