package encap_test

import (
	"regexp"
	"slices"
	"testing"

	"ipipd/encap"
)

// Every Drop has a unique name in kebab case.
func TestDropString(t *testing.T) {
	kebab := regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	seen := map[string]encap.Drop{}
	for d := range encap.NumDrops {
		name := d.String()
		if !kebab.MatchString(name) {
			t.Errorf("Drop(%d) is called %q", d, name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("Drop(%d) and Drop(%d) are both called %q", d, other, name)
		}
		seen[name] = d
	}
	if got := encap.NumDrops.String(); got != "unknown" {
		t.Errorf("beyond the last: %q", got)
	}
	if got := encap.DropLoop.Error(); got != "dropped: loop" {
		t.Errorf("Error = %q", got)
	}
}

func TestDrops(t *testing.T) {
	all := slices.Collect(encap.Drops())
	if len(all) != int(encap.NumDrops)-1 || slices.Contains(all, encap.DropNone) {
		t.Errorf("Drops: %v", all)
	}
	for range encap.Drops() {
		break // must not panic
	}
}
