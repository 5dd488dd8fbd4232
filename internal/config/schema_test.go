package config

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/jsonschema-go/jsonschema"
	"go.yaml.in/yaml/v4"

	"ipipd/internal/tunnel"
)

// validate judges a text in YAML by Schema, as an editor does.
func validate(t *testing.T, text string) error {
	t.Helper()
	var s jsonschema.Schema
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	resolved, err := s.Resolve(nil)
	if err != nil {
		t.Fatal(err)
	}
	var document yaml.Node
	if err := yaml.Load([]byte(text), &document); err != nil {
		t.Fatal(err)
	}
	return resolved.Validate(asJSON(document.Content[0]))
}

// asJSON returns n with the types that YAML gives its scalars.
func asJSON(n *yaml.Node) any {
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for i := 0; i < len(n.Content); i += 2 {
			m[n.Content[i].Value] = asJSON(n.Content[i+1])
		}
		return m
	case yaml.SequenceNode:
		list := []any{}
		for _, item := range n.Content {
			list = append(list, asJSON(item))
		}
		return list
	}
	switch n.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		return n.Value == "true"
	case "!!int", "!!float":
		if number, err := strconv.ParseFloat(n.Value, 64); err == nil {
			return number
		}
	}
	return n.Value
}

func TestSchema_accepts(t *testing.T) {
	for _, name := range goodFiles(t) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate(t, string(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSchema_refuses(t *testing.T) {
	for name, text := range map[string]string{
		"unknown key":               "{tunnels: [], colour: red}",
		"tunnel's key of the file":  "{tunnels: [], mtu: 1400}",
		"unknown key in defaults":   "{tunnels: [], defaults: {colour: red}}",
		"name in defaults":          "{tunnels: [], defaults: {name: a}}",
		"unknown key in a tunnel":   "{tunnels: [{name: a, colour: red}]}",
		"process's key of a tunnel": "{tunnels: [{name: a, log-level: info}]}",
		"tunnel without a name":     "{tunnels: [{remote-address: r}]}",
		"no tunnels":                "{log-level: info}",
		"tunnels by name":           "{tunnels: {a: {}}}",
		"list for one value":        "{tunnels: [{name: [a]}]}",
		"mapping for a value":       "{tunnels: [{name: a, route: {a: b}}]}",
		"list in a list":            "{tunnels: [{name: a, route: [[a]]}]}",
	} {
		if validate(t, text) == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, errs := parseYAML("f", []byte(text)); len(errs) == 0 {
			t.Errorf("%s: the schema refuses what is read", name)
		}
	}
}

// Schema has each property, with its help.
func TestSchema_properties(t *testing.T) {
	var s jsonschema.Schema
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	ofTunnel := s.Properties[tunnelsKey].Items.Properties
	if len(ofTunnel) != len(tunnelKeys) || len(s.Properties[defaultsKey].Properties) != len(tunnelKeys)-1 {
		t.Errorf("a tunnel has %d keys, the defaults %d: want %d, and one less", len(ofTunnel), len(s.Properties[defaultsKey].Properties), len(tunnelKeys))
	}
	has := func(s *jsonschema.Schema, name, help string) {
		if s == nil || !strings.HasPrefix(s.Description, strings.ReplaceAll(help, "`", "")) {
			t.Errorf("%s has not its help", name)
		}
	}
	for _, p := range tunnel.Properties() {
		has(ofTunnel[p.Name], p.Name, p.Help)
	}
	for _, p := range processProperties {
		has(s.Properties[p.Name], p.Name, p.Help)
	}
}
