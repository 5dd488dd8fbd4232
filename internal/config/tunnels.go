package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"ipipd/internal/tunnel"
)

// properties has all properties of a tunnel by name.
var properties = func() map[string]tunnel.Property {
	m := map[string]tunnel.Property{}
	for _, p := range tunnel.Properties() {
		m[p.Name] = p
	}
	return m
}()

// Set sets what s says in c: of a Repeatable property one more value. Its error is a
// *tunnel.ValueError, and then c is as it was.
func Set(c *tunnel.Config, s Setting) error {
	p, known := properties[s.Property]
	switch {
	case s.Property == DisabledKey:
		if s.Value != "yes" && s.Value != "no" {
			return &tunnel.ValueError{Property: s.Property, Value: s.Value, Want: "yes or no"}
		}
		c.Disabled = s.Value == "yes"
		return nil
	case !known:
		return &tunnel.ValueError{Property: s.Property, Hidden: true, Want: "a property of a tunnel"}
	case p.Repeatable && s.Value == "":
		return nil // an empty list
	}
	changed := *c // a value that is not accepted changes nothing
	if err := p.Set(&changed, s.Value); err != nil {
		return err
	}
	*c = changed
	return nil
}

// withDefaults returns the settings of t, and after them the defaults that it does not set.
func (t *Tunnel) withDefaults(defaults []Setting) []Setting {
	settings := slices.Clip(t.Settings) // append copies
	for _, d := range defaults {
		if find(t.Settings, d.Property, "") == nil {
			settings = append(settings, d)
		}
	}
	return settings
}

// find returns the last Setting of a property with that value, or else its first, or nil.
func find(settings []Setting, property, value string) (found *Setting) {
	for i := range settings {
		s := &settings[i]
		if s.Property == property && (found == nil || s.Value == value) {
			found = s
		}
	}
	return found
}

// Disabled reports whether t, of f, is checked and not started.
func (f *File) Disabled(t *Tunnel) bool {
	s := find(t.withDefaults(f.Defaults), DisabledKey, "")
	return s != nil && s.Value == "yes"
}

// position returns where t sets the property, to that value if there are several, or else where t
// begins.
func (t *Tunnel) position(property, value string) Position {
	if s := find(t.Settings, property, value); s != nil {
		return s.Pos
	}
	return t.Pos
}

// configs returns the tunnels, without those that must not be started, and what is wrong in f. It sets Refused.
func (f *File) configs() (configs []tunnel.Config, errs Errors) {
	errs.addProcess(f.Process)
	defaults := errs.addDefaults(f.Defaults)
	names, outer := map[string]Position{}, map[string]Position{}
	for i := range f.Tunnels {
		t := &f.Tunnels[i]
		settings := t.withDefaults(defaults)
		c := errs.addTunnel(t, settings)
		if c.Name != "" {
			errs.addTwice(names, tunnel.InterfaceName(c.Name), t.position("name", c.Name),
				fmt.Sprintf("name: %q is not accepted: want each name once", c.Name))
		}
		if t.refused != nil { // left out also if it is disabled: nobody is to enable it
			if !c.Disabled {
				f.Refused = append(f.Refused, *t.refused)
			}
			continue
		}
		configs = append(configs, c)
		if c.Disabled {
			continue
		}
		if remote := strings.ToLower(strings.TrimSuffix(c.RemoteAddress, ".")); remote != "" {
			local := "from the route"
			if c.LocalAddress.IsValid() {
				local = c.LocalAddress.String()
			}
			errs.addTwice(outer, local+","+remote, t.position("remote-address", c.RemoteAddress),
				fmt.Sprintf("remote-address: %q is not accepted: want each pair of outer addresses once, here with local-address %s", c.RemoteAddress, local))
		}
	}
	return configs, errs
}

// addTunnel returns the configuration that settings make, and adds what is wrong with t.
func (e *Errors) addTunnel(t *Tunnel, settings []Setting) tunnel.Config {
	c := tunnel.Default()
	before := len(*e)
	for _, s := range settings {
		if err := Set(&c, s); err != nil {
			e.add(s.Pos, "%v", err)
		}
	}
	// A combination is checked if each value is right; that remote-address is missing is an error in any case.
	var v *tunnel.ValueError
	if t.incomplete || !errors.As(c.Validate(), &v) {
		return c
	}
	if complete := len(*e) == before; complete || v.Missing && v.Property == "remote-address" && find(settings, v.Property, "") == nil {
		e.add(t.position(v.Property, v.Value), "%v", v)
	}
	return c
}

// addDefaults returns the defaults that are right, and adds an error for each other: one, not one
// for each tunnel.
func (e *Errors) addDefaults(settings []Setting) (right []Setting) {
	c := tunnel.Default()
	first := map[string]Position{}
	for _, s := range settings {
		if other, ok := first[s.Property]; ok && other.File != s.Pos.File {
			e.add(s.Pos, "%s: twice: %s has a default for it", s.Property, other)
		} else if err := Set(&c, s); err != nil {
			e.add(s.Pos, "%v", err)
		} else {
			first[s.Property] = s.Pos
			right = append(right, s)
		}
	}
	return right
}

func (e *Errors) addProcess(settings []Setting) {
	process := DefaultProcess()
	first := map[string]Position{}
	for _, s := range settings {
		if other, ok := first[s.Property]; ok {
			e.add(s.Pos, "%s: twice: %s has it", s.Property, other)
			continue
		}
		first[s.Property] = s.Pos
		for _, p := range processProperties {
			if p.Name != s.Property {
				continue
			}
			if err := p.Set(&process, s.Value); err != nil {
				e.add(s.Pos, "%v", err)
			}
		}
	}
}

// addTwice adds the error wrong if first has the key already, with the position that first has for it.
func (e *Errors) addTwice(first map[string]Position, key string, pos Position, wrong string) {
	if other, ok := first[key]; ok {
		e.add(pos, "%s; %s has it", wrong, other)
		return
	}
	first[key] = pos
}
