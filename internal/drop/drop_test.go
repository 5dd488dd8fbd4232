package drop_test

import (
	"encoding/json"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ipipd/internal/drop"
)

func TestReason(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(-[a-z0-9]+)*$`)
	seen := map[string]bool{}
	for r := range drop.All() {
		switch {
		case !name.MatchString(r.String()):
			t.Errorf("%d is called %q", r, r)
		case seen[r.String()]:
			t.Errorf("two are called %s", r)
		case r.Why() == "" || r.Remedy() == "":
			t.Errorf("%s has no cause or no remedy", r)
		case strings.ContainsAny(r.Why()+r.Remedy(), "|\n") || strings.HasSuffix(r.Why(), ".") || strings.HasSuffix(r.Remedy(), "."):
			t.Errorf("%s: cause and remedy are clauses that fit in a table", r)
		case strings.Count(r.Why(), "`")%2 != 0 || strings.Count(r.Remedy(), "`")%2 != 0:
			t.Errorf("%s: unbalanced backquotes", r)
		}
		seen[r.String()] = true
	}
	if len(seen) != int(drop.NumReasons)-1 {
		t.Errorf("All has %d of %d", len(seen), drop.NumReasons-1)
	}
}

func TestGroups(t *testing.T) {
	var all []drop.Reason
	for _, g := range drop.Groups() {
		all = slices.AppendSeq(all, g.Reasons)
	}
	if want := slices.Collect(drop.All()); !slices.Equal(all, want) {
		t.Errorf("the groups have %v, want %v", all, want)
	}
}

func TestReason_Error(t *testing.T) {
	var err error
	reason := drop.NoPath
	if n := testing.AllocsPerRun(100, func() { err = reason }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	var got drop.Reason
	if !errors.As(err, &got) || got != drop.NoPath {
		t.Errorf("%v", err)
	}
	if want := "dropped: no-path: no route to the remote, or its name has no address"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
}

func TestCounters(t *testing.T) {
	var c drop.Counters
	if m := c.Map(); m == nil || len(m) != 0 {
		t.Errorf("%v", m)
	}
	c.Add(drop.TooBig, 2)
	c.Add(drop.TooBig, 1)
	c.Add(drop.ESPReplay, 4)
	if want := map[string]uint64{"too-big": 3, "esp-replay": 4}; !maps.Equal(c.Map(), want) {
		t.Errorf("%v, want %v", c.Map(), want)
	}
}

// What one version writes another reads, but for the reasons that it does not have.
func TestCounts_json(t *testing.T) {
	var c, got drop.Counts
	for text, want := range map[string]string{`{}`: `{}`, `{"too-big":18446744073709551615,"no-path":1,"from-tomorrow":7}`: `{"too-big":18446744073709551615,"no-path":1}`} {
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		out, err := json.Marshal(c)
		if string(out) != want || err != nil {
			t.Errorf("%s is written as %s, %v", text, out, err)
		}
		if err := json.Unmarshal(out, &got); err != nil || got != c {
			t.Errorf("%s is read as %v, %v", out, got, err)
		}
	}
	if json.Unmarshal([]byte(`{"too-big":-1}`), &c) == nil || json.Unmarshal([]byte(`[1]`), &c) == nil {
		t.Error("no counts are counts")
	}
}
