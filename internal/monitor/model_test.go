package monitor

import (
	"bufio"
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/drop"
	"ipipd/internal/tunnel"
)

// states returns the states of a Model's tunnels, by name.
func states(m *Model) map[string]State {
	all := map[string]State{}
	for _, t := range m.Tunnels {
		all[t.Name] = t.State
	}
	return all
}

// Update follows tunnels and processes that start, hang, end, come back and are forgotten.
func TestModel_Update(t *testing.T) {
	m := newModel("")
	at := func(second int) time.Time { return start.Add(time.Duration(second) * time.Second) }
	answer := func(second int, names ...string) *Answer {
		a := &Answer{}
		for _, name := range names {
			a.Tunnels = append(a.Tunnels, running(name, second, 1000))
		}
		return a
	}
	want := func(when string, want map[string]State) {
		t.Helper()
		if d := cmp.Diff(want, states(m)); d != "" {
			t.Errorf("%s: %s", when, d)
		}
	}
	m.Update(at(0), nil)
	want("none", map[string]State{})
	long := "Büro Berlin (Haus 3)"
	link := tunnel.InterfaceName(long)
	m.Update(at(1), []Reading{{Process: "1", At: at(1), Answer: answer(1, "a", long)}, {Process: "2", Links: []string{"b"}, State: StateStarting}})
	want("one starts", map[string]State{"a": StateRunning, long: StateRunning, "b": StateStarting})
	m.Update(at(2), []Reading{{Process: "1", At: at(2), Answer: answer(2, "a", long)}, {Process: "2", At: at(2), Answer: answer(2, "b")}})
	want("it has started", map[string]State{"a": StateRunning, long: StateRunning, "b": StateRunning})
	if !m.byLink["a"].hasRates || m.byLink["b"].hasRates {
		t.Error("rates of one sample, or none of two")
	}
	// Process 2 is late, and process 1 hangs: the names of its links tell its tunnels.
	m.Update(at(3), []Reading{{Process: "1", Links: []string{"a", link}, State: StateSilent, Problem: "hung"}, {Process: "2", Links: []string{"b"}}})
	want("one hangs", map[string]State{"a": StateSilent, long: StateSilent, "b": StateRunning})
	if m.byLink["a"].hasRates || !m.byLink["b"].Fresh || len(m.Problems) != 1 {
		t.Errorf("%+v %+v %q", m.byLink["a"], m.byLink["b"], m.Problems)
	}
	// Process 1 is asked again, and has not answered yet: what is known of it stays.
	m.Update(at(3), []Reading{{Process: "1", Links: []string{"a", link}}, {Process: "2", Links: []string{"b"}}})
	want("it still hangs", map[string]State{"a": StateSilent, long: StateSilent, "b": StateRunning})
	if len(m.Problems) != 1 {
		t.Errorf("%q", m.Problems)
	}
	m.Update(at(4), []Reading{{Process: "2", At: at(4), Answer: answer(4, "b")}})
	if len(m.Problems) != 0 || len(m.problems) != 1 {
		t.Errorf("%q, %q", m.Problems, m.problems)
	}
	want("it was killed", map[string]State{"a": StateGone, long: StateGone, "b": StateRunning})
	// a comes back in another process, and its counters begin anew.
	m.Update(at(5), []Reading{{Process: "2", At: at(5), Answer: answer(0, "a", "b")}})
	want("one is back", map[string]State{"a": StateRunning, long: StateGone, "b": StateRunning})
	if r := m.byLink["a"].rate1s; r.RxBytes != 0 {
		t.Errorf("the rate across a restart is %+v", r)
	}
	m.Update(at(4+int(keepGone/time.Second)), []Reading{{Process: "2", At: at(100), Answer: answer(1, "a", "b")}})
	want("the other is forgotten", map[string]State{"a": StateRunning, "b": StateRunning})
	if len(m.byLink) != 2 {
		t.Errorf("%d are known", len(m.byLink))
	}
}

