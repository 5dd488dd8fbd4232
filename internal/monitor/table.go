package monitor

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// column is a column of the table. Columns that a terminal has no room for are left out, the highest rank first.
type column struct {
	title string
	rank  int
	width int
	// wider is how much more it takes if there is room.
	wider int
	right bool
	cell  func(t *Tunnel, v *cellView) (string, Style)
	// order compares two tunnels, those that want attention first; nil sorts by name.
	order func(a, b *Tunnel) int
}

// cellView is what a cell depends on besides its tunnel.
type cellView struct {
	*Options
	now      time.Time
	interval time.Duration
	width    int // of the cell
}

// gap is how many blanks are between two columns.
const gap = 2

func rateCell(of func(*Tunnel) float64) func(*Tunnel, *cellView) (string, Style) {
	return func(t *Tunnel, _ *cellView) (string, Style) {
		if !t.hasRates {
			return "-", Dim
		}
		return si(of(t)), Plain
	}
}

func byRate(of func(*Tunnel) float64) func(a, b *Tunnel) int {
	return func(a, b *Tunnel) int { return cmp.Compare(of(b), of(a)) }
}

func rateColumn(title string, rank int, of func(*Tunnel) float64) column {
	return column{title: title, rank: rank, width: max(5, len(title)), right: true, cell: rateCell(of), order: byRate(of)}
}

