package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// results are the samples by tunnel and underlay, in the order of the rounds.
type results struct {
	samples map[row][]sample
	skipped map[row][]string // the reasons of missing values, each once
}

type row struct {
	tunnel  string
	segment bool
}

func newResults() *results {
	return &results{samples: map[row][]sample{}, skipped: map[row][]string{}}
}

func (r *results) add(t tunnel, segment bool, s sample) {
	k := row{t.name, segment}
	r.samples[k] = append(r.samples[k], s)
}

func (r *results) skip(t tunnel, segment bool, why string) {
	k := row{t.name, segment}
	if !slices.Contains(r.skipped[k], why) {
		r.skipped[k] = append(r.skipped[k], why)
	}
}

// A metric is a column of the tables and a panel of the chart.
type metric struct {
	title string
	unit  string
	lower bool // lower is better
	value func(sample) float64
}

var metrics = []metric{
	{"TCP, 1 stream", "Gb/s", false, func(s sample) float64 { return s.tcp1 }},
	{"TCP, 4 streams", "Gb/s", false, func(s sample) float64 { return s.tcp4 }},
	{"UDP, 64 bytes", "kpps", false, func(s sample) float64 { return s.udp }},
	{"ping", "µs", true, func(s sample) float64 { return s.rtt }},
	{"ping under TCP", "µs", true, func(s sample) float64 { return s.loaded }},
	{"95 % of them within", "µs", true, func(s sample) float64 { return s.loadedP95 }},
}

