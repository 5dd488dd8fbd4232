package metrics

import (
	"bufio"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"ipipd/internal/drop"
	"ipipd/internal/sandbox"
	"ipipd/internal/tunnel"
)

// aTunnel returns the Sample of an encrypted tunnel with a value of each metric but those of many remotes.
func aTunnel(name string) tunnel.Sample {
	s := tunnel.Sample{
		Name: name, Interface: name, Comment: "to the office", LocalAddress: "192.0.2.1", RemoteAddress: "198.51.100.1",
		Started: true, Running: true, FastPath: true, MTU: 1480, PathMTU: 1500, LastHeard: time.Unix(1700000000, 250e6),
		RxPackets: 3, RxBytes: 300, TxPackets: 1 << 40, TxBytes: 1 << 53, StateChanges: 5,
		ProbesSent: 9, ProbesAnswered: 8, ProbesHaveAnswers: true, RoundTrip: 1500 * time.Microsecond,
		Encrypted: true, Established: true, SAs: 2, Since: time.Unix(1700000001, 0), RekeyAt: time.Unix(1700001801, 0),
		Warnings: []tunnel.Warning{{Code: "peer-mtu", Severity: "warning"}, {Code: "fragments", Severity: "note"}},
	}
	s.Drops[drop.TooBig], s.Drops[drop.ICMPLimited] = 7, 4
	return s
}

// aTunnelOfMany returns the Sample of a tunnel with many remotes, two of which are listed.
func aTunnelOfMany(name string) tunnel.Sample {
	sas := 1
	return tunnel.Sample{
		Name: name, Interface: name, RemoteAddress: tunnel.AnyRemote, Started: true, Running: true, Encrypted: true, Established: true, IPsecRemotes: &sas,
		Remotes: &tunnel.Remotes{Count: 5, NotOK: 1, Prefixes: 9, List: []tunnel.Remote{
			{Address: "198.51.100.7", Prefixes: 2, State: tunnel.RemoteNoPath},
			{Address: "198.51.100.1", Prefixes: 3, State: tunnel.RemoteOK, PathMTU: 1500, LastHeard: time.Unix(1700000000, 0)},
		}},
	}
}

func aSnapshot(tunnels ...tunnel.Sample) *Snapshot {
	s := &Snapshot{Samples: tunnel.Samples{Tunnels: tunnels}, ReloadedAt: time.Unix(1700000000, 0)}
	s.Sandbox = sandbox.State{Mode: sandbox.Strict, Landlock: 7, Seccomp: true, NoNewPrivs: true, Capabilities: []sandbox.Capability{{Name: "CAP_NET_ADMIN"}, {Name: "CAP_NET_RAW"}}}
	s.Drops[drop.UnknownPeer] = 2
	return s
}

// serve returns the server's handler, to be called without a network.
func serve(o Options) http.Handler {
	o.Version = "v1.2.3"
	if o.Ready == nil {
		o.Ready = func() error { return nil }
	}
	o.Page = aPage
	return NewServer(o).Handler
}

var aPage = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	io.WriteString(w, "the page at "+r.URL.Path)
})

func get(t testing.TB, h http.Handler, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

// scrape returns the series of a Snapshot with their values.
func scrape(t testing.TB, s *Snapshot) map[string]string {
	t.Helper()
	w := get(t, serve(Options{Snapshot: func() *Snapshot { return s }}), "/metrics")
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Fatalf("%d %v\n%s", w.Code, w.Header(), w.Body)
	}
	return series(t, w.Body)
}

func series(t testing.TB, r io.Reader) map[string]string {
	t.Helper()
	found := map[string]string{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if line := lines.Text(); !strings.HasPrefix(line, "#") {
			at := strings.LastIndexByte(line, ' ')
			if _, twice := found[line[:at]]; twice {
				t.Errorf("twice: %s", line)
			}
			found[line[:at]] = line[at+1:]
		}
	}
	return found
}

