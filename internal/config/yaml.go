package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"

	"ipipd/internal/tunnel"
)

const (
	// maxDepth is the nesting that is accepted, in blocks and in brackets each: a file needs 4.
	maxDepth = 8
	// maxValue is the length in bytes of the longest value, a secret.
	maxValue = 4096
)

const (
	tunnelsKey  = "tunnels"
	defaultsKey = "defaults"
)

// parseYAML reads the nodes of a YAML document, which have no type but scalar, list and mapping.
// The File is nil if it is no such document.
func parseYAML(name string, data []byte) (*File, Errors) {
	r := &yamlReader{name: name, lines: bytes.Split(data, []byte("\n"))}
	if root := r.document(data); root != nil {
		return r.file(root), r.errs
	}
	return nil, r.errs
}

// yamlReader walks through the nodes of one document.
type yamlReader struct {
	name  string
	lines [][]byte
	errs  Errors
}

// at returns a position, or the end of the file if that is beyond it: for YAML an empty line follows
// the last LF.
func (r *yamlReader) at(line, column int) Position {
	last := len(r.lines)
	if line > last {
		return Position{r.name, last, utf8.RuneCount(r.lines[last-1]) + 1}
	}
	return Position{r.name, max(line, 1), max(column, 1)}
}

func (r *yamlReader) position(n *yaml.Node) Position { return r.at(n.Line, n.Column) }

func (r *yamlReader) add(n *yaml.Node, format string, args ...any) {
	r.errs.add(r.position(n), format, args...)
}

// document returns the root of the only document in data, or nil and an error.
func (r *yamlReader) document(data []byte) *yaml.Node {
	if !r.isText(data) {
		return nil
	}
	limits := loaderlimits.New(loaderlimits.DepthFunc(func(depth int, _ *loaderlimits.DepthContext) error {
		if depth > maxDepth {
			return errTooDeep
		}
		return nil
	}))
	loader, err := yaml.NewLoader(bytes.NewReader(data), yaml.WithPlugin(limits))
	if err != nil {
		panic(err) // the options are constants
	}
	var first, second yaml.Node
	switch err := loader.Load(&first); {
	case err == io.EOF:
		r.errs.add(r.at(1, 1), "an empty file: want %s: and a list", tunnelsKey)
		return nil
	case err != nil:
		r.syntax(data, err)
		return nil
	}
	switch err := loader.Load(&second); {
	case err == nil:
		r.add(&second, "a second document: want one, and its tunnels in the first or in another file")
		return nil
	case err != io.EOF:
		r.syntax(data, err)
		return nil
	}
	return first.Content[0]
}

var errTooDeep = fmt.Errorf("more than %d levels of nesting", maxDepth)

// syntax adds an error of the YAML library. Some of its messages quote the file, where a secret
// may be: an anchor, an alias and a tag begin like text that should have been quoted.
func (r *yamlReader) syntax(data []byte, err error) {
	var e *yaml.LoadError
	if !errors.As(err, &e) {
		r.errs.add(r.at(1, 1), "not YAML")
		return
	}
	pos := r.at(e.Mark.Line, e.Mark.Column)
	line := r.lines[pos.Line-1]
	indent := line[:len(line)-len(bytes.TrimLeft(line, " \t"))]
	json := bytes.HasPrefix(bytes.TrimLeft(data, "\ufeff \t\r\n"), []byte("{"))
	switch tab := bytes.IndexByte(indent, '\t'); {
	case tab >= 0 && !json:
		pos.Column = tab + 1
		r.errs.add(pos, "a tab in the indentation: want spaces")
	case strings.Contains(e.Message, "anchor"):
		r.errs.add(pos, "%s", wantNoAlias)
	case strings.Contains(e.Message+e.ContextMsg, "tag"):
		r.errs.add(pos, "%s", wantNoTag)
	case strings.Contains(e.Message, errTooDeep.Error()):
		r.errs.add(pos, "%v: want %s: and a list of mappings", errTooDeep, tunnelsKey)
	default:
		message := "not YAML: " + e.Message
		if e.ContextMsg != "" {
			message += " " + e.ContextMsg
			if e.ContextMark.Line > 0 && e.ContextMark.Line < pos.Line {
				message += fmt.Sprintf(" that begins in line %d", e.ContextMark.Line)
			}
		}
		r.errs.add(pos, "%s", message)
	}
}

