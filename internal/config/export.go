package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"ipipd/internal/tunnel"
)

// Entry is a tunnel that is to be written to a file.
type Entry struct {
	Config tunnel.Config
	// HideSecret leaves ipsec-secret out, so that a file with this tunnel is refused until somebody
	// has put it in again: the tunnel does not come up in the clear.
	HideSecret bool
}

// settings returns the settings that are not the default, in the notation of print, secrets in full.
func (e *Entry) settings() (settings []Setting) {
	defaults := tunnel.Default()
	defaults.IPsec = e.Config.IPsec // the default of allow-fast-path depends on it
	plain := tunnel.Default()
	for _, p := range tunnel.Properties() {
		value, base := p.Get(&e.Config), p.Get(&defaults)
		if strings.HasPrefix(p.Name, "ipsec-") {
			base = p.Get(&plain)
		}
		switch {
		case value == base:
			continue
		case p.Secret:
			value = string(e.Config.IPsec.Secret)
		case p.Repeatable:
			for v := range strings.SplitSeq(value, ",") {
				settings = append(settings, Setting{Property: p.Name, Value: v})
			}
			continue
		}
		settings = append(settings, Setting{Property: p.Name, Value: value})
	}
	return settings
}

// hides reports whether the secret of e is left out.
func (e *Entry) hides() bool { return e.HideSecret && len(e.Config.IPsec.Secret) > 0 }

// settings returns the settings that are not the default.
func (p *Process) settings() (settings []Setting) {
	defaults := DefaultProcess()
	for _, property := range processProperties {
		if v := property.Get(p); v != property.Get(&defaults) {
			settings = append(settings, Setting{Property: property.Name, Value: v})
		}
	}
	return settings
}

// WriteYAML writes a file from which Read gives the same settings and tunnels.
func WriteYAML(w io.Writer, process Process, entries []Entry) error {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for _, s := range process.settings() {
		if !utf8.ValidString(s.Value) {
			return &tunnel.ValueError{Property: s.Property, Value: s.Value, Want: "UTF-8, to be written as YAML"}
		}
		value := text(s.Value)
		if s.Property != RuntimeDir.Name {
			value = unquoted(s.Value)
		}
		root.Content = append(root.Content, text(s.Property), value)
	}
	list := &yaml.Node{Kind: yaml.SequenceNode}
	if len(entries) == 0 {
		list.Style = yaml.FlowStyle
	}
	for i := range entries {
		one, err := entries[i].yaml()
		if err != nil {
			return &tunnel.TunnelError{Name: entries[i].Config.Name, Err: err}
		}
		list.Content = append(list.Content, one)
	}
	root.Content = append(root.Content, text(tunnelsKey), list)
	written, err := yaml.Dump(root, yaml.WithLineWidth(-1), yaml.WithQuotePreference(yaml.QuoteLegacy))
	if err != nil {
		return err
	}
	_, err = w.Write(written)
	return err
}

func (e *Entry) yaml() (*yaml.Node, error) {
	m := &yaml.Node{Kind: yaml.MappingNode}
	for _, s := range e.settings() {
		p := properties[s.Property]
		value := scalarNode(p.Values, s.Value)
		switch {
		case p.Secret && e.hides():
			value = &yaml.Node{Kind: yaml.ScalarNode, Style: yaml.DoubleQuotedStyle, LineComment: "# " + hidden}
		case p.Secret && !utf8.ValidString(s.Value): // as a router's may be
			return nil, &tunnel.ValueError{Property: s.Property, Hidden: true, Want: "a secret in UTF-8, to be written as YAML: rsc can have this one"}
		case !utf8.ValidString(s.Value):
			return nil, &tunnel.ValueError{Property: s.Property, Value: s.Value, Want: "UTF-8, to be written as YAML"}
		case p.Repeatable:
			if last := len(m.Content) - 2; last < 0 || m.Content[last].Value != s.Property {
				m.Content = append(m.Content, text(s.Property), &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle})
			}
			values := m.Content[len(m.Content)-1]
			values.Content = append(values.Content, value)
			continue
		}
		m.Content = append(m.Content, text(s.Property), value)
	}
	if e.Config.Disabled {
		m.Content = append(m.Content, text(DisabledKey), unquoted("yes"))
	}
	return m, nil
}

// hidden is the comment in place of a secret that is left out.
const hidden = "left out: put it in here"

// text returns a scalar that every reader of YAML takes for a string: in quotes if it looks like something else.
func text(s string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
	boolean := []string{"y", "n", "yes", "no", "on", "off"} // of YAML 1.1
	if slices.Contains(boolean, strings.ToLower(s)) || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

// unquoted returns a scalar without quotes, for a value without YAML's special characters.
func unquoted(s string) *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Value: s} }

