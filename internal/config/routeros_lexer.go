package config

import (
	"bytes"
	"regexp"
	"sort"
	"strings"
	"unicode/utf8"
)

// command is one command of a RouterOS script. An export is such a script.
type command struct {
	pos Position
	// menu is absolute, with a blank between its words: "/interface ipip".
	menu string
	// verb is add, set, :if and so on, or "" if the line does not begin with a command. A comment
	// by which an export says that it is incomplete is a verb, too: its whole text.
	verb  string
	words []word
}

// word is an argument of a verb: key=value, !key, or a value without a key.
type word struct {
	pos        Position
	key, value string
	// unset: !key.
	unset bool
	// raw is the source of a value that only a router can evaluate: [ ], ( ), { }, a variable,
	// an unknown escape. Then value is empty.
	raw string
}

// verbs end the path of a menu. Another word ends it if an argument follows: /tool fetch url=….
var verbs = map[string]bool{
	"add": true, "set": true, "remove": true, "enable": true, "disable": true, "unset": true, "move": true, "edit": true,
	"find": true, "get": true, "print": true, "export": true, "import": true, "comment": true, "reset": true,
}

// maxMenuDepth is how many words the path of a menu can have. RouterOS has 5.
const maxMenuDepth = 8

// lexer splits a script into commands. Quotes do not span lines, braces do.
type lexer struct {
	file  string
	src   []byte // line ends are LF
	lines []int  // offsets of the beginnings of lines
	off   int    // of the next byte
	end   int    // offset after the last byte taken: peek may have moved off over a continuation
	// unclosed is the offset of the end of a line on which a bracket is not closed: before it, [ and ( are ordinary bytes.
	unclosed int
	// last is the position of the offset lastOff, the last that was asked for.
	last     Position
	lastOff  int
	failed   bool // the current command has an error
	menu     string
	commands []command
	errs     Errors
}

// scanRouterOS returns the commands of a script, and an error for each part of it that cannot be read as one.
func scanRouterOS(name string, data []byte) ([]command, Errors) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	l := lexer{file: name, src: bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n")), lines: []int{0}, menu: "/"}
	for i, c := range l.src {
		if c == '\n' {
			l.lines = append(l.lines, i+1)
		}
	}
	if i := bytes.IndexByte(l.src, 0); i >= 0 {
		l.fail(i, "a zero byte: want text in ASCII or UTF-8, not UTF-16 or a backup")
		return nil, l.errs
	}
	for l.off < len(l.src) {
		l.scanLine()
	}
	return l.commands, l.errs
}

func (l *lexer) position(off int) Position {
	line := sort.SearchInts(l.lines, off+1)
	from, column := l.lines[line-1], 1
	if l.last.Line == line && l.lastOff <= off { // a line may be as long as the file
		from, column = l.lastOff, l.last.Column
	}
	l.last, l.lastOff = Position{l.file, line, column + utf8.RuneCount(l.src[from:off])}, off
	return l.last
}

func (l *lexer) fail(off int, message string) {
	l.failed = true
	l.errs.add(l.position(off), "%s", message)
}

// scanLine reads a line, with those that continue it.
func (l *lexer) scanLine() {
	l.off = l.skipBlanks(l.off)
	if l.off == len(l.src) || l.src[l.off] != '#' {
		for l.command() {
		}
		return
	}
	// A backslash does not continue a comment.
	start := l.off
	l.off = start + len(l.src[start:])
	if i := bytes.IndexByte(l.src[start:], '\n'); i >= 0 {
		l.off = start + i + 1
	}
	comment := strings.TrimSpace(string(l.src[start:l.off]))
	if strings.HasPrefix(comment, "#error exporting") || comment == "#interrupted" {
		l.commands = append(l.commands, command{pos: l.position(start), menu: l.menu, verb: comment})
	}
}

// command reads one command, and returns whether there may be another on the line.
func (l *lexer) command() (more bool) {
	l.failed = false
	var words []word
	for {
		switch c := l.peek(); {
		case isBlank(c):
			l.off++
		case endsCommand(c):
			if c != 0 {
				l.off++
			}
			if len(words) > 0 && !l.failed {
				l.resolve(words)
			}
			return c == ';'
		default:
			words = append(words, l.word())
		}
	}
}

