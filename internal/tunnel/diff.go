package tunnel

import (
	"maps"
	"slices"
)

// Difference is what Apply would do with one tunnel.
type Difference struct {
	Name   string // of the tunnel, as configured
	Action Action
	// Properties are those that change, if Action is InPlace or Again. The first ones, as many as Remade says,
	// are why the tunnel is made again.
	Properties []Property
	Remade     int
}

// Action is what Apply does with a tunnel.
type Action uint8

const (
	Nothing Action = iota
	InPlace
	Again // removed, and made again: packets are lost
	Add
	Remove
)

// String returns nothing, in place, again, add or remove.
func (a Action) String() string {
	return [...]string{"nothing", "in place", "again", "add", "remove"}[a]
}

// Diff returns what Apply would do with each tunnel of configs, in their order, and with the others
// that run, in the order of their names. It opens nothing but the files of secrets. Its error is a
// *TunnelError.
func (e *Engine) Diff(configs []Config) ([]Difference, error) {
	ending := e.Tunnels()
	var differences []Difference
	for i := range configs {
		next := &configs[i]
		d, err := ending[next.Name].diff(next)
		if err != nil {
			return nil, &TunnelError{next.Name, err}
		}
		differences = append(differences, d)
		delete(ending, next.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(ending)) {
		differences = append(differences, Difference{Name: name, Action: Remove})
	}
	return differences, nil
}

// diff returns what Apply would do with t, nil if there is none, to make it the tunnel that next configures.
func (t *Tunnel) diff(next *Config) (Difference, error) {
	d := Difference{Name: next.Name, Action: Add}
	if err := next.Validate(); err != nil {
		return d, err
	}
	secret, err := next.IPsec.secret()
	if err != nil || t == nil {
		return d, err
	}
	old := t.config.Load()
	d.Action, d.Properties = Nothing, remade(old, next)
	d.Remade = len(d.Properties)
	again := d.Remade > 0
	known := func(p Property) bool {
		return slices.ContainsFunc(d.Properties, func(other Property) bool { return other.Name == p.Name })
	}
	for _, p := range Changes(old, next) {
		if !known(p) {
			d.Properties = append(d.Properties, p)
		}
	}
	if !again && !t.ipsecPolicy.hasSecret(secret) { // the secret itself has changed, and not the property that has it
		for _, p := range ipsecProperties {
			if p.Remade == remadeSecret && p.Get(next) != "" && !known(p) {
				d.Properties = append(d.Properties, p)
			}
		}
	}
	switch {
	case again:
		d.Action = Again
	case len(d.Properties) > 0:
		d.Action = InPlace
	}
	return d, nil
}
