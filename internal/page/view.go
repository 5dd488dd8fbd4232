package page

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/history"
	"ipipd/internal/tunnel"
)

// view is the data of page.html, unescaped: the template escapes it.
type view struct {
	Title, Version string
	Root           string // begins relative links
	Time, Clock    string // when the samples were read

	// The page of all tunnels.
	Summary string
	Rows    []row

	// The page of one tunnel.
	Row     *row
	Missing string // why Row is nil
	Charts  []chart
	Facts   []fact

	Warnings     []warned
	DroppedTitle string
	Dropped      []dropped
}

// row is a tunnel's row of the table.
type row struct {
	Name, Link, Comment, Remote, Path, IPsec string

	Warnings string // codes of the warnings that are more than notes

	Place                              int // position when sorted by name
	State                              state
	In, Out, Heard, RoundTrip, PathMTU number
	Drops                              lost
	Spark                              *spark // nil while there is no history
}

// number is a number to sort by, and the text that is shown for it.
type number struct {
	Key  int64
	Text string
}

// noNumber is the number of a cell that stays empty, such as the path MTU of a tunnel that is not started.
var noNumber = number{Key: -1}

// lost is a rate of drops.
type lost struct {
	number
	Lost   bool
	Reason string
}

// state is a tunnel's state, as one of a few words. A worse one has a lower Rank.
type state struct {
	Rank             int
	Word, Class, Why string
}

// spark is the SVG paths of a row's drawing.
type spark struct{ In, Out, Drops string }

// chart is one drawing of a tunnel's page.
type chart struct {
	Name, Max string
	Width     int
	Keys      []key
	Paths     []path
}

type key struct{ Class, Text string }
type path struct{ Class, D string }
type fact struct{ Name, Value string }
type warned struct {
	Code, Severity, Since, Detail string
	Text, Remedy                  []span
}
type dropped struct {
	Reason, Rate string
	Count        uint64
	Why, Remedy  []span
}

// span is a part of a text: code, if it was between backquotes.
type span struct {
	Text string
	Code bool
}

// newView begins a view. mu is held, as in all other methods of Page in this file.
func (p *Page) newView(root string) view {
	v := view{Version: p.options.Version, Root: root, Title: "ipipd"}
	if p.options.Host != "" {
		v.Title += " on " + p.options.Host
	}
	v.Time, v.Clock = p.taken.Format("2006-01-02 15:04:05 MST"), p.taken.Format(time.TimeOnly)
	return v
}

const starting = "The tunnels are being started."

// indexView returns the view of all tunnels.
func (p *Page) indexView() view {
	v := p.newView("")
	if p.samples == nil {
		v.Summary = starting
		return v
	}
	v.Rows = make([]row, len(p.samples.Tunnels))
	for i := range v.Rows {
		v.Rows[i] = p.row(&p.samples.Tunnels[i])
	}
	slices.SortFunc(v.Rows, func(a, b row) int { return p.options.Compare(a.Name, b.Name) })
	count, warn := map[string]int{}, 0
	var in, out, drops float64
	for i := range v.Rows {
		r := &v.Rows[i]
		r.Place = i
		count[r.State.Word]++
		if r.Warnings != "" {
			warn++
		}
		if h := p.histories[r.Name]; h != nil {
			rate, _ := h.Rate(window)
			in, out, drops = in+rate.RxBytes*8, out+rate.TxBytes*8, drops+rate.Drops
		}
	}
	var states []string
	for _, word := range []string{"running", "lost", "never-heard", "no-sa", "down", "waiting", "disabled"} {
		if count[word] > 0 {
			states = append(states, fmt.Sprint(count[word], " ", word))
		}
	}
	if warn > 0 {
		states = append(states, fmt.Sprint(warn, " with warnings"))
	}
	tunnels := "tunnels"
	if len(v.Rows) == 1 {
		tunnels = "tunnel"
	}
	v.Summary = fmt.Sprintf("%d %s: %s; in %sbit/s, out %sbit/s, %s drops/s.", len(v.Rows), tunnels, cmp.Or(strings.Join(states, ", "), "none"), metric(in), metric(out), strings.TrimSpace(metric(drops)))
	v.DroppedTitle, v.Dropped = "Drops that belong to no tunnel", reasonsOf(&p.samples.Drops, drop.None, 0)
	return v
}