// resolve finds the menu and the verb of a command. A path alone changes the menu for the lines below it;
// one in front of a command does not.
func (l *lexer) resolve(words []word) {
	var path []string
	if first := words[0].value; !strings.HasPrefix(first, "/") && !namesMenu(words) && l.menu != "/" {
		path = strings.Fields(l.menu[1:])
	}
	inherited := len(path)
	c := command{pos: words[0].pos}
	done := false
	for !done && len(words) > 0 && isPath(words[0]) {
		for _, part := range strings.FieldsFunc(words[0].value, func(c rune) bool { return c == '/' }) {
			switch {
			case done: // add/name: no menu is below a verb
			case part == "..":
				path = path[:max(0, len(path)-1)]
				inherited = min(inherited, len(path))
			case verbs[part] || part[0] == ':':
				c.verb, done = part, true
			default:
				path = append(path, part)
			}
		}
		words = words[1:]
	}
	if !done && len(words) > 0 && len(path) > inherited {
		c.verb, path = path[len(path)-1], path[:len(path)-1]
	}
	c.menu, c.words = "/"+strings.Join(path, " "), words
	switch {
	case len(path) > maxMenuDepth:
		l.errs.add(c.pos, "not a menu of RouterOS: want a path of %d words at most, or a / in front", maxMenuDepth)
	case c.verb == "" && len(words) == 0:
		l.menu = c.menu
	default:
		l.commands = append(l.commands, c)
	}
}

// namesMenu reports whether words begin with the path of a menu that is read, without its first slash.
func namesMenu(words []word) bool {
	var path []string
	for _, w := range words[:min(2, len(words))] {
		if !isPath(w) {
			break
		}
		path = append(path, strings.Split(w.value, "/")...)
	}
	return len(path) > 1 && isRead("/"+path[0]+" "+path[1])
}

// pathWord matches part of a menu's path, which may end in a verb, or a script's verb, such as :if.
var pathWord = regexp.MustCompile(`^(\.\.|:[A-Za-z]+|[A-Za-z0-9/-]+)$`)

func isPath(w word) bool { return w.key == "" && w.raw == "" && pathWord.MatchString(w.value) }

// word reads a word; the next byte begins one.
func (l *lexer) word() word {
	start := l.off
	w := word{pos: l.position(start)}
	var text []byte
	if l.peek() == '!' {
		text = append(text, l.take())
	}
	for isKey(l.peek()) {
		text = append(text, l.take())
	}
	key := strings.TrimPrefix(string(text), "!")
	switch c := l.peek(); {
	case c == '=' && key != "" && text[0] != '!':
		l.take()
		w.key = key
		l.peek() // a continuation may be in front of the value
		l.value(&w, l.off, nil)
	case (endsCommand(c) || isBlank(c)) && key != "" && text[0] == '!':
		w.key, w.unset = key, true
	default:
		l.value(&w, start, text)
	}
	return w
}

// value reads the value of w, whose source begins at start; text is the part of it that has been read.
func (l *lexer) value(w *word, start int, text []byte) {
	known, block := true, false
	for {
		switch c := l.peek(); {
		case endsCommand(c) || isBlank(c):
			if known {
				w.value = string(text)
				return
			}
			w.raw = string(l.src[start:l.end])
			if !block && !l.failed && (w.raw[0] == '[' || w.raw[0] == '(') {
				l.fail(start, "an expression that is not closed on its line: want as many ] as [, and ) as (")
			}
			return
		case c == '"':
			text, known = l.quoted(text, known)
		case l.off == start && l.block(c):
			known, block = false, true
		default:
			text, known = l.char(text, known)
		}
	}
}

// quoted appends the text between quotes.
func (l *lexer) quoted(text []byte, known bool) ([]byte, bool) {
	open := l.off
	l.take()
	for {
		switch c := l.peek(); c {
		case '"':
			l.take()
			return text, known
		case 0, '\n':
			if !l.failed {
				l.fail(open, `a quoted value that is not closed on its line: want a second ", or \" for a quote inside it`)
			}
			return text, false
		default:
			text, known = l.char(text, known)
		}
	}
}

