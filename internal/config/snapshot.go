package config

import (
	"encoding/json"
	"errors"
	"fmt"

	"ipipd/internal/tunnel"
)

// Snapshot is the configuration of what a process runs. Its JSON, by which it is sent to other processes
// of ipipd, has the settings that are not the default, secrets included.
type Snapshot struct {
	Process Process
	Tunnels []Entry
}

type (
	snapshotJSON struct {
		Process []settingJSON `json:"process,omitempty"`
		Tunnels []entryJSON   `json:"tunnels"`
	}
	entryJSON struct {
		Settings []settingJSON `json:"settings"`
		Disabled bool          `json:"disabled,omitempty"`
	}
	settingJSON struct {
		Property string `json:"property"`
		Value    []byte `json:"value"` // a secret need not be UTF-8
	}
)

// Entries returns all tunnels of f, which Read returned, but fails if one must not be started.
func (f *File) Entries() ([]Entry, error) {
	if len(f.Refused) > 0 {
		return nil, f.Refused
	}
	var entries []Entry
	for i := range f.Tunnels {
		e := Entry{Config: tunnel.Default()}
		for _, s := range f.Tunnels[i].withDefaults(f.Defaults) {
			if err := Set(&e.Config, s); err != nil {
				return nil, err
			}
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// MarshalJSON implements json.Marshaler.
func (s Snapshot) MarshalJSON() ([]byte, error) {
	out := snapshotJSON{Process: bytesOf(s.Process.settings()), Tunnels: []entryJSON{}}
	for i := range s.Tunnels {
		out.Tunnels = append(out.Tunnels, entryJSON{bytesOf(s.Tunnels[i].settings()), s.Tunnels[i].Config.Disabled})
	}
	return json.Marshal(out)
}

func bytesOf(settings []Setting) (out []settingJSON) {
	for _, s := range settings {
		out = append(out, settingJSON{s.Property, []byte(s.Value)})
	}
	return out
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *Snapshot) UnmarshalJSON(data []byte) error {
	var in snapshotJSON
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	*s = Snapshot{Process: DefaultProcess()}
	var errs []error
	for _, one := range in.Process {
		err := fmt.Errorf("%s: unknown to this version", one.Property)
		for _, p := range processProperties {
			if p.Name == one.Property {
				err = p.Set(&s.Process, string(one.Value))
			}
		}
		errs = append(errs, err)
	}
	for _, t := range in.Tunnels {
		e := Entry{Config: tunnel.Default()}
		e.Config.Disabled = t.Disabled
		for _, one := range t.Settings {
			errs = append(errs, Set(&e.Config, Setting{Property: one.Property, Value: string(one.Value)}))
		}
		s.Tunnels = append(s.Tunnels, e)
	}
	return errors.Join(errs...)
}