// tunnelView returns the view of the tunnel of that name.
func (p *Page) tunnelView(name string) view {
	v := p.newView("../")
	s := p.findLocked(name)
	switch {
	case p.samples == nil:
		v.Missing = starting
		return v
	case s == nil:
		v.Missing = "There is no tunnel " + valid(name) + ": it has ended, or never was."
		return v
	}
	r := p.row(s)
	v.Row = &r
	v.Title = r.Name + " - " + v.Title
	v.Facts = p.facts(s)
	for _, w := range s.Warnings {
		v.Warnings = append(v.Warnings, warned{
			Code: w.Code, Severity: string(w.Severity), Since: clock(w.Since), Detail: valid(w.Detail),
			Text: spans(valid(w.Text)), Remedy: spans(valid(w.Remedy)),
		})
	}
	top, rate := drop.None, 0.0
	if h := p.histories[s.Name]; h != nil {
		now, _ := h.Rate(window)
		v.Charts = charts(p.series(h, Interval), now)
		top, rate = h.TopDrop(window)
	}
	v.DroppedTitle, v.Dropped = "Drops", reasonsOf(&s.Drops, top, rate)
	return v
}

// seriesEnd returns the end of the interval of length step that was under way a moment before the last reading. Intervals
// are counted from the first reading, so that a complete one does not change any more.
func (p *Page) seriesEnd(step time.Duration) time.Time {
	const moment = Interval / 4
	return p.started.Add((p.last.Sub(p.started) - moment + step - 1) / step * step)
}

// valid returns text with what is not UTF-8 replaced: an interface's name can be any bytes.
func valid(text string) string { return strings.ToValidUTF8(text, "\ufffd") }

// clock formats a time in this host's zone.
func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 MST") }

// row returns the tunnel's row of the table.
func (p *Page) row(s *tunnel.Sample) row {
	r := row{
		Name: valid(s.Name), Link: url.PathEscape(s.Name), Comment: valid(s.Comment), Remote: valid(s.RemoteAddress),
		State: stateOf(s), In: noNumber, Out: noNumber, Heard: noNumber, RoundTrip: noNumber, PathMTU: noNumber, Drops: lost{number: noNumber},
	}
	if !s.Started {
		return r
	}
	var codes []string
	for _, w := range s.Warnings {
		if w.Severity != "note" {
			codes = append(codes, w.Code)
		}
	}
	r.Warnings = strings.Join(codes, ", ")
	r.Path = "userspace"
	if s.FastPath {
		r.Path = "fast path"
	}
	r.IPsec = ipsec(s)
	r.Heard = number{Key: 1 << 53, Text: "never"}
	if !s.LastHeard.IsZero() {
		ago := max(0, p.taken.Sub(s.LastHeard))
		r.Heard = number{Key: int64(ago / time.Second), Text: age(ago)}
	}
	if s.RoundTrip > 0 {
		r.RoundTrip = number{Key: int64(s.RoundTrip / time.Microsecond), Text: metric(s.RoundTrip.Seconds()*1000) + "ms"}
	}
	if s.PathMTU > 0 {
		r.PathMTU = number{Key: int64(s.PathMTU), Text: fmt.Sprint(s.PathMTU)}
	}
	h := p.histories[s.Name]
	if h == nil {
		return r
	}
	if rate, ok := h.Rate(window); ok {
		bits := func(bytes float64) number {
			return number{Key: int64(bytes * 8), Text: strings.TrimSpace(metric(bytes * 8))}
		}
		r.In, r.Out = bits(rate.RxBytes), bits(rate.TxBytes)
		r.Drops = lost{number: number{Key: int64(rate.Drops * 1000), Text: strings.TrimSpace(metric(rate.Drops))}, Lost: rate.Drops > 0}
		if top, n := h.TopDrop(window); n > 0 {
			r.Drops.Reason = top.String()
		}
	}
	r.Spark = sparkline(p.series(h, 2*Interval))
	return r
}

