package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"ipipd/internal/underlay"
	"ipipd/internal/warning"
)

// warningControl is a control that only warns.
func warningControl(log io.Writer) *control {
	cfg := Default()
	t := &Tunnel{ifname: newIfnameHandler(slog.New(slog.NewTextHandler(log, nil)), "ipip1"), ctx: context.Background()}
	t.log = slog.New(t.ifname)
	t.route.Store(&route{path: underlay.Path{Remote: outerB.As4()}})
	return &control{Tunnel: t, cfg: &cfg, warnedAt: map[warning.Code]time.Time{}}
}

func TestControlRaise(t *testing.T) {
	var log strings.Builder
	c := warningControl(&log)
	lines := func(text string) int { return strings.Count(log.String(), text) }
	c.raise(warning.RPSNotSet, "b", "")
	c.raise(warning.InterfaceGone, "a", "")
	if w := c.activeWarnings(); len(w) != 2 || w[0].Code != "rps-not-set" || w[1].Code != "interface-gone" {
		t.Errorf("%+v: want the two in their order", w)
	}
	before := c.activeWarnings()
	c.raise(warning.InterfaceGone, "a", "")
	if &before[0] != &c.activeWarnings()[0] {
		t.Error("what is active already is published again")
	}
	c.raise(warning.InterfaceGone, "c", "another remedy")
	w := c.activeWarnings()[1]
	if before[1].Detail != "a" || w.Detail != "c" || w.Remedy != "another remedy" || w.Since != before[1].Since {
		t.Errorf("%+v, and before %+v", w, before[1])
	}
	c.clear(warning.InterfaceGone)
	c.clear(warning.InterfaceGone)
	if w := c.activeWarnings(); len(w) != 1 || c.warned(warning.InterfaceGone) || !c.warned(warning.RPSNotSet) {
		t.Errorf("%+v", w)
	}
	if lines("level=WARN") != 2 || lines("level=INFO") != 1 || lines("warning=interface-gone") != 2 {
		t.Errorf("want a line of each beginning, and of an end that has one:\n%s", log.String())
	}
	if want := `level=WARN msg="` + warning.InterfaceGone.Text().Sentence() + `" name=ipip1 warning=interface-gone detail=a remedy="none needed; to end a tunnel: ipipd down ipip1"`; !strings.Contains(log.String(), want) {
		t.Errorf("want %s in\n%s", want, log.String())
	}
	log.Reset()
	c.raise(warning.RouteLoop, "", "")
	if want := "give 198.51.100.1 a route that does not go through ipip1, or set --underlay-device"; c.activeWarnings()[1].Remedy != want || lines("detail=") != 0 {
		t.Errorf("%q, want %q\n%s", c.activeWarnings()[1].Remedy, want, log.String())
	}
	c.raise(warning.InterfaceMoved, "", "")
	c.raise(warning.ESPFiltered, "", "")
	if lines("\n") != 2 || lines("level=INFO") != 1 {
		t.Errorf("want a line of the loop, and one of a note:\n%s", log.String())
	}
}

// A warning that others can cause again and again is logged once a minute at most.
func TestControlRaise_limited(t *testing.T) {
	var log strings.Builder
	c := warningControl(&log)
	for range 3 {
		c.raise(warning.RouteLoop, "", "")
		c.clear(warning.RouteLoop)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines, want one:\n%s", n, log.String())
	}
	c.warnedAt[warning.RouteLoop] = time.Now().Add(-warningLimit)
	c.raise(warning.RouteLoop, "", "")
	c.raise(warning.PeerMTU, "", "")
	if n := strings.Count(log.String(), "\n"); n != 3 {
		t.Errorf("%d lines, want 3:\n%s", n, log.String())
	}
}

// A sighting is a warning until nothing was seen for loopHolds, and wakes control twice in that time.
func TestControlWarnSeen(t *testing.T) {
	var log strings.Builder
	c := warningControl(&log)
	var s sighting
	news := 0
	see := func(n int) {
		if s.note(n) {
			news++
		}
	}
	at := func(after time.Duration) Warning {
		c.warnSeen(&s, warning.PeerMTU, "%d bytes", loopHolds, time.Unix(0, 0).Add(after))
		return c.Tunnel.warns(warning.PeerMTU)
	}
	if w := at(0); w.Code != "" {
		t.Errorf("%+v", w)
	}
	for i := range 50 {
		see(1500)
		if w := at(time.Duration(i) * time.Second); w.Detail != "1500 bytes" {
			t.Fatalf("%+v", w)
		}
	}
	if news != 2 {
		t.Errorf("control is woken %d times", news)
	}
	see(1600)
	if w := at(loopHolds); w.Code == "" {
		t.Error("it has ended, though more was seen")
	}
	if w := at(2*loopHolds - 1); w.Code == "" {
		t.Error("it has ended early")
	}
	if w := at(2 * loopHolds); w.Code != "" || !s.until.IsZero() {
		t.Errorf("%+v does not end", w)
	}
}

// Each reason for which there is no path has a warning of its own.
func TestControlWarnPath(t *testing.T) {
	c := warningControl(io.Discard)
	for _, x := range []struct {
		err  error
		want []string
	}{
		{&unresolvedError{"far.example", nil}, nil},
		{&unresolvedError{"far.example", errors.New("no")}, []string{"name-not-resolved"}},
		{errNotKernel, []string{"no-path"}},
		{nil, nil},
	} {
		c.warnPath(x.err)
		var got []string
		for _, w := range c.activeWarnings() {
			got = append(got, w.Code)
		}
		if !slices.Equal(got, x.want) {
			t.Errorf("%v: %q, want %q", x.err, got, x.want)
		}
	}
}

// JSON keeps the warnings of a Status, and has an empty array if there are none.
func TestStatus_warnings(t *testing.T) {
	c := warningControl(io.Discard)
	cfg := Default()
	s := NewStatus(&cfg)
	for range 2 {
		text, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var got Status
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		if len(got.Warnings) != len(s.Warnings) || got.Warnings == nil || !reflect.DeepEqual(got.Restored, s.Restored) || len(got.Settings) != len(s.Settings) {
			t.Errorf("%s: %+v", text, got)
		}
		for i, w := range got.Warnings {
			if want := s.Warnings[i]; w.Code != want.Code || w.Text != want.Text || w.Detail != want.Detail || w.Remedy != want.Remedy || !w.Since.Equal(want.Since) {
				t.Errorf("%+v, want %+v", w, want)
			}
		}
		c.raise(warning.NoRoute, "route to 198.51.100.1", "")
		s.Warnings, s.Restored = c.activeWarnings(), map[string]uint64{"route": 1}
	}
}
