package lint

import (
	"bytes"
	"os"
	"regexp"
	"testing"

	"ipipd/encap"
	"ipipd/internal/ipsec/esp"
)

// Whoever sees a reason in print has to find it in the README, and nobody is to look
// there for one that is gone.
func TestDrops_explained(t *testing.T) {
	text, err := os.ReadFile(root + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tables, ok := bytes.Cut(text, []byte("\n### Drops\n"))
	if !ok {
		t.Fatal("README.md has no heading \"### Drops\"")
	}
	tables, _, _ = bytes.Cut(tables, []byte("\n## "))
	explained := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\|").FindAllSubmatch(tables, -1) {
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
			t.Errorf("README.md does not explain %s", reason)
		}
		delete(explained, reason)
	}
	for name := range explained {
		t.Errorf("README.md explains %s, which is not a reason", name)
	}
}