// isText reports whether data is UTF-8 that every reader breaks into the same lines: YAML also
// takes U+0085, U+2028 and a lone CR for line ends, editors do not. It adds an error about the
// first character that is not.
func (r *yamlReader) isText(data []byte) bool {
	pos := r.at(1, 1)
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		switch {
		case c == utf8.RuneError && size == 1:
			r.errs.add(pos, "not UTF-8: want the file in UTF-8")
			return false
		case c == '\n':
			pos.Line, pos.Column = pos.Line+1, 0
		case c == '\r' && bytes.HasPrefix(data[i+size:], []byte("\n")), c == '\t', c == '\ufeff' && i == 0:
		case c < ' ', c >= 0x7f && c < 0xa0, slices.Contains([]rune{'\u2028', '\u2029', '\ufeff', '\ufffe', '\uffff'}, c):
			r.errs.add(pos, "control character U+%04X: want text, or an escape in double quotes", c)
			return false
		}
		if i += size; c != '\ufeff' {
			pos.Column++
		}
	}
	return true
}

// fileKeys are the keys of a file.
var fileKeys = func() (keys []string) {
	for _, p := range processProperties {
		keys = append(keys, p.Name)
	}
	return append(keys, defaultsKey, tunnelsKey)
}()

// file reads the root mapping.
func (r *yamlReader) file(root *yaml.Node) *File {
	f := &File{}
	found := false
	complete := r.mapping(root, "a file", fileKeys, func(key string, value *yaml.Node) {
		switch key {
		case tunnelsKey:
			found = true
			f.Tunnels = r.tunnels(value)
		case defaultsKey:
			r.mapping(value, defaultsKey, tunnelKeys[1:], func(key string, value *yaml.Node) {
				f.Defaults = append(f.Defaults, r.settings(key, value)...)
			})
		default:
			f.Process = append(f.Process, r.settings(key, value)...)
		}
	})
	if complete && !found {
		r.add(root, "%s: missing: want a list of tunnels, [] for none", tunnelsKey)
	}
	return f
}

// tunnelKeys are the keys of a tunnel; defaults have all but the first, name.
var tunnelKeys = func() (keys []string) {
	for _, p := range tunnel.Properties() {
		keys = append(keys, p.Name)
	}
	return append(keys, DisabledKey)
}()

func (r *yamlReader) tunnels(n *yaml.Node) (tunnels []Tunnel) {
	if !r.ordinary(n) {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		r.add(n, "%s: want a list of tunnels, [] for none", tunnelsKey)
		return nil
	}
	for _, item := range n.Content {
		t := Tunnel{Pos: r.position(item)}
		t.incomplete = !r.mapping(item, "a tunnel", tunnelKeys, func(key string, value *yaml.Node) {
			t.Settings = append(t.Settings, r.settings(key, value)...)
		})
		if !t.incomplete && find(t.Settings, "name", "") == nil {
			r.add(item, "name: missing: want one, by which a reload finds the tunnel")
		}
		if !t.incomplete || len(t.Settings) > 0 {
			tunnels = append(tunnels, t)
		}
	}
	return tunnels
}

// mapping calls f for the first occurrence of each of keys in the mapping n, and reports whether
// neither it nor f has added an error. what names n in errors.
func (r *yamlReader) mapping(n *yaml.Node, what string, keys []string, f func(key string, value *yaml.Node)) (complete bool) {
	if !r.ordinary(n) {
		return false
	}
	if n.Kind != yaml.MappingNode {
		r.add(n, "want a mapping, key: value, for %s", what)
		return false
	}
	before := len(r.errs)
	first := map[string]*yaml.Node{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		other, twice := first[key.Value]
		switch {
		case key.ShortTag() == "!!merge":
			r.add(key, "a merge key, <<: want each key written out, or what is common in %s", defaultsKey)
		case !r.ordinary(key):
		case key.Kind != yaml.ScalarNode:
			r.add(key, "a list or mapping as a key: want one of %s", strings.Join(keys, ", "))
		case !slices.Contains(keys, key.Value):
			// The key may be part of a secret: in braces one without quotes ends at a comma, and the rest is a key.
			flow := n.Style&yaml.FlowStyle != 0
			r.unknown(key, what, keys, value.ShortTag() == "!!null" || flow && first["ipsec-secret"] != nil)
		case twice:
			r.add(key, "%s: twice: want it once; line %d has it", key.Value, other.Line)
		default:
			first[key.Value] = key
			f(key.Value, value)
		}
	}
	return len(r.errs) == before
}

