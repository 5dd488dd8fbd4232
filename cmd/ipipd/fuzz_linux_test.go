package main

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ipipd/internal/config"
	"ipipd/internal/control"
)

// Whatever the request, the list before is left alone, and the list after has each name once and only
// valid configurations. An error has a line for each thing that is wrong.
func FuzzChanged(f *testing.F) {
	f.Fuzz(func(t *testing.T, action, names, settings string) {
		r := control.Request{Action: action}
		if names != "" {
			r.Names = strings.Split(names, "\n")
		}
		for line := range strings.SplitSeq(settings, "\n") {
			property, value, given := strings.Cut(line, "=")
			if given {
				r.Settings = append(r.Settings, control.Setting{Property: property, Value: []byte(value)})
			}
		}
		before := configured("ipip1", "-ipip2", "ipip-tunnel 1 to Riga")
		got, err := changed(before, r)
		if d := cmp.Diff(configured("ipip1", "-ipip2", "ipip-tunnel 1 to Riga"), before, cmpopts.EquateComparable(netip.Addr{})); d != "" {
			t.Errorf("what was there is changed: %s", d)
		}
		if err != nil {
			_, is := err.(*control.Refusal)
			lines := 1 + strings.Count(err.Error(), "\n")
			if !is || lines > 1+strings.Count(settings, "\n")+strings.Count(settings, ",") || lines > config.MaxShown+1 {
				t.Errorf("%T: %v", err, err)
			}
			return
		}
		if !slices.Contains([]string{control.Set, control.Add, control.Remove, control.Enable, control.Disable}, action) {
			t.Errorf("%q is done", action)
		}
		if links := linksOf(got); len(links) != len(got) {
			t.Errorf("%d names of %d tunnels", len(links), len(got))
		}
		for i, c := range got {
			if err := c.Validate(); err != nil {
				t.Errorf("%s: %v", c.Name, err)
			}
			if c.Name == "" && (action != control.Add || i < len(got)-1) {
				t.Error("a tunnel without a name")
			}
		}
	})
}
