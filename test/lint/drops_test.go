package lint

import (
	"os"
	"regexp"
	"testing"

	"ipipd/encap"
	"ipipd/internal/ipsec/esp"
)

// Each reason that print can show is explained in docs/drops.md, and no other.
func TestDrops_explained(t *testing.T) {
	text, err := os.ReadFile(root + "/docs/drops.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\|").FindAllSubmatch(text, -1) {
		explained[string(row[1])] = true
	}
	reasons := []string{}
	for d := range encap.Drops() {
		reasons = append(reasons, d.String())
	}
	for d := esp.DropNone + 1; int(d) < esp.NumDrops; d++ {
		reasons = append(reasons, d.String())
	}
	for _, reason := range reasons {
		if !explained[reason] {
			t.Errorf("docs/drops.md does not explain %s", reason)
		}
		delete(explained, reason)
	}
	for name := range explained {
		t.Errorf("docs/drops.md explains %s, which is not a reason", name)
	}
}