func TestGather(t *testing.T) {
	got := scrape(t, aSnapshot(aTunnel("ipip1")))
	for series, value := range map[string]string{
		`ipipd_build_info{version="v1.2.3",goversion="` + goVersion + `"}`:                                                                    "1",
		`ipipd_tunnel_info{tunnel="ipip1",interface="ipip1",local_address="192.0.2.1",remote_address="198.51.100.1",comment="to the office"}`: "1",

		`ipipd_sandbox_info{mode="strict",landlock_abi="7",seccomp="true",no_new_privs="true",capabilities="CAP_NET_ADMIN,CAP_NET_RAW"}`: "1",

		`ipipd_config_last_reload_successful`:                                                         "1",
		`ipipd_config_last_reload_success_timestamp_seconds`:                                          "1.7e+09",
		`ipipd_dropped_packets_total{reason="unknown-peer"}`:                                          "2",
		`ipipd_dropped_packets_total{reason="receive-overflow"}`:                                      "0",
		`ipipd_dropped_icmp_messages_total{reason="outer-error-malformed"}`:                           "0",
		`ipipd_tunnel_running{tunnel="ipip1"}`:                                                        "1",
		`ipipd_tunnel_disabled{tunnel="ipip1"}`:                                                       "0",
		`ipipd_tunnel_waiting{tunnel="ipip1"}`:                                                        "0",
		`ipipd_tunnel_state_changes_total{tunnel="ipip1"}`:                                            "5",
		`ipipd_tunnel_receive_packets_total{tunnel="ipip1"}`:                                          "3",
		`ipipd_tunnel_receive_bytes_total{tunnel="ipip1"}`:                                            "300",
		`ipipd_tunnel_transmit_packets_total{tunnel="ipip1"}`:                                         "1.099511627776e+12",
		`ipipd_tunnel_transmit_bytes_total{tunnel="ipip1"}`:                                           "9.007199254740992e+15",
		`ipipd_tunnel_last_heard_timestamp_seconds{tunnel="ipip1"}`:                                   "1.70000000025e+09",
		`ipipd_tunnel_keepalive_probes_sent_total{tunnel="ipip1"}`:                                    "9",
		`ipipd_tunnel_keepalive_probes_answered_total{tunnel="ipip1"}`:                                "8",
		`ipipd_tunnel_keepalive_round_trip_seconds{tunnel="ipip1"}`:                                   "0.0015",
		`ipipd_tunnel_mtu_bytes{tunnel="ipip1"}`:                                                      "1480",
		`ipipd_tunnel_path_mtu_bytes{tunnel="ipip1"}`:                                                 "1500",
		`ipipd_tunnel_warning{tunnel="ipip1",code="peer-mtu",severity="warning"}`:                     "1",
		`ipipd_tunnel_warning{tunnel="ipip1",code="fragments",severity="note"}`:                       "1",
		`ipipd_tunnel_fast_path_active{tunnel="ipip1"}`:                                               "1",
		`ipipd_tunnel_ipsec_established{tunnel="ipip1"}`:                                              "1",
		`ipipd_tunnel_ipsec_sas_total{tunnel="ipip1"}`:                                                "2",
		`ipipd_tunnel_ipsec_established_timestamp_seconds{tunnel="ipip1"}`:                            "1.700000001e+09",
		`ipipd_tunnel_ipsec_rekey_timestamp_seconds{tunnel="ipip1"}`:                                  "1.700001801e+09",
		`ipipd_tunnel_dropped_packets_total{tunnel="ipip1",direction="transmit",reason="too-big"}`:    "7",
		`ipipd_tunnel_dropped_packets_total{tunnel="ipip1",direction="receive",reason="esp-replay"}`:  "0",
		`ipipd_tunnel_dropped_packets_total{tunnel="ipip1",direction="transmit",reason="queue-full"}`: "0",
		`ipipd_tunnel_dropped_icmp_messages_total{tunnel="ipip1",reason="icmp-limited"}`:              "4",
		`ipipd_tunnel_dropped_icmp_messages_total{tunnel="ipip1",reason="outer-error-ignored"}`:       "0",
	} {
		if got[series] != value {
			t.Errorf("%s is %q, want %q", series, got[series], value)
		}
	}
	for _, other := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes"} {
		if got[other] == "" && (other == "go_goroutines" || runtime.GOOS == "linux") {
			t.Errorf("there is no %s", other)
		}
	}
}

