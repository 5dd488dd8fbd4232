package warning_test

import (
	"regexp"
	"strings"
	"testing"

	"ipipd/internal/warning"
)

func TestText(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(-[a-z0-9]+)*$`)
	seen := map[string]bool{}
	for c := range warning.NumCodes {
		text := c.Text()
		switch all := []string{text.What, text.Why, text.Remedy}; {
		case !name.MatchString(text.Name) || c.String() != text.Name:
			t.Errorf("%d is called %q", c, text.Name)
		case seen[text.Name]:
			t.Errorf("two are called %s", text.Name)
		case text.Severity != warning.Broken && text.Severity != warning.Warning && text.Severity != warning.Note:
			t.Errorf("%s is %q", c, text.Severity)
		case strings.ContainsAny(strings.Join(all, ""), "|\n`"):
			t.Errorf("%s: not what a table, a terminal and a log line can all have", c)
		case strings.Contains(text.What, ": "):
			t.Errorf("%s: what is the case ends at the first colon", c)
		}
		for _, clause := range []string{text.What, text.Why, text.Remedy} {
			if clause == "" || strings.HasSuffix(clause, ".") {
				t.Errorf("%s: %q is not a clause without a full stop", c, clause)
			}
		}
		seen[text.Name] = true
	}
}
