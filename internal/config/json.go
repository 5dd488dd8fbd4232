package config

import (
	"encoding/json"

	"ipipd/internal/tunnel"
)

// MarshalJSON writes the tunnels of f, which Read returned, as an array of objects, as `print
// --json` has them, but with only what f sets, its defaults included.
func (f *File) MarshalJSON() ([]byte, error) {
	tunnels := []map[string]any{}
	for i := range f.Tunnels {
		settings := f.Tunnels[i].withDefaults(f.Defaults)
		c := tunnel.Default()
		for _, s := range settings {
			if err := set(&c, s); err != nil {
				return nil, err
			}
		}
		object := map[string]any{}
		for _, s := range settings {
			switch p := properties[s.Property]; {
			case s.Property == disabledKey:
				object[s.Property] = s.Value == "yes"
			case p.Repeatable:
				list, _ := object[s.Property].([]string)
				if list == nil {
					list = []string{}
				}
				if s.Value != "" {
					list = append(list, s.Value)
				}
				object[s.Property] = list
			default:
				object[s.Property] = p.Get(&c) // a placeholder for a secret
			}
		}
		tunnels = append(tunnels, object)
	}
	return json.Marshal(tunnels)
}