// Each drop reason that a tunnel, or the process, can count has one series from the start.
func TestGather_reasons(t *testing.T) {
	plain, encrypted := aTunnel("plain"), aTunnel("encrypted")
	plain.Encrypted, plain.Established = false, false
	got := scrape(t, aSnapshot(plain, encrypted))
	count := func(r drop.Reason, tunnel string) (n int) {
		for s := range got {
			if strings.Contains(s, `reason="`+r.String()+`"`) && strings.Contains(s, "{tunnel=") == (tunnel != "") && strings.Contains(s, `"`+tunnel+`"`) == (tunnel != "") {
				n++
			}
		}
		return n
	}
	for r := range drop.All() {
		of := map[string]int{"encrypted": 1, "plain": 1, "": 0}
		switch {
		case r.ByProcess():
			of = map[string]int{"": 1}
		case r.ByESP():
			of["plain"] = 0
		case r.ByManyRemotes():
			of = map[string]int{"encrypted": 0, "plain": 0, "": 0}
		}
		if r == drop.ESPNoSA || r == drop.ESPMalformed {
			of[""] = 1
		}
		for tunnel, want := range of {
			if n := count(r, tunnel); n != want {
				t.Errorf("%v: %d series of %q, want %d", r, n, tunnel, want)
			}
		}
	}
	// A reason that it should not count has one, too, once it is counted.
	plain.Drops[drop.ESPReplay] = 1
	if got := scrape(t, aSnapshot(plain)); got[`ipipd_tunnel_dropped_packets_total{tunnel="plain",direction="receive",reason="esp-replay"}`] != "1" {
		t.Error("an unexpected reason is not shown")
	}
}

// A tunnel has no series of what it does not have.
func TestGather_absent(t *testing.T) {
	plain := tunnel.Sample{Name: "plain", Started: true, WaitingFor: "route to 198.51.100.1"}
	c := tunnel.Default()
	c.Name, c.RemoteAddress = "later", "198.51.100.1"
	got := scrape(t, aSnapshot(plain, tunnel.NewSample(&c)))
	if got[`ipipd_tunnel_waiting{tunnel="plain"}`] != "1" {
		t.Error("it does not wait")
	}
	var of []string
	for s := range got {
		if strings.Contains(s, `tunnel="later"`) {
			of = append(of, s)
		}
		for _, no := range []string{"path_mtu", "ipsec", "round_trip", "answered", "warning"} {
			if strings.Contains(s, no) {
				t.Errorf("there is %s", s)
			}
		}
	}
	slices.Sort(of)
	want := []string{
		`ipipd_tunnel_disabled{tunnel="later"}`,
		`ipipd_tunnel_info{tunnel="later",interface="later",local_address="",remote_address="198.51.100.1",comment=""}`,
		`ipipd_tunnel_running{tunnel="later"}`,
	}
	if d := cmp.Diff(want, of); d != "" {
		t.Errorf("of a tunnel that is not started: %s", d)
	}
	if v := got[`ipipd_tunnel_last_heard_timestamp_seconds{tunnel="plain"}`]; v != "0" {
		t.Errorf("never heard at %q", v)
	}
	for _, s := range []*Snapshot{nil, aSnapshot()} {
		got := scrape(t, s)
		if got[`ipipd_build_info{version="v1.2.3",goversion="`+goVersion+`"}`] != "1" {
			t.Error("no build_info without tunnels")
		}
		for name := range got {
			if strings.HasPrefix(name, "ipipd_tunnel") {
				t.Errorf("without tunnels there is %s", name)
			}
		}
	}
}