// A Model of one tunnel, by its name or that of its interface, has no other, and does not forget it.
func TestModel_only(t *testing.T) {
	long := "Büro Berlin (Haus 3)"
	for _, name := range []string{long, tunnel.InterfaceName(long), "renamed0"} {
		m := newModel(name)
		a := samples(1)
		for i := range a.Tunnels {
			if a.Tunnels[i].Name == long && name == "renamed0" {
				a.Tunnels[i].Interface = name
			}
		}
		m.Update(start, []Reading{{Process: "1", At: start, Answer: a}})
		if d := cmp.Diff(map[string]State{long: StateWaiting}, states(m)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		m.Update(start.Add(time.Second), []Reading{{Process: "1", Links: []string{"ipip1", tunnel.InterfaceName(long)}, State: StateSilent}})
		if d := cmp.Diff(map[string]State{long: StateSilent}, states(m)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		m.Update(start.Add(time.Minute), nil)
		m.Update(start.Add(time.Hour), nil)
		if d := cmp.Diff(map[string]State{long: StateGone}, states(m)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestState(t *testing.T) {
	for want, s := range map[State]tunnel.Sample{
		StateDisabled: {Disabled: true, WaitingFor: "x"},
		StateRunning:  {Started: true, Running: true, KeepaliveState: "waiting"},
		StateWaiting:  {Started: true, WaitingFor: "a route", Encrypted: true},
		StateNoSA:     {Started: true, Encrypted: true, KeepaliveState: "never-heard"},
		StateLost:     {Started: true, Encrypted: true, Established: true, KeepaliveState: "lost"},
		StateUnheard:  {Started: true, KeepaliveState: "never-heard"},
		StateDown:     {Started: true, KeepaliveState: "up"},
	} {
		if got := State(s.State()); got != want {
			t.Errorf("%+v is %s, want %s", s, got, want)
		}
	}
}

// A round shortly after a regular one makes no rate.
func TestModel_add(t *testing.T) {
	m := newModel("")
	for _, at := range []time.Duration{0, 5 * time.Millisecond, time.Second, 1005 * time.Millisecond} {
		now := start.Add(at)
		a := &Answer{Samples: tunnel.Samples{Tunnels: []tunnel.Sample{running("a", 0, 0)}}}
		a.Tunnels[0].RxBytes = uint64(at / time.Millisecond)
		m.Update(now, []Reading{{Process: "1", At: now, Answer: a}})
		if known := m.byLink["a"].hasRates; known != (at >= time.Second) {
			t.Errorf("after %v: %v", at, known)
		}
	}
	if r := m.byLink["a"].rate1s; r.RxBytes != 1000 {
		t.Errorf("%+v", r)
	}
}

// Drops that belong to no tunnel are summed over the processes, and UndoAt is the earliest of theirs.
func TestModel_strays(t *testing.T) {
	m := newModel("")
	for second := range 3 {
		now := start.Add(time.Duration(second) * time.Second)
		var readings []Reading
		for process, n := range map[string]int{"1": 30, "2": 4} {
			a := &Answer{UndoAt: start.Add(time.Duration(n) * time.Minute)}
			a.Drops[drop.UnknownPeer] = uint64(second * n)
			readings = append(readings, Reading{Process: process, At: now, Answer: a})
		}
		m.Update(now, readings)
	}
	if m.StrayRate != 34 || m.StrayTop != drop.UnknownPeer || !m.UndoAt.Equal(start.Add(4*time.Minute)) {
		t.Errorf("%v %v, undone at %v", m.StrayRate, m.StrayTop, m.UndoAt)
	}
	m.Update(start.Add(time.Hour), nil)
	if m.StrayRate != 0 || len(m.strays) != 0 {
		t.Errorf("%v of %d processes", m.StrayRate, len(m.strays))
	}
}

// JSON returns a line with the tunnels' values, without those that are unknown, and no newline in it.
func TestModel_JSON(t *testing.T) {
	m, now := after("")
	text, err := m.JSON(now)
	if err != nil || strings.Contains(string(text), "\n") {
		t.Fatalf("%s, %v", text, err)
	}
	var got struct {
		Tunnels  []map[string]any
		Problems []string
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Tunnels) != 7 || len(got.Problems) != 1 {
		t.Fatalf("%s", text)
	}
	of := map[string]map[string]any{}
	for _, tunnel := range got.Tunnels {
		of[tunnel["name"].(string)] = tunnel
	}
	for _, c := range []struct {
		name, key string
		want      any
	}{
		{"ipip1", "state", "running"},
		{"ipip1", "rx-byte", 12 * 1234.},
		{"ipip1", "rx-bits-per-second", 8 * 1234.},
		{"ipip1", "tx-bits-per-second-10s", 8 * 617.},
		{"ipip1", "rx-packets-per-second-10s", 1.2},
		{"ipip1", "round-trip-seconds", 0.0123},
		{"ipip1", "ipsec-established", nil},
		{"ipip2", "ipsec-established", true},
		{"ipip2", "comment", "to \x1b[31mRiga\x1b[0m 東京\n\u202e<script>"},
		{"ipip1", "warnings", nil},
		{"secret", "ipsec-established", false},
		{"ipip10", "drops", map[string]any{"too-big": 36., "queue-full": 12.}},
		{"ipip10", "drops-per-second", 4.},
		{"ipip10", "top-drop-10s", "too-big"},
		{"later", "rx-bits-per-second", nil},
		{"later", "drops", map[string]any{}},
		{"stuck", "state", "no-answer"},
		{"stuck", "drops-per-second", nil},
		{"Büro Berlin (Haus 3)", "waiting-for", "route to 203.0.113.7"},
	} {
		if d := cmp.Diff(c.want, of[c.name][c.key]); d != "" {
			t.Errorf("%s of %s: %s", c.key, c.name, d)
		}
	}
	if w := of["ipip2"]["warnings"].([]any); len(w) != 2 || w[1].(map[string]any)["code"] != "fragments" {
		t.Errorf("warnings %v", w)
	}
	if text, _ := newModel("").JSON(now); !strings.Contains(string(text), `"tunnels":[]`) {
		t.Errorf("of none: %s", text)
	}
}

// docs/monitor.md has each member and each state.
func TestLine_documented(t *testing.T) {
	text, err := os.ReadFile("../../docs/monitor.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range severities {
		names = append(names, string(s))
	}
	for _, of := range []reflect.Type{reflect.TypeFor[line](), reflect.TypeFor[tunnelLine](), reflect.TypeFor[rateLine]()} {
		for i := range of.NumField() {
			name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
			if base, ok := strings.CutSuffix(name, "-second-10s"); ok {
				name = base + "-second" // documented once, for both windows
			}
			if name != "" {
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		if !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("%s is missing", name)
		}
	}
}

// Each line is one tunnel, of key=value.
func TestModel_Text(t *testing.T) {
	m, now := after("")
	golden(t, "lines", strings.Split(strings.TrimSuffix(m.Text(now), "\n"), "\n"))
	pair := regexp.MustCompile(`^(?:[a-z0-9-]+=(?:"(?:[^"\\]|\\.)*"|[^" =\\]+)(?: |$))+$`)
	lines := bufio.NewScanner(strings.NewReader(m.Text(now)))
	for lines.Scan() {
		if !pair.MatchString(lines.Text()) {
			t.Errorf("%q", lines.Text())
		}
	}
}
