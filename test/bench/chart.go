package main

import (
	"encoding/xml"
	"fmt"
	"math"
	"strings"
)

// The chart is a dot plot: a row for each tunnel, a panel for each metric, and in each cell a
// full dot for the bare veth over a ring for the segmenting underlay. The axes are
// logarithmic: the link and the slowest tunnel differ by a factor of a hundred.
const (
	labelWidth = 270
	panelWidth = 172
	panelGap   = 18
	rowHeight  = 34
	topMargin  = 92
	padding    = 10 // from a panel's edge to the ends of its axis
)

const chartStyle = `
text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #333 }
.title { font-size: 15px; font-weight: 600 } .small { font-size: 10.5px; fill: #777 } .head { font-weight: 600 }
.grid { stroke: #e4e4e4 } .rule { stroke: #f0f0f0 }
.full { fill: #8a97a6 } .ring { fill: #fff; stroke: #8a97a6; stroke-width: 2 } .value { font-size: 10.5px; fill: #666; paint-order: stroke; stroke: #fff; stroke-width: 3px }
.own text { font-weight: 600; fill: #0b5394 } .own .full { fill: #0b5394 } .own .ring { stroke: #0b5394 } .own .value { fill: #0b5394 }
`

// chartMetrics are all but the 95th percentile, which is meaningful only beside the mean.
var chartMetrics = metrics[:len(metrics)-1]

func (b *bench) chart() string {
	tunnels := b.tunnels()
	width := labelWidth + len(chartMetrics)*(panelWidth+panelGap)
	height := topMargin + len(tunnels)*rowHeight + 34
	var w strings.Builder
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n", width, height, width, height)
	fmt.Fprintf(&w, "<title>ipipd beside other tunnels</title>\n<style>%s</style>\n", chartStyle)
	fmt.Fprintf(&w, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	fmt.Fprintf(&w, `<text class="title" x="16" y="28">The same work over several tunnels, on one machine, in one run</text>`+"\n")
	b.legend(&w, 16, 48)

	for j, m := range chartMetrics {
		b.axis(&w, m, labelWidth+j*(panelWidth+panelGap), topMargin+len(tunnels)*rowHeight)
	}
	for i, t := range tunnels {
		y := topMargin + i*rowHeight
		class := "row"
		if strings.HasPrefix(t.name, "ipipd") {
			class = "row own"
		}
		fmt.Fprintf(&w, `<line class="rule" x1="16" x2="%d" y1="%d" y2="%d"/>`+"\n", width-panelGap, y, y)
		fmt.Fprintf(&w, `<g class="%s"><text x="16" y="%d">%s</text>`+"\n", class, y+rowHeight/2+4, escape(t.title))
		if !b.measured(t.name) {
			fmt.Fprintf(&w, `<text class="small" x="%d" y="%d">not measured</text>`+"\n", labelWidth+padding, y+rowHeight/2+4)
		}
		for j, m := range chartMetrics {
			b.cell(&w, t, m, labelWidth+j*(panelWidth+panelGap), y)
		}
		w.WriteString("</g>\n")
	}
	w.WriteString("</svg>\n")
	return w.String()
}

func (b *bench) legend(w *strings.Builder, x, y int) {
	for _, segment := range b.segment {
		text := "bare veth"
		if segment {
			text = "segmenting underlay (no TSO, no GSO; GRO at the receiver)"
		}
		fmt.Fprintf(w, `%s<text class="small" x="%d" y="%d">%s</text>`+"\n", mark(float64(x+5), float64(y), segment), x+15, y+4, text)
		x += 90
	}
	fmt.Fprintf(w, `<text class="small" x="%d" y="%d">axes are logarithmic: equal distances are equal ratios</text>`+"\n", labelWidth+200, y+4)
}

// mark returns the SVG dot of an underlay.
func mark(x, y float64, segment bool) string {
	class, radius := "full", 4.5
	if segment {
		class, radius = "ring", 3.5
	}
	return fmt.Sprintf(`<circle class="%s" cx="%.1f" cy="%.1f" r="%.1f"/>`, class, x, y, radius)
}

func (b *bench) cell(w *strings.Builder, t tunnel, m metric, x, y int) {
	for i, segment := range b.segment {
		cy := float64(y) + float64(rowHeight)*(float64(i)+1)/(float64(len(b.segment))+1)
		if len(b.segment) == 2 { // two pixels further apart
			cy += float64(2*i-1) * 2
		}
		v := b.results.median(t, segment, m)
		if math.IsNaN(v) {
			continue
		}
		low, high := b.bounds(m)
		at := float64(x+padding) + position(v, low, high)*(panelWidth-2*padding)
		fmt.Fprintln(w, mark(at, cy, segment))
		// The value stands left of the dot near the right edge, else right of it.
		dx, anchor := 8.0, "start"
		if at > float64(x)+panelWidth*0.7 {
			dx, anchor = -8.0, "end"
		}
		fmt.Fprintf(w, `<text class="value" x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", at+dx, cy+3.5, anchor, formatValue(v))
	}
}

// axis draws a panel's heading, and its grid line at each power of ten.
func (b *bench) axis(w *strings.Builder, m metric, x, bottom int) {
	better := "higher is better"
	if m.lower {
		better = "lower is better"
	}
	fmt.Fprintf(w, `<text class="head" x="%d" y="%d">%s</text>`+"\n", x+padding, topMargin-20, escape(m.title+", "+m.unit))
	fmt.Fprintf(w, `<text class="small" x="%d" y="%d">%s</text>`+"\n", x+padding, topMargin-6, better)
	low, high := b.bounds(m)
	for v := low; v <= high*1.01; v *= 10 {
		at := float64(x+padding) + position(v, low, high)*(panelWidth-2*padding)
		label := fmt.Sprintf("%g", v)
		if v >= 10_000 {
			label = fmt.Sprintf("%gk", v/1000)
		}
		fmt.Fprintf(w, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>`+"\n", at, at, topMargin, bottom)
		fmt.Fprintf(w, `<text class="small" x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", at, bottom+16, label)
	}
}

// bounds returns the powers of ten around the metric's values.
func (b *bench) bounds(m metric) (low, high float64) {
	low, high = math.Inf(1), 0
	for _, t := range b.tunnels() {
		for _, segment := range b.segment {
			if v := b.results.median(t, segment, m); v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	if high == 0 {
		return 1, 10
	}
	low = math.Pow(10, math.Floor(math.Log10(low)))
	return low, max(math.Pow(10, math.Ceil(math.Log10(high))), low*10)
}

// position maps v between low and high to 0..1 on a logarithmic scale.
func position(v, low, high float64) float64 {
	if v <= low {
		return 0
	}
	return math.Log(v/low) / math.Log(high/low)
}

func escape(s string) string {
	var w strings.Builder
	_ = xml.EscapeText(&w, []byte(s)) // a strings.Builder returns no error
	return w.String()
}