// unknown adds an error about a key that is none of keys, and shows it unless it is to be hidden.
func (r *yamlReader) unknown(key *yaml.Node, what string, keys []string, hidden bool) {
	word := key.Value
	end := strings.IndexFunc(word, func(c rune) bool {
		return c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z')
	})
	if end >= 0 && slices.Contains(keys, word[:end]) { // name=ipip1, which may be ipsec-secret=...
		r.add(key, "%s: no value: want a colon and a space behind the key", word[:end])
		return
	}
	shown, near := "", ""
	if end < 0 && len(word) <= 40 {
		near = Suggest(word, keys)
		if !hidden {
			shown = fmt.Sprintf(" %q", word)
		}
	}
	switch {
	case near != "":
		r.add(key, "unknown key%s: did you mean %s?", shown, near)
	case word == "name":
		r.add(key, "unknown key%s in %s: want one in each tunnel", shown, what)
	case slices.Contains(fileKeys, word):
		r.add(key, "unknown key%s in %s: want it at the top of the file", shown, what)
	case slices.Contains(tunnelKeys, word):
		r.add(key, "unknown key%s in %s: want it in a tunnel or in %s", shown, what, defaultsKey)
	default:
		r.add(key, "unknown key%s in %s: want one of %s", shown, what, strings.Join(keys, ", "))
	}
}

// settings returns the Settings of a property that value has.
func (r *yamlReader) settings(key string, value *yaml.Node) (settings []Setting) {
	if !r.ordinary(value) {
		return nil
	}
	repeatable := properties[key].Repeatable
	values := []*yaml.Node{value}
	if repeatable && value.Kind == yaml.SequenceNode {
		if values = value.Content; len(values) == 0 {
			return []Setting{{key, "", r.position(value)}}
		}
	}
	for _, n := range values {
		switch {
		case n.Kind == yaml.MappingNode && properties[key].Mapping && r.ordinary(n):
			settings = append(settings, r.pairs(key, n)...)
		case !r.ordinary(n):
		case n.Kind != yaml.ScalarNode:
			r.add(n, "%s: a list or mapping: want one value", key)
		case len(n.Value) > maxValue:
			r.add(n, "%s: a value of more than %d bytes", key, maxValue)
		case n.Value == "" && repeatable: // as a Setting it would be an empty list
			r.add(n, "%v", properties[key].Set(new(tunnel.Config), ""))
		default:
			settings = append(settings, Setting{key, n.Value, r.position(n)})
		}
	}
	return settings
}

// pairs returns the Settings of a mapping, each with a Value key=value.
func (r *yamlReader) pairs(key string, n *yaml.Node) (settings []Setting) {
	if len(n.Content) == 0 {
		return []Setting{{key, "", r.position(n)}}
	}
	for i := 0; i < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		switch {
		case !r.ordinary(name), !r.ordinary(value):
		case name.Kind != yaml.ScalarNode, value.Kind != yaml.ScalarNode:
			r.add(value, "%s: a list or mapping: want one value", key)
		case len(name.Value)+len(value.Value) > maxValue:
			r.add(value, "%s: a value of more than %d bytes", key, maxValue)
		default:
			settings = append(settings, Setting{key, name.Value + "=" + value.Value, r.position(name)})
		}
	}
	return settings
}

const (
	wantNoAlias = "an anchor or alias: want the value itself, in quotes if it begins with & or *"
	wantNoTag   = "a tag: want the value alone, in quotes if it begins with !"
)

// ordinary reports whether n is no alias, and has neither anchor nor tag. It adds an error if not.
func (r *yamlReader) ordinary(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode, n.Anchor != "":
		r.add(n, "%s", wantNoAlias)
	case n.Style&yaml.TaggedStyle != 0, n.Tag == "!":
		r.add(n, "%s", wantNoTag)
	default:
		return true
	}
	return false
}