// Any name and comment are escaped, and the series of a tunnel end with the tunnel.
func TestGather_series(t *testing.T) {
	odd := aTunnel("a \"b\"\\\n{x=\"y\"} 1\u00fc")
	odd.Interface, odd.Comment = "\xff\xfe", "} 7\nipipd_fake 1 \xc3"
	var now atomic.Pointer[Snapshot]
	h := serve(Options{Snapshot: now.Load})
	now.Store(aSnapshot(aTunnel("ipip1"), odd))
	w := get(t, h, "/metrics")
	var parser = expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	if families["ipipd_fake"] != nil {
		t.Error("a comment makes a metric")
	}
	info := families["ipipd_tunnel_info"].Metric
	values := map[string]string{}
	for _, l := range info[0].Label {
		values[l.GetName()] = l.GetValue()
	}
	want := map[string]string{"tunnel": odd.Name, "interface": "\ufffd", "comment": "} 7\nipipd_fake 1 \ufffd", "local_address": odd.LocalAddress, "remote_address": odd.RemoteAddress}
	if d := cmp.Diff(want, values); d != "" || len(info) != 2 {
		t.Errorf("%d tunnels, %s", len(info), d)
	}
	now.Store(aSnapshot(aTunnel("ipip1")))
	for s := range series(t, get(t, h, "/metrics").Body) {
		if strings.Contains(s, "fc") || strings.Contains(s, "\u00fc") {
			t.Errorf("left of a tunnel that is gone: %s", s)
		}
	}
}

// Concurrent scrapes are each complete.
func TestGather_concurrent(t *testing.T) {
	h := serve(Options{Snapshot: func() *Snapshot { return aSnapshot(aTunnel("ipip1"), aTunnel("ipip2")) }})
	ours := func() string {
		text, _, _ := strings.Cut(get(t, h, "/metrics").Body.String(), "# HELP go_")
		return text
	}
	want := ours()
	if !strings.Contains(want, `ipipd_tunnel_running{tunnel="ipip2"} 1`) {
		t.Fatal(want)
	}
	var scrapes sync.WaitGroup
	for range maxScrapes {
		scrapes.Go(func() {
			for range 20 {
				if got := ours(); got != want {
					t.Errorf("another: %s", cmp.Diff(want, got))
					return
				}
			}
		})
	}
	scrapes.Wait()
}

// The families keep the conventions of promlint, and what prometheus.Registry would check.
func TestGather_conventions(t *testing.T) {
	families := gather("v1.2.3", aSnapshot(aTunnel("ipip1"), aTunnel("ipip2"), aTunnelOfMany("many")))
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	seen := map[string]bool{}
	for _, f := range families {
		name := f.GetName()
		if seen[name] || len(f.Metric) == 0 || !model.LegacyValidation.IsValidMetricName(name) || !strings.HasPrefix(name, "ipipd_") {
			t.Errorf("%s: twice, without series, or no name", name)
		}
		seen[name] = true
		for _, m := range f.Metric {
			id := "series " + name
			for _, l := range m.Label {
				id += "," + l.GetName() + "=" + l.GetValue()
				if f.GetType() == dto.MetricType_COUNTER && strings.Contains(l.GetName(), "address") {
					t.Errorf("%s is a counter with an address as a label", name)
				}
			}
			if seen[id] {
				t.Errorf("twice: %s", id)
			}
			seen[id] = true
			if (m.Counter != nil) != (f.GetType() == dto.MetricType_COUNTER) || (m.Gauge != nil) != (f.GetType() == dto.MetricType_GAUGE) {
				t.Errorf("%s: a series of another type", id)
			}
		}
	}
}

func TestSeconds(t *testing.T) {
	if got := seconds(time.Time{}); got != 0 {
		t.Errorf("no time is %v", got)
	}
	if got := seconds(time.Unix(-5, 0)); got != -5 {
		t.Errorf("%v", got)
	}
}

