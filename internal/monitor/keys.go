package monitor

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Key is a key that was pressed: a rune, or one of those below, which are no runes.
type Key rune

// Keys that are no runes.
const (
	KeyUp Key = -1 - iota
	KeyDown
	KeyLeft
	KeyRight
	KeyPageUp
	KeyPageDown
	KeyHome
	KeyEnd
	KeyEscape
	KeyEnter
	KeyBackspace
	KeyInterrupt // Ctrl-C, Ctrl-\: in raw mode they are no signals
	KeySuspend   // Ctrl-Z
	KeyRedraw    // Ctrl-L
	keyNone
)

var controlKeys = map[byte]Key{
	'\r': KeyEnter, '\n': KeyEnter, 0x7f: KeyBackspace, 0x08: KeyBackspace, 0x03: KeyInterrupt, 0x1c: KeyInterrupt, 0x1a: KeySuspend, 0x0c: KeyRedraw,
}

// sequences has the keys by their escape sequence, without ESC, of xterm, the Linux console and rxvt.
var sequences = map[string]Key{
	"[A": KeyUp, "[B": KeyDown, "[C": KeyRight, "[D": KeyLeft, "OA": KeyUp, "OB": KeyDown, "OC": KeyRight, "OD": KeyLeft,
	"[H": KeyHome, "[F": KeyEnd, "OH": KeyHome, "OF": KeyEnd, "[1~": KeyHome, "[4~": KeyEnd, "[7~": KeyHome, "[8~": KeyEnd,
	"[5~": KeyPageUp, "[6~": KeyPageDown, "[3~": KeyBackspace, "OM": KeyEnter,
}

// ParseKeys returns the keys of what a terminal has sent, and how many bytes are the beginning of a key
// whose rest is still to come: with final there is no rest, and a lone ESC is the key.
func ParseKeys(b []byte, final bool) (keys []Key, rest int) {
	for len(b) > 0 {
		key, n := parseKey(b, final)
		if n == 0 {
			return keys, len(b)
		}
		if key != keyNone {
			keys = append(keys, key)
		}
		b = b[n:]
	}
	return keys, 0
}

// parseKey returns the first key and its length; 0 if it is not whole.
func parseKey(b []byte, final bool) (Key, int) {
	if key, ok := controlKeys[b[0]]; ok {
		return key, 1
	}
	if b[0] == 0x1b {
		return parseEscape(b, final)
	}
	if !utf8.FullRune(b) && !final {
		return 0, 0
	}
	r, n := utf8.DecodeRune(b)
	if r == utf8.RuneError || !unicode.IsPrint(r) {
		return keyNone, n
	}
	return Key(r), n
}

// maxSequence bounds an escape sequence, in bytes: input that is none must not be waited for.
const maxSequence = 32

// parseEscape is parseKey of what begins with ESC: CSI (ECMA-48, 5.4) and SS3 sequences, those that
// mean nothing here included, or the key itself.
func parseEscape(b []byte, final bool) (Key, int) {
	if len(b) == 1 {
		if final {
			return KeyEscape, 1
		}
		return 0, 0
	}
	end := 0
	switch b[1] {
	case 'O':
		end = 3
	case '[':
		i := 2
		for i < len(b) && i < maxSequence && b[i] >= 0x20 && b[i] <= 0x3f {
			i++
		}
		end = i + 1
	default: // the Escape key and then another, or a key with Alt
		return KeyEscape, 1
	}
	if end > len(b) {
		if final {
			return KeyEscape, len(b)
		}
		return 0, 0
	}
	if key, ok := sequences[string(b[1:end])]; ok {
		return key, end
	}
	return keyNone, end
}

// maxFilter is how many runes a filter has at most.
const maxFilter = 64

// edit returns the text of a line that is being typed, after one more key.
func edit(text string, key Key) string {
	switch {
	case key == KeyBackspace:
		_, n := utf8.DecodeLastRuneInString(text)
		return text[:len(text)-n]
	case key > 0 && utf8.RuneCountInString(text) < maxFilter:
		return text + string(rune(key))
	}
	return text
}

// matches reports whether the tunnel's name, comment, state or an address contains filter, in upper or lower case.
func (t *Tunnel) matches(filter string) bool {
	if filter == "" {
		return true
	}
	filter = strings.ToLower(filter)
	for _, text := range []string{t.Name, t.Interface, t.Comment, string(t.State), t.LocalAddress, t.RemoteAddress, t.WaitingFor} {
		if strings.Contains(strings.ToLower(text), filter) {
			return true
		}
	}
	return false
}
