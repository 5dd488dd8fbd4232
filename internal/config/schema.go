package config

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"ipipd/internal/tunnel"
)

// schema is the part of JSON Schema (draft 7, which editors know best) that Schema uses.
type schema struct {
	Schema      string             `json:"$schema,omitempty"`
	Title       string             `json:"title,omitempty"`
	Description string             `json:"description,omitempty"`
	Type        any                `json:"type,omitempty"`
	Items       *schema            `json:"items,omitempty"`
	AnyOf       []*schema          `json:"anyOf,omitempty"`
	Properties  map[string]*schema `json:"properties,omitempty"`
	// Additional is false where only Properties are accepted.
	Additional *bool    `json:"additionalProperties,omitempty"`
	Required   []string `json:"required,omitempty"`
	Examples   []string `json:"examples,omitempty"`
}

// Schema returns the JSON Schema of a file, for editors. It has the keys, and not the grammar of
// the values.
func Schema() []byte {
	ofTunnel := map[string]*schema{}
	for _, p := range tunnel.Properties() {
		s := value(p.Help, p.Values, p.Default, p.Words)
		if p.Repeatable {
			s = &schema{Description: s.Description, AnyOf: []*schema{
				{Type: scalar},
				{Type: "array", Items: &schema{Type: scalar}},
			}}
		}
		if p.Mapping {
			s.AnyOf = append(s.AnyOf, &schema{Type: "object"})
			s.AnyOf[1].Items = &schema{Type: append(slices.Clone(scalar), "object")}
		}
		ofTunnel[p.Name] = s
	}
	ofTunnel[DisabledKey] = value(DisabledHelp, "`yes` or `no`", "no", []string{"yes", "no"})
	defaults := map[string]*schema{}
	for name, s := range ofTunnel {
		if name != "name" {
			defaults[name] = s
		}
	}
	ofFile := map[string]*schema{}
	for _, p := range processProperties {
		ofFile[p.Name] = value(p.Help, p.Values, p.Default, p.Words)
	}
	ofFile[defaultsKey] = &schema{Description: "for every tunnel that does not say otherwise", Type: "object", Properties: defaults, Additional: new(bool)}
	ofFile[tunnelsKey] = &schema{Type: "array", Items: &schema{Type: "object", Properties: ofTunnel, Additional: new(bool), Required: []string{"name"}}}
	text, err := json.MarshalIndent(&schema{
		Schema: "http://json-schema.org/draft-07/schema#", Title: "Configuration of ipipd",
		Type: "object", Properties: ofFile, Additional: new(bool), Required: []string{tunnelsKey},
	}, "", "  ")
	if err != nil {
		panic(err) // it has only strings in it
	}
	return append(text, '\n')
}

// scalar are the types that an editor may take a value for: 1400 is a number, yes a boolean in
// YAML 1.1, and nothing is null.
var scalar = []string{"string", "number", "boolean", "null"}

func value(help, values, def string, words []string) *schema {
	text := strings.ReplaceAll(fmt.Sprintf("%s [%s]", help, values), "`", "")
	return &schema{Description: text + "; default: " + def, Type: scalar, Examples: words}
}