func flagCell(of func(*Tunnel) string) func(*Tunnel, *cellView) (string, Style) {
	return func(t *Tunnel, _ *cellView) (string, Style) {
		if text := of(t); text != "" && t.Fresh && t.Started {
			return text, Plain
		}
		return "-", Dim
	}
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// severities orders states, those first that somebody has to look at.
var severities = []State{
	StateSilent, StateLost, StateUnheard, StateNoSA, StateDown, StateWaiting, StateStarting, StateGone, StateRunning, StateDisabled,
}

// severity returns the tunnel's place by its state; one that runs and warns is sorted with those that wait.
func (t *Tunnel) severity() int {
	if t.warned() {
		return slices.Index(severities, StateWaiting)
	}
	return slices.Index(severities, t.State)
}

// warned reports whether a tunnel runs and there is a warning all the same: other states say what is wrong.
func (t *Tunnel) warned() bool { return t.State == StateRunning && t.warning() != nil }

// columns are those of the table, from left to right.
var columns = []column{
	{title: "NAME", rank: 0, width: 8, wider: 16,
		cell: func(t *Tunnel, _ *cellView) (string, Style) { return t.Name, Plain }},
	{title: "STATE", rank: 1, width: 11,
		cell: func(t *Tunnel, _ *cellView) (string, Style) {
			if t.warned() {
				return string(t.State) + "!", Warning
			}
			return string(t.State), t.State.style()
		},
		order: func(a, b *Tunnel) int { return a.severity() - b.severity() }},
	rateColumn("RX", 2, func(t *Tunnel) float64 { return 8 * t.rate1s.RxBytes }),
	rateColumn("RX10S", 6, func(t *Tunnel) float64 { return 8 * t.rate10s.RxBytes }),
	rateColumn("RXPPS", 14, func(t *Tunnel) float64 { return t.rate1s.RxPackets }),
	rateColumn("TX", 3, func(t *Tunnel) float64 { return 8 * t.rate1s.TxBytes }),
	rateColumn("TX10S", 7, func(t *Tunnel) float64 { return 8 * t.rate10s.TxBytes }),
	rateColumn("TXPPS", 15, func(t *Tunnel) float64 { return t.rate1s.TxPackets }),
	{title: "GRAPH", rank: 8, width: 8, wider: 22,
		cell: func(t *Tunnel, v *cellView) (string, Style) {
			rx, tx := t.bits(min(v.width, graphSteps), v.interval)
			for i := range rx {
				rx[i] += tx[i]
			}
			return graph(rx, 0, v.Unicode), Accent
		}},
	{title: "DROP/S", rank: 4, width: 6, right: true,
		cell: func(t *Tunnel, _ *cellView) (string, Style) {
			switch {
			case !t.hasRates:
				return "-", Dim
			case t.rate10s.Drops > 0:
				return few(t.rate10s.Drops), Warning
			}
			return "0", Plain
		},
		order: byRate(func(t *Tunnel) float64 { return t.rate10s.Drops })},
	{title: "TOP-DROP", rank: 11, width: 14, wider: 10,
		cell: func(t *Tunnel, _ *cellView) (string, Style) {
			if t.top == 0 {
				return "-", Dim
			}
			return t.top.String(), Warning
		}},
	{title: "HEARD", rank: 5, width: 6, right: true,
		cell: func(t *Tunnel, v *cellView) (string, Style) {
			d, ok := t.heard(v.now)
			switch {
			case ok:
				return Age(d), Plain
			case t.Started:
				return "never", Plain
			}
			return "-", Dim
		},
		order: func(a, b *Tunnel) int { return a.LastHeard.Compare(b.LastHeard) }},
	{title: "RTT", rank: 9, width: 6, right: true,
		cell: flagCell(func(t *Tunnel) string {
			if t.RoundTrip == 0 {
				return ""
			}
			return short(t.RoundTrip)
		}),
		order: func(a, b *Tunnel) int { return cmp.Compare(b.RoundTrip, a.RoundTrip) }},
	{title: "PMTU", rank: 10, width: 5, right: true,
		cell: flagCell(func(t *Tunnel) string {
			if t.PathMTU == 0 {
				return ""
			}
			return itoa(t.PathMTU)
		}),
		order: func(a, b *Tunnel) int { return cmp.Compare(a.PathMTU, b.PathMTU) }},
	{title: "FAST", rank: 12, width: 4, cell: flagCell(func(t *Tunnel) string { return yes(t.FastPath) })},
	{title: "IPSEC", rank: 13, width: 5,
		cell: flagCell(func(t *Tunnel) string {
			if !t.Encrypted {
				return ""
			}
			return yes(t.Established)
		})},
	{title: "COMMENT", rank: 16, width: 10, wider: 1 << 20,
		cell: func(t *Tunnel, _ *cellView) (string, Style) {
			if t.State == StateWaiting {
				return "waiting for " + t.WaitingFor, Warning
			}
			return t.Comment, Plain
		}},
}

// layout returns the columns that fit width, with their widths.
func layout(width, longestName int) []column {
	shown := slices.Clone(columns)
	shown[0].width = min(shown[0].width, max(4, longestName))
	shown[0].wider = max(0, min(longestName-shown[0].width, columns[0].wider))
	total := func() int {
		n := -gap
		for _, c := range shown {
			n += c.width + gap
		}
		return n
	}
	for len(shown) > 1 && total() > width {
		last := 0
		for i := range shown {
			if shown[i].rank > shown[last].rank {
				last = i
			}
		}
		shown = slices.Delete(shown, last, last+1)
	}
	if len(shown) == 1 {
		shown[0].width = width
		return shown
	}
	spare := width - total()
	for i := range shown {
		more := min(shown[i].wider, spare)
		shown[i].width, spare = shown[i].width+more, spare-more
	}
	return shown
}

// tableHead returns the line with the titles, with a mark at the column that is sorted by.
func (o *Options) tableHead(shown []column, sortBy string, reversed bool) string {
	var b strings.Builder
	for i, c := range shown {
		text, style := c.title, Bold
		if text == sortBy {
			style = Reverse
			if mark := "<"; len(text) < c.width {
				if reversed {
					mark = ">"
				}
				text += mark
			}
		}
		if i > 0 {
			b.WriteString("  ")
		}
		b.WriteString(o.paint(fit(text, c.width, c.right), style))
	}
	return b.String()
}

// tableRow returns the line of a tunnel.
func (o *Options) tableRow(t *Tunnel, shown []column, v *cellView, selected bool) string {
	var b strings.Builder
	for i, c := range shown {
		v.width = c.width
		text, style := c.cell(t, v)
		text = fit(clean(text, o.Unicode), c.width, c.right)
		if i > 0 {
			b.WriteString("  ")
		}
		if !selected {
			text = o.paint(text, style)
		}
		b.WriteString(text)
	}
	if selected {
		return o.paint(b.String(), Reverse)
	}
	return strings.TrimRight(b.String(), " ")
}