// median of the rounds with a value; NaN if there is none.
func (r *results) median(t tunnel, segment bool, m metric) float64 {
	var v []float64
	for _, s := range r.samples[row{t.name, segment}] {
		if x := m.value(s); !math.IsNaN(x) {
			v = append(v, x)
		}
	}
	return median(v)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// formatValue formats a value with about three significant digits, or "–" for NaN.
func formatValue(x float64) string {
	switch {
	case math.IsNaN(x):
		return "–"
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

// markdown returns the tables, one for each underlay, with the date and the machine.
func (b *bench) markdown(ctx context.Context) string {
	var w strings.Builder
	fmt.Fprintf(&w, "Measured on %s. %s.\n", time.Now().Format("2 January 2006"), machine(ctx))
	fmt.Fprintf(&w, "Medians of %d rounds, %d s for each bulk measurement. Two namespaces joined by a veth pair, MTU 1500; TCP by %s; %s.\n",
		b.rounds, int(b.duration/time.Second), b.congestion, strings.Join(b.versions(ctx), ", "))
	for _, segment := range b.segment {
		if segment {
			w.WriteString("\n**Segmenting underlay**: no TSO and no GSO on it, so that every packet crosses by itself, as on a wire; the receiver has GRO, as every NIC.\n\n")
		} else {
			w.WriteString("\n**Bare veth**: superpackets of up to 64 KiB cross whole, which flatters the kernel's own tunnels.\n\n")
		}
		w.WriteString("| tunnel | inner MTU |")
		for _, m := range metrics {
			fmt.Fprintf(&w, " %s, %s |", m.title, m.unit)
		}
		w.WriteString("\n| --- | ---: |" + strings.Repeat(" ---: |", len(metrics)) + "\n")
		for _, t := range b.tunnels() {
			fmt.Fprintf(&w, "| %s | %d |", t.title, t.mtu)
			for _, m := range metrics {
				fmt.Fprintf(&w, " %s |", formatValue(b.results.median(t, segment, m)))
			}
			w.WriteString("\n")
		}
	}
	if notes := b.notMeasured(); len(notes) > 0 {
		w.WriteString("\nNot measured (–):\n\n")
		for _, n := range notes {
			fmt.Fprintf(&w, "- %s\n", n)
		}
	}
	return w.String()
}

func (b *bench) notMeasured() []string {
	var notes []string
	for _, t := range b.tunnels() {
		for _, segment := range b.segment {
			for _, why := range b.results.skipped[row{t.name, segment}] {
				if n := t.title + ": " + why; !slices.Contains(notes, n) {
					notes = append(notes, n)
				}
			}
		}
	}
	return notes
}

func (b *bench) csv() string {
	var w strings.Builder
	w.WriteString("underlay,tunnel,inner_mtu,round,tcp1_gbps,tcp4_gbps,udp_kpps,rtt_us,rtt_loaded_us,rtt_loaded_p95_us\n")
	for _, segment := range b.segment {
		for _, t := range b.tunnels() {
			for i, s := range b.results.samples[row{t.name, segment}] {
				fmt.Fprintf(&w, "%s,%s,%d,%d", underlayName(segment), t.name, t.mtu, i+1)
				for _, m := range metrics {
					if x := m.value(s); math.IsNaN(x) {
						w.WriteString(",")
					} else {
						fmt.Fprintf(&w, ",%.4g", x)
					}
				}
				w.WriteString("\n")
			}
		}
	}
	return w.String()
}

// write writes the results to the directory -out, and to the file -readme if given.
func (b *bench) write(ctx context.Context) error {
	tables := b.markdown(ctx)
	fmt.Print("\n", tables)
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{"peers.md": tables, "peers.csv": b.csv(), "peers.svg": b.chart()} {
		if err := os.WriteFile(filepath.Join(b.out, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	fmt.Printf("\nwritten: peers.md, peers.svg and peers.csv in %s\n", b.out)
	if b.readme == "" {
		return nil
	}
	chart, err := filepath.Rel(filepath.Dir(b.readme), filepath.Join(b.out, "peers.svg"))
	if err != nil {
		return err
	}
	old, err := os.ReadFile(b.readme)
	if err != nil {
		return err
	}
	text, err := between(string(old), fmt.Sprintf("![The same figures as a chart](%s)\n\n%s", filepath.ToSlash(chart), tables))
	if err != nil {
		return fmt.Errorf("%s: %w", b.readme, err)
	}
	return os.WriteFile(b.readme, []byte(text), 0o644)
}

// between replaces the part of text between the bench marks.
func between(text, with string) (string, error) {
	const start, end = "<!-- bench -->", "<!-- /bench -->"
	before, rest, ok1 := strings.Cut(text, start)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		return "", fmt.Errorf("no line %s followed by a line %s", start, end)
	}
	return before + start + "\n" + with + end + after, nil
}

// machine returns the processor, the architecture and the kernel.
func machine(ctx context.Context) string {
	kernel, err := output(ctx, "uname", "-sr")
	if err != nil {
		kernel = []byte("unknown kernel")
	}
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("%s, %d cores, %s, %s", model, runtime.NumCPU(), runtime.GOARCH, strings.TrimSpace(string(kernel)))
}

// versions returns the versions of the measured programs and of iperf3.
func (b *bench) versions(ctx context.Context) []string {
	var v []string
	first := func(name, program string, args ...string) {
		if b.tools[name] == "" && name != "iperf3" || name != "iperf3" && !b.measured(name) {
			return
		}
		out, err := output(ctx, program, args...)
		if err != nil {
			return
		}
		for _, word := range strings.Fields(string(out)) {
			if strings.ContainsAny(word, "0123456789") || word == "devel" {
				v = append(v, name+" "+strings.Trim(word, ",()"))
				return
			}
		}
	}
	first("ipipd", b.ipipd, "version")
	first("older", b.older, "version")
	first("socat", b.tools["socat"], "-V")
	first("fastd", b.tools["fastd"], "--version")
	first("openvpn", b.tools["openvpn"], "--version")
	first("iperf3", "iperf3", "--version")
	if path := b.tools["wireguard-go"]; path != "" && b.measured("wireguard-go") {
		if out, err := output(ctx, "go", "version", "-m", path); err == nil {
			for line := range strings.Lines(string(out)) {
				if f := strings.Fields(line); len(f) >= 3 && f[0] == "mod" {
					v = append(v, "wireguard-go "+f[2])
				}
			}
		}
	}
	return v
}

func (b *bench) measured(name string) bool {
	return len(b.results.samples[row{name, false}])+len(b.results.samples[row{name, true}]) > 0
}