// series returns the rates of a history over Span, by intervals of length step. They are valid until the next call.
func (p *Page) series(h *history.History, step time.Duration) *columns {
	p.rates = h.Series(p.rates[:0], p.seriesEnd(step), step, int(Span/step))
	p.columns.fill(p.rates)
	return &p.columns
}

// stateOf returns a tunnel's state, in the words of `ipipd monitor`.
func stateOf(s *tunnel.Sample) state {
	waits := ""
	if s.WaitingFor != "" {
		waits = "for " + valid(s.WaitingFor)
	}
	if !s.Disabled && !s.Started {
		return state{0, "down", "down", "it is not started"}
	}
	switch word := s.State(); word {
	case "disabled":
		if s.Started {
			return state{2, word, "disabled", "somebody has set its interface down"}
		}
		return state{2, word, "disabled", ""}
	case "running":
		return state{3, word, "running", waits}
	case "waiting":
		return state{1, word, "waiting", waits}
	case "no-sa":
		return state{0, word, "down", "IKE has no SA with the peer"}
	case "lost":
		return state{0, word, "down", "the peer is not heard any more"}
	case "never-heard":
		return state{0, word, "down", "the peer was never heard"}
	default:
		return state{0, word, "down", "its interface has no carrier"}
	}
}

func ipsec(s *tunnel.Sample) string {
	switch {
	case !s.Encrypted:
		return ""
	case !s.Established:
		return "no SA"
	}
	return "established"
}

// facts returns what is known of a tunnel besides its rates.
func (p *Page) facts(s *tunnel.Sample) (facts []fact) {
	add := func(name, value string) {
		if value != "" {
			facts = append(facts, fact{name, valid(value)})
		}
	}
	add("Local address", s.LocalAddress)
	add("Remote address", s.RemoteAddress)
	if r := s.Remotes; r != nil {
		remotes := fmt.Sprint(r.Count)
		if r.NotOK > 0 {
			remotes += fmt.Sprintf(", %d not ok", r.NotOK)
		}
		add("Remotes", remotes)
		add("Prefixes", fmt.Sprint(r.Prefixes))
	}
	if s.Interface != s.Name {
		add("Interface", s.Interface)
	}
	if !s.Started {
		return facts
	}
	add("MTU", fmt.Sprint(s.MTU))
	if s.PathMTU > 0 {
		add("Path MTU", fmt.Sprint(s.PathMTU))
	}
	r := p.row(s)
	add("Path", r.Path)
	if s.LastHeard.IsZero() {
		add("Last heard", "never")
	} else {
		add("Last heard", clock(s.LastHeard)+", "+r.Heard.Text+" ago")
	}
	if s.ProbesHaveAnswers {
		add("Keepalive probes", fmt.Sprintf("%d sent, %d answered", s.ProbesSent, s.ProbesAnswered))
	} else if s.ProbesSent > 0 {
		add("Keepalive probes", fmt.Sprintf("%d sent", s.ProbesSent))
	}
	add("Round trip", r.RoundTrip.Text)
	add("Changes of the carrier", fmt.Sprint(s.StateChanges))
	add("Received", fmt.Sprintf("%d packets, %sB", s.RxPackets, metric(float64(s.RxBytes))))
	add("Sent", fmt.Sprintf("%d packets, %sB", s.TxPackets, metric(float64(s.TxBytes))))
	add("IPsec", r.IPsec)
	if s.Established {
		add("SA in use", fmt.Sprintf("since %s, to be replaced %s; pair %d", clock(s.Since), clock(s.RekeyAt), s.SAs))
	}
	return facts
}

