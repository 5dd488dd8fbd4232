package config

import (
	"encoding/json"
	"strings"

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
			if err := Set(&c, s); err != nil {
				return nil, err
			}
		}
		object := map[string]any{}
		for _, s := range settings {
			p, known := properties[s.Property]
			switch {
			case !known: // DisabledKey
				object[s.Property] = s.Value == "yes"
			case !p.Repeatable:
				object[s.Property] = p.Get(&c) // a placeholder for a secret
			case p.Get(&c) == "":
				object[s.Property] = []string{}
			default:
				object[s.Property] = strings.Split(p.Get(&c), ",")
			}
		}
		tunnels = append(tunnels, object)
	}
	return json.Marshal(tunnels)
}
