package config

import "testing"

// Each property's documented default is that of DefaultProcess, and its documented words are accepted.
func TestProcessProperties_defaults(t *testing.T) {
	process := DefaultProcess()
	for _, p := range ProcessProperties() {
		if got := p.Get(&process); got != p.Default {
			t.Errorf("%s: the default is %q, documented as %q", p.Name, got, p.Default)
		}
		for _, w := range p.Words {
			if err := p.Set(&process, w); err != nil {
				t.Errorf("%s: %q is offered and not accepted: %v", p.Name, w, err)
			}
		}
	}
}