// char appends a byte, or the one that an escape stands for. It returns known, or false if only a router knows the byte.
func (l *lexer) char(text []byte, known bool) ([]byte, bool) {
	c := l.take()
	switch c {
	case '$':
		if next := l.peek(); isKey(next) && next != '.' && next != '-' || next == '(' || next == '[' {
			known = false
		}
	case '\\':
		c = l.take()
		const escapes, meanings = `"\$?_nrtabfv`, "\"\\$? \n\r\t\a\b\f\v"
		if i := strings.IndexByte(escapes, c); i >= 0 {
			c = meanings[i]
		} else if high, ok := hex(c); ok && l.off < len(l.src) {
			low, ok := hex(l.src[l.off])
			if !ok {
				return text, false
			}
			l.take()
			c = high<<4 | low
		} else {
			known = false
		}
	}
	return append(text, c), known
}

// block takes an expression in brackets if one begins here: [ ] and ( ) on one line, { } on any number.
func (l *lexer) block(c byte) bool {
	if c != '{' && (c != '[' && c != '(' || l.off < l.unclosed) {
		return false
	}
	end, ok := l.blockEnd()
	switch {
	case ok:
		l.off, l.end = end, end
	case c == '{':
		l.fail(l.off, "a block that is not closed: want as many } as {")
		l.off, l.end = len(l.src), len(l.src)
	default:
		l.unclosed = end
		return false
	}
	return true
}

// blockEnd returns the offset after the bracket that closes the next one; if !ok, where the search ended without it.
func (l *lexer) blockEnd() (end int, ok bool) {
	var closing []byte // the brackets that are still to come, the innermost last
	quoted := false
	for i := l.off; i < len(l.src); i++ {
		switch c := l.src[i]; {
		case c == '\\':
			i = l.skipBlanks(i + 1)
		case c == '\n':
			if closing[0] != '}' {
				return i, false
			}
			if next := l.skipBlanks(i + 1); !quoted && next < len(l.src) && l.src[next] == '#' {
				comment := bytes.IndexByte(l.src[next:], '\n')
				if comment < 0 {
					return len(l.src), false
				}
				i = next + comment - 1
			}
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '[':
			closing = append(closing, ']')
		case c == '(':
			closing = append(closing, ')')
		case c == '{':
			closing = append(closing, '}')
		case c == closing[len(closing)-1]:
			closing = closing[:len(closing)-1]
			if len(closing) == 0 {
				return i + 1, true
			}
		}
	}
	return len(l.src), false
}

// peek returns the next byte, or 0 at the end. It passes over continuations: a backslash, the end of the line,
// and the blanks that begin the next line. A blank there that belongs to the value is written \_.
func (l *lexer) peek() byte {
	for l.off < len(l.src) && l.src[l.off] == '\\' {
		end := l.skipBlanks(l.off + 1)
		if end < len(l.src) && l.src[end] != '\n' {
			break // an escape
		}
		next := l.skipBlanks(min(end+1, len(l.src)))
		if next == len(l.src) {
			l.fail(l.off, "file ends inside a continued line")
		}
		l.off = next
	}
	if l.off == len(l.src) {
		return 0
	}
	return l.src[l.off]
}

// take returns the next byte, and moves past it. The caller has called peek.
func (l *lexer) take() byte {
	c := l.src[l.off]
	l.off++
	l.end = l.off
	return c
}

func (l *lexer) skipBlanks(off int) int {
	for off < len(l.src) && isBlank(l.src[off]) {
		off++
	}
	return off
}

func isBlank(c byte) bool     { return c == ' ' || c == '\t' || c == '\r' }
func endsCommand(c byte) bool { return c == 0 || c == '\n' || c == ';' }

// isKey reports whether c can be part of a property's name.
func isKey(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
}

// hex returns the value of a hexadecimal digit of an escape: RouterOS writes capitals, since \a and \b are other escapes.
func hex(c byte) (byte, bool) {
	i := strings.IndexByte("0123456789ABCDEF", c)
	return byte(i), i >= 0
}