// scalarNode returns the scalar for a value of a property with those Values: a word such as no stays without quotes.
func scalarNode(values, s string) *yaml.Node {
	if slices.Contains([]string{"text", "file", "interface"}, values) || strings.HasSuffix(values, "or text") {
		return text(s)
	}
	return unquoted(s)
}

// WriteRouterOS writes a script of RouterOS from which Read gives the same tunnels. It returns what a script
// cannot express, a line for the process and for each tunnel; these are comments at the script's top, too.
func WriteRouterOS(w io.Writer, process Process, entries []Entry) (unsaid []string, err error) {
	var tunnels, addresses, routes []string
	if settings := process.settings(); len(settings) > 0 {
		line := "the process: not in RouterOS:"
		for _, s := range settings {
			line += " " + s.Property + "=" + quote(s.Value)
		}
		unsaid = append(unsaid, line)
	}
	for i := range entries {
		e := &entries[i]
		c := &e.Config
		if c.RemoteAddress == tunnel.AnyRemote {
			unsaid = append(unsaid, c.Name+": left out: not in RouterOS: an interface with many remotes, remote-address=any")
			continue
		}
		of := e.unsaid()
		name := quote(c.Name)
		for _, a := range c.Addresses {
			address, network := a.Prefix.String(), a.Prefix.Masked().Addr()
			if a.Peer.IsValid() {
				address, network = a.Prefix.Addr().String(), a.Peer
			}
			addresses = append(addresses, fmt.Sprintf("add address=%s interface=%s network=%s", address, name, network))
		}
		for _, r := range c.Routes {
			line := "add "
			switch {
			case r.Metric == 1: // which an export leaves out
				of = append(of, fmt.Sprintf("route=%q", r), "(its distance is 1 without one)")
			case r.Metric > 255:
				of = append(of, fmt.Sprintf("route=%q", r), "(its distance is 255 at most)")
				fallthrough
			case r.Metric > 0:
				line += fmt.Sprintf("distance=%d ", r.Metric)
			}
			line += fmt.Sprintf("dst-address=%s gateway=%s", r.Prefix, name)
			if r.Table != 0 {
				line += fmt.Sprintf(" routing-table=%d", r.Table)
			}
			routes = append(routes, line)
		}
		if len(of) > 0 {
			unsaid = append(unsaid, fmt.Sprintf("%s: not in RouterOS: %s", c.Name, strings.Join(of, " ")))
		}
		tunnels = append(tunnels, e.routerOS())
	}
	var b strings.Builder
	menu := func(path string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(&b, "%s\n%s\n", path, strings.Join(lines, "\n"))
		}
	}
	for _, line := range unsaid {
		b.WriteString("# " + line + "\n")
	}
	menu(menuTunnel, tunnels)
	menu(menuAddress, addresses)
	menu(menuRoute, routes)
	_, err = io.WriteString(w, b.String())
	return unsaid, err
}

// unsaid returns the settings that RouterOS has no property for.
func (e *Entry) unsaid() (unsaid []string) {
	for _, s := range e.settings() {
		switch {
		case s.Property == "ipsec-secret" && e.hides():
			unsaid = append(unsaid, s.Property+" (left out)")
		case s.Property == "ipsec-secret-file":
			unsaid = append(unsaid, fmt.Sprintf("%s=%q (ipsec-secret has to be what is in it)", s.Property, s.Value))
		case !slices.Contains(tunnelProperties, s.Property) && !properties[s.Property].Repeatable:
			unsaid = append(unsaid, s.Property+"="+quote(s.Value))
		}
	}
	return unsaid
}

// routerOS returns the command that adds the tunnel, its properties in the order of an export.
func (e *Entry) routerOS() string {
	values := map[string]string{}
	for _, s := range e.settings() {
		values[s.Property] = "=" + quote(s.Value)
	}
	if e.Config.Disabled {
		values[DisabledKey] = "=yes"
	}
	switch c := &e.Config; {
	case c.IPsec.Wanted():
		values["allow-fast-path"] = "=no" // without which RouterOS refuses the secret
		if e.hides() {
			delete(values, "ipsec-secret")
		}
	case values["allow-fast-path"] != "":
		values["ipsec-secret"] = "" // !ipsec-secret: there is none, as opposed to one that was left out
	}
	if values["keepalive"] == "=off" {
		values["keepalive"] = ""
	}
	line := "add"
	for _, name := range tunnelProperties {
		switch value, ok := values[name]; {
		case !ok:
		case value == "":
			line += " !" + name
		default:
			line += " " + name + value
		}
	}
	return line
}

// quote returns a value in RouterOS's notation, in ASCII.
func quote(s string) string {
	const plain = "-._/:,@+"
	if s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune(plain, c))
	}) {
		return s
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range []byte(s) {
		switch {
		case strings.IndexByte(`"\$?`, c) >= 0:
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\%02X`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}
