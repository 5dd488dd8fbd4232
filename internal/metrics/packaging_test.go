package metrics

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

const rulesFile, dashboardFile = "../../packaging/prometheus/ipipd.rules.yml", "../../packaging/grafana/ipipd.json"

// ruleFile is a file of Prometheus's alert rules.
type ruleFile struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Alert, Expr, For    string
			Labels, Annotations map[string]string
		}
	}
}

// dashboard is what the tests read of Grafana's dashboard.
type dashboard struct {
	Title, UID string
	Panels     []struct {
		ID      int
		Title   string
		Type    string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ RefID, Expr, LegendFormat string }
	}
	Templating struct {
		List []struct{ Name, Definition string }
	}
}

func readRules(t *testing.T) (rules ruleFile) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err == nil {
		err = yaml.Unmarshal(text, &rules)
	}
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	if err == nil {
		err = json.Unmarshal(text, &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// scraped returns the labels of each family of a full scrape, and those that Prometheus adds.
func scraped(t *testing.T) map[string]map[string]bool {
	t.Helper()
	families := map[string]map[string]bool{"up": {"job": true, "instance": true}}
	label := regexp.MustCompile(`([a-z_]+)="`)
	for s := range scrape(t, aSnapshot(aTunnel("ipip1"), aTunnelOfMany("many"))) {
		name, labels, _ := strings.Cut(s, "{")
		families[name] = map[string]bool{"job": true, "instance": true}
		for _, m := range label.FindAllStringSubmatch(labels, -1) {
			families[name][m[1]] = true
		}
	}
	return families
}

var (
	seriesOf  = regexp.MustCompile(`\b((?:ipipd|process|go)_[a-z0-9_]+|up\b)(\{[^}]*\})?`)
	matcherOf = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)\s*"`)
)

// checkSeries fails the test for each series in an expression that a scrape does not have, and returns how
// many there are.
func checkSeries(t *testing.T, where, expr string, families map[string]map[string]bool) (n int) {
	t.Helper()
	for _, m := range seriesOf.FindAllStringSubmatch(expr, -1) {
		n++
		if families[m[1]] == nil {
			t.Errorf("%s: there is no %s", where, m[1])
			continue
		}
		for _, l := range matcherOf.FindAllStringSubmatch(m[2], -1) {
			if !families[m[1]][l[1]] {
				t.Errorf("%s: %s has no label %s", where, m[1], l[1])
			}
		}
	}
	return n
}

// The series and labels of the alert rules are in a scrape.
func TestFamily_rules(t *testing.T) {
	families, seen, n := scraped(t), map[string]bool{}, 0
	for _, g := range readRules(t).Groups {
		for _, r := range g.Rules {
			if seen[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s: twice, or without severity, summary or description", r.Alert)
			}
			seen[r.Alert] = true
			if checkSeries(t, r.Alert, r.Expr, families) == 0 {
				t.Errorf("%s asks for nothing", r.Alert)
			}
			n++
		}
	}
	if n < 10 {
		t.Errorf("%d rules", n)
	}
}

// The series and labels of the dashboard are in a scrape, and its panels do not overlap.
func TestFamily_dashboard(t *testing.T) {
	families, d := scraped(t), readDashboard(t)
	ids := map[int]bool{}
	type cell struct{ x, y int }
	taken := map[cell]string{}
	legend := regexp.MustCompile(`\{\{([a-z_]+)\}\}`)
	for _, p := range d.Panels {
		if ids[p.ID] || len(p.Targets) == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q: its ID is another's, it shows nothing, or is beyond the edge", p.Title)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := cell{p.GridPos.X + x, p.GridPos.Y + y}
				if taken[at] != "" {
					t.Fatalf("panel %q covers %q", p.Title, taken[at])
				}
				taken[at] = p.Title
			}
		}
		for _, target := range p.Targets {
			if checkSeries(t, p.Title, target.Expr, families) == 0 {
				t.Errorf("panel %q asks for nothing in %q", p.Title, target.Expr)
			}
			for _, m := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
				if name := seriesOf.FindStringSubmatch(target.Expr)[1]; !families[name][m[1]] {
					t.Errorf("panel %q: %s has no label %s", p.Title, name, m[1])
				}
			}
		}
	}
	variables := 0
	for _, v := range d.Templating.List {
		variables += checkSeries(t, "variable "+v.Name, v.Definition, families)
	}
	if len(d.Panels) < 10 || variables != 3 || d.UID != "ipipd" {
		t.Errorf("%d panels, %d variables with series, uid %q", len(d.Panels), variables, d.UID)
	}
}

// Every metric of ipipd is on the dashboard or in an alert rule, but for two timestamps.
func TestFamily_used(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{"ipipd_config_last_reload_success_timestamp_seconds": true, "ipipd_tunnel_ipsec_established_timestamp_seconds": true}
	for _, m := range seriesOf.FindAllStringSubmatch(string(text)+string(rules), -1) {
		used[m[1]] = true
	}
	for _, name := range slices.Sorted(maps.Keys(scraped(t))) {
		if strings.HasPrefix(name, "ipipd_") && !used[name] {
			t.Errorf("nothing uses %s", name)
		}
	}
}

// promtool runs Prometheus's promtool, and fails the test if it finds something wrong.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("needs promtool (package prometheus)")
	}
	c := exec.Command(path, args...)
	c.Stdin = strings.NewReader(stdin)
	if out, err := c.CombinedOutput(); err != nil || bytes.Contains(out, []byte("FAILED")) {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Prometheus itself finds nothing wrong with a scrape, the rules and the expressions of the dashboard, and
// the rules fire when they should.
func TestFamily_promtool(t *testing.T) {
	t.Run("metrics", func(t *testing.T) {
		var ours []string
		w := get(t, serve(Options{Snapshot: func() *Snapshot { return aSnapshot(aTunnel("ipip1")) }}), "/metrics")
		for line := range strings.Lines(w.Body.String()) {
			if strings.Contains(line, "ipipd_") {
				ours = append(ours, line)
			}
		}
		promtool(t, strings.Join(ours, ""), "check", "metrics")
	})
	t.Run("rules", func(t *testing.T) { promtool(t, "", "check", "rules", rulesFile) })
	t.Run("alerts", func(t *testing.T) {
		dir := t.TempDir() // rules_test.yml names the rules by a path in its own folder
		for from, to := range map[string]string{rulesFile: "ipipd.rules.yml", "testdata/rules_test.yml": "rules_test.yml"} {
			text, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, to), text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		promtool(t, "", "test", "rules", filepath.Join(dir, "rules_test.yml"))
	})
	t.Run("dashboard", func(t *testing.T) {
		var rules strings.Builder
		rules.WriteString("groups:\n  - name: dashboard\n    rules:\n")
		variable := strings.NewReplacer("$__rate_interval", "1m", "$job", "ipipd", "$instance", "a", "$tunnel", "ipip1")
		n := 0
		for _, p := range readDashboard(t).Panels {
			for _, target := range p.Targets {
				n++
				fmt.Fprintf(&rules, "      - { record: 'ipipd:%d', expr: %q }\n", n, variable.Replace(target.Expr))
			}
		}
		file := filepath.Join(t.TempDir(), "dashboard.yml")
		if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		promtool(t, "", "check", "rules", file)
	})
}
