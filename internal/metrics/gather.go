package metrics

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	dto "github.com/prometheus/client_model/go"

	"ipipd/internal/drop"
	"ipipd/internal/sandbox"
	"ipipd/internal/tunnel"
)

// builder makes metrics in a few large allocations, not in several for each.
type builder struct {
	families []*dto.MetricFamily
	metrics  []dto.Metric
	counters []dto.Counter
	gauges   []dto.Gauge
	values   []float64
	labels   []*dto.LabelPair
	current  *family
}

// pieces is how many elements are allocated at a time.
const pieces = 1024

// piece returns the next unused element of *from, which it allocates anew when all are used.
func piece[T any](from *[]T) *T {
	if len(*from) == 0 {
		*from = make([]T, pieces)
	}
	next := &(*from)[0]
	*from = (*from)[1:]
	return next
}

// family begins a family of about n series.
func (b *builder) family(f *family, n int) {
	b.current = f
	kind := dto.MetricType_GAUGE
	if f.counter {
		kind = dto.MetricType_COUNTER
	}
	b.families = append(b.families, &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: &kind, Metric: make([]*dto.Metric, 0, n)})
}

// add adds a series to the family that was begun last. The label pairs must not be changed afterwards.
func (b *builder) add(value float64, labels ...*dto.LabelPair) {
	if len(b.labels) < len(labels) {
		b.labels = make([]*dto.LabelPair, pieces)
	}
	n := copy(b.labels, labels)
	m := piece(&b.metrics)
	m.Label, b.labels = b.labels[:n:n], b.labels[n:]
	v := piece(&b.values)
	*v = value
	if b.current.counter {
		m.Counter = piece(&b.counters)
		m.Counter.Value = v
	} else {
		m.Gauge = piece(&b.gauges)
		m.Gauge.Value = v
	}
	f := b.families[len(b.families)-1]
	f.Metric = append(f.Metric, m)
}

// label returns a label pair. A value that is not UTF-8, as an interface's name can be, would make the
// whole scrape fail: it is made valid.
func label(name, value string) *dto.LabelPair {
	value = strings.ToValidUTF8(value, "\ufffd")
	return &dto.LabelPair{Name: &name, Value: &value}
}

var reasonLabels, directionLabels = func() (reasons, directions [drop.NumReasons]*dto.LabelPair) {
	for r := range drop.All() {
		reasons[r], directions[r] = label("reason", r.String()), label("direction", string(r.Direction()))
	}
	return reasons, directions
}()

// gather makes the metrics of a Snapshot; if it is nil, before there are tunnels, those that need none.
func gather(version string, s *Snapshot) []*dto.MetricFamily {
	b := &builder{}
	b.family(&buildInfo, 1)
	b.add(1, label("version", version), label("goversion", goVersion))
	if s == nil {
		return b.families
	}
	b.family(&sandboxInfo, 1)
	b.add(1, sandboxLabels(&s.Sandbox)...)
	for i := range processFamilies {
		f := &processFamilies[i]
		b.family(&f.family, 1)
		b.add(f.value(s))
	}
	b.drops(&drops, s.Drops[:], processPackets[:])
	b.drops(&messages, s.Drops[:], processMessages[:])
	if len(s.Tunnels) > 0 { // a family without series is not allowed
		b.tunnels(s.Tunnels)
	}
	return b.families
}

// sandboxLabels returns the labels of sandboxInfo.
func sandboxLabels(s *sandbox.State) []*dto.LabelPair {
	names := make([]string, len(s.Capabilities))
	for i, c := range s.Capabilities {
		names[i] = c.Name
	}
	return []*dto.LabelPair{
		label("mode", s.Mode), label("landlock_abi", strconv.Itoa(s.Landlock)), label("seccomp", strconv.FormatBool(s.Seccomp)),
		label("no_new_privs", strconv.FormatBool(s.NoNewPrivs)), label("capabilities", strings.Join(names, ",")),
	}
}

// drops adds a family of the process's drops: the reasons of always, and others that have counted something.
func (b *builder) drops(f *family, counts []uint64, always []bool) {
	b.family(f, len(counts))
	packets := f == &drops
	for r := range drop.All() {
		if (r.Direction() != "") == packets && (always[r] || counts[r] > 0) {
			b.add(float64(counts[r]), reasonLabels[r])
		}
	}
}

// tunnels adds the families of tunnels.
func (b *builder) tunnels(samples []tunnel.Sample) {
	tunnels := make([]*tunnel.Sample, len(samples))
	for i := range samples {
		tunnels[i] = &samples[i]
	}
	slices.SortFunc(tunnels, func(x, y *tunnel.Sample) int { return cmp.Compare(x.Name, y.Name) })
	names := make([]*dto.LabelPair, len(tunnels))
	b.family(&tunnelInfo, len(tunnels))
	for i, t := range tunnels {
		names[i] = label("tunnel", t.Name)
		b.add(1, names[i], label("interface", t.Interface), label("local_address", t.LocalAddress),
			label("remote_address", t.RemoteAddress), label("comment", t.Comment))
	}
	for i := range tunnelFamilies {
		f := &tunnelFamilies[i]
		b.family(&f.family, len(tunnels))
		for j := range tunnels {
			if v, ok := f.value(tunnels[j]); ok {
				b.add(v, names[j])
			}
		}
		b.removeEmpty()
	}
	b.remotes(tunnels, names)
	b.family(&tunnelWarnings, 0)
	for i := range tunnels {
		for _, w := range tunnels[i].Warnings {
			b.add(1, names[i], label("code", w.Code), label("severity", string(w.Severity)))
		}
	}
	b.removeEmpty()
	b.family(&tunnelDrops, len(tunnels)*int(drop.NumReasons))
	for i := range tunnels {
		always, _ := sampledReasons(tunnels[i])
		for r := range drop.All() {
			if n := tunnels[i].Drops[r]; r.Direction() != "" && (always[r] || n > 0) {
				b.add(float64(n), names[i], directionLabels[r], reasonLabels[r])
			}
		}
	}
	b.removeEmpty()
	b.family(&tunnelMessages, len(tunnels)*8)
	for i := range tunnels {
		_, always := sampledReasons(tunnels[i])
		for r := range drop.All() {
			if n := tunnels[i].Drops[r]; r.Direction() == "" && (always[r] || n > 0) {
				b.add(float64(n), names[i], reasonLabels[r])
			}
		}
	}
	b.removeEmpty()
}

// remotes adds the families of remotes, of the tunnels that list them.
func (b *builder) remotes(tunnels []*tunnel.Sample, names []*dto.LabelPair) {
	var labels [][2]*dto.LabelPair
	var remotes []*tunnel.Remote
	for i, t := range tunnels {
		list := remotesOf(t).List
		for j := range list {
			remotes = append(remotes, &list[j])
			labels = append(labels, [2]*dto.LabelPair{names[i], label("remote_address", list[j].Address)})
		}
	}
	for i := range remoteFamilies {
		f := &remoteFamilies[i]
		b.family(&f.family, len(remotes))
		for j, r := range remotes {
			if v, ok := f.value(r); ok {
				b.add(v, labels[j][:]...)
			}
		}
		b.removeEmpty()
	}
}

// removeEmpty removes the family that was begun last if it has no series, which is not allowed.
func (b *builder) removeEmpty() {
	if last := len(b.families) - 1; len(b.families[last].Metric) == 0 {
		b.families = b.families[:last]
	}
}