func BenchmarkGather(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			var tunnels []tunnel.Sample
			for i := range n {
				tunnels = append(tunnels, aTunnel("ipip"+strconv.Itoa(i)))
			}
			h := serve(Options{Snapshot: func() *Snapshot { return aSnapshot(slices.Clone(tunnels)...) }})
			b.ReportAllocs()
			for b.Loop() {
				w := &discard{header: http.Header{}}
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
				b.ReportMetric(float64(w.n), "bytes")
			}
		})
	}
}

// discard counts the bytes of an answer.
type discard struct {
	header http.Header
	n      int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(int)             {}
func (d *discard) Write(p []byte) (int, error) { d.n += len(p); return len(p), nil }

// A tunnel with many remotes has series of the reasons that only it has, from the start, and counts of its
// remotes; one with a single remote has neither.
func TestSampledReasons_many(t *testing.T) {
	many := tunnel.Sample{Name: "many", Started: true, RemoteAddress: tunnel.AnyRemote, Remotes: &tunnel.Remotes{Count: 3, NotOK: 1, Prefixes: 7}}
	encrypted := many
	encrypted.Name, encrypted.Encrypted = "encrypted", true
	series := scrape(t, aSnapshot(many, encrypted, tunnel.Sample{Name: "one", Started: true}))
	have := func(name, reason string) bool {
		for s := range series {
			if strings.Contains(s, `tunnel="`+name+`"`) && strings.Contains(s, `reason="`+reason+`"`) {
				return true
			}
		}
		return false
	}
	for r := range drop.All() {
		if name := r.String(); r.ByManyRemotes() && (!have("many", name) || !have("encrypted", name) || have("one", name)) {
			t.Errorf("%s: %v %v %v", name, have("many", name), have("encrypted", name), have("one", name))
		} else if r.ByESP() && (have("many", name) || !have("encrypted", name)) {
			t.Errorf("%s: %v %v", name, have("many", name), have("encrypted", name))
		}
	}
	for s, want := range map[string]string{
		`ipipd_tunnel_remotes{tunnel="many"}`: "3", `ipipd_tunnel_remotes_not_ok{tunnel="many"}`: "1", `ipipd_tunnel_prefixes{tunnel="many"}`: "7", `ipipd_tunnel_remotes{tunnel="one"}`: "",
	} {
		if series[s] != want {
			t.Errorf("%s is %q, want %q", s, series[s], want)
		}
	}
}

// Listed remotes have series, and the rest is counted as omitted; a tunnel that lists none has neither.
func TestGather_remotes(t *testing.T) {
	counted := aTunnelOfMany("counted")
	counted.Remotes = &tunnel.Remotes{Count: 5}
	got := scrape(t, aSnapshot(aTunnelOfMany("many"), counted))
	var of []string
	for s, value := range got {
		if strings.HasPrefix(s, "ipipd_tunnel_remote_") || strings.HasPrefix(s, "ipipd_tunnel_remotes_omitted") {
			of = append(of, s+" "+value)
		}
	}
	slices.Sort(of)
	want := []string{
		`ipipd_tunnel_remote_last_heard_timestamp_seconds{tunnel="many",remote_address="198.51.100.1"} 1.7e+09`,
		`ipipd_tunnel_remote_last_heard_timestamp_seconds{tunnel="many",remote_address="198.51.100.7"} 0`,
		`ipipd_tunnel_remote_ok{tunnel="many",remote_address="198.51.100.1"} 1`,
		`ipipd_tunnel_remote_ok{tunnel="many",remote_address="198.51.100.7"} 0`,
		`ipipd_tunnel_remote_path_mtu_bytes{tunnel="many",remote_address="198.51.100.1"} 1500`,
		`ipipd_tunnel_remote_prefixes{tunnel="many",remote_address="198.51.100.1"} 3`,
		`ipipd_tunnel_remote_prefixes{tunnel="many",remote_address="198.51.100.7"} 2`,
		`ipipd_tunnel_remotes_omitted{tunnel="many"} 3`,
	}
	if d := cmp.Diff(want, of); d != "" {
		t.Error(d)
	}
}