// reasonsOf returns the reasons whose count is not zero. rate is the present rate of top.
func reasonsOf(counts *drop.Counts, top drop.Reason, rate float64) (all []dropped) {
	for r := range drop.All() {
		if counts[r] == 0 {
			continue
		}
		d := dropped{Reason: r.String(), Why: spans(r.Why()), Remedy: spans(r.Remedy()), Count: counts[r]}
		if r == top && rate > 0 {
			d.Rate = strings.TrimSpace(metric(rate)) + "/s now"
		}
		all = append(all, d)
	}
	return all
}

func spans(text string) (all []span) {
	for i, part := range strings.Split(text, "`") {
		all = append(all, span{Text: part, Code: i%2 == 1})
	}
	return all
}

// columns is rates turned into one slice for each counter.
type columns struct{ rxBytes, txBytes, rxPackets, txPackets, drops []float64 }

// fill replaces the content of c, and reuses its memory.
func (c *columns) fill(rates []history.Rate) {
	c.rxBytes, c.txBytes, c.rxPackets, c.txPackets, c.drops = c.rxBytes[:0], c.txBytes[:0], c.rxPackets[:0], c.txPackets[:0], c.drops[:0]
	for i := range rates {
		r := &rates[i]
		c.rxBytes, c.txBytes = append(c.rxBytes, r.RxBytes), append(c.txBytes, r.TxBytes)
		c.rxPackets, c.txPackets = append(c.rxPackets, r.RxPackets), append(c.txPackets, r.TxPackets)
		c.drops = append(c.drops, r.Drops)
	}
}

// sparkline draws a row: both directions on one scale, and drops on their own.
func sparkline(c *columns) *spark {
	top := max(peak(c.rxBytes), peak(c.txBytes))
	return &spark{
		In:    area(c.rxBytes, top, sparkHeight, sparkStep),
		Out:   steps(c.txBytes, top, sparkHeight, sparkStep),
		Drops: area(c.drops, 2*peak(c.drops), sparkHeight, sparkStep),
	}
}

// charts draws the charts of a tunnel's page; now has the numbers beside them.
func charts(c *columns, now history.Rate) []chart {
	width := len(c.drops) * chartStep
	both := func(name, unit string, factor float64, rx, tx []float64, rxNow, txNow float64) chart {
		top := roundUp(max(peak(rx), peak(tx)) * factor)
		return chart{
			Name: name, Max: metric(top) + unit, Width: width,
			Keys:  []key{{"in", "in " + metric(rxNow*factor) + unit}, {"out", "out " + metric(txNow*factor) + unit}},
			Paths: []path{{"in", area(rx, top/factor, chartHeight, chartStep)}, {"out", steps(tx, top/factor, chartHeight, chartStep)}},
		}
	}
	top := roundUp(peak(c.drops))
	return []chart{
		both("Bits", "bit/s", 8, c.rxBytes, c.txBytes, now.RxBytes, now.TxBytes),
		both("Packets", "/s", 1, c.rxPackets, c.txPackets, now.RxPackets, now.TxPackets),
		{
			Name: "Drops", Max: metric(top) + "/s", Width: width,
			Keys:  []key{{"drop", metric(now.Drops) + "/s"}},
			Paths: []path{{"drop", area(c.drops, top, chartHeight, chartStep)}},
		},
	}
}

// age formats a duration in its two largest units.
func age(d time.Duration) string {
	switch s := int64(d / time.Second); {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 60*60:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 24*60*60:
		return fmt.Sprintf("%d h %d min", s/60/60, s/60%60)
	default:
		return fmt.Sprintf("%d d %d h", s/60/60/24, s/60/60%24)
	}
}
