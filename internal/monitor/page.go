package monitor

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// scrolled returns a frame of text that may be longer than the terminal is high.
func (v *View) scrolled(title string, text []string, foot string, width, height int) []string {
	var body []string
	for _, line := range text {
		_, value, keyed := strings.Cut(line, ": ")
		indent := 2
		if keyed {
			indent = textWidth(line) - textWidth(value)
		}
		body = append(body, wrap(line, width, indent)...)
	}
	lines := []string{v.paint(fitLine(title, width), Bold)}
	rest := height - 1
	if height >= 4 {
		rest--
	}
	v.rowsFit, v.most = rest, max(0, len(body)-rest)
	v.scroll = max(0, min(v.scroll, v.most))
	lines = append(lines, body[v.scroll:min(len(body), v.scroll+rest)]...)
	for len(lines) < 1+rest {
		lines = append(lines, "")
	}
	if height >= 4 {
		if v.scroll < v.most {
			foot = "more below  " + foot
		}
		lines = append(lines, v.paint(fitLine(foot, width), Dim))
	}
	return lines
}

// pageFrame returns the frame of a tunnel's page.
func (v *View) pageFrame(t *Tunnel, now time.Time, width, height int) []string {
	title := fmt.Sprintf("%s  %s", t.Name, t.State)
	switch {
	case t.State == StateGone:
		title += " for " + Age(now.Sub(t.GoneAt))
	case t.State == StateWaiting:
		title += " for " + t.WaitingFor
	}
	if t.Comment != "" {
		title += "  " + t.Comment
	}
	text := v.rateLines(t, width)
	for _, note := range v.notes(now) {
		text = append(text, clean(note, v.Unicode))
	}
	text = append(text, "")
	switch {
	case v.Detail == nil && t.Fresh:
		text = append(text, "asking its process")
	case !t.Fresh && v.Detail != nil:
		text = append(text, "the last that is known:")
	}
	for _, line := range v.Detail {
		text = append(text, clean(line, v.Unicode))
	}
	return v.scrolled(clean(title, v.Unicode), text, "Esc back  arrows scroll  q quit  ? help", width, height)
}

// rateLines returns the rates of a tunnel, with graphs.
func (v *View) rateLines(t *Tunnel, width int) []string {
	if !t.hasRates {
		return []string{"no rates"}
	}
	rate := func(bytes, packets float64) string {
		return fmt.Sprintf("%s bit/s, %s packets/s", si(8*bytes), few(packets))
	}
	lines := []string{
		" receive: " + rate(t.rate1s.RxBytes, t.rate1s.RxPackets) + "; over 10 s " + rate(t.rate10s.RxBytes, t.rate10s.RxPackets),
		"transmit: " + rate(t.rate1s.TxBytes, t.rate1s.TxPackets) + "; over 10 s " + rate(t.rate10s.TxBytes, t.rate10s.TxPackets),
	}
	drops := "   drops: 0/s"
	if t.rate10s.Drops > 0 {
		drops = fmt.Sprintf("   drops: %s/s over 10 s, most of them %s: %s; remedy: %s", few(t.rate10s.Drops), t.top.String(), t.top.Why(), t.top.Remedy())
	}
	lines = append(lines, drops)
	if t.RoundTrip > 0 {
		lines = append(lines, "keepalive: round trip "+short(t.RoundTrip)+fmt.Sprintf(", %d of %d probes answered", t.ProbesAnswered, t.ProbesSent))
	}
	steps := min(graphSteps, width-10)
	if steps < 8 {
		return lines
	}
	rx, tx := t.bits(steps, v.interval)
	top := max(slices.Max(rx), slices.Max(tx))
	span := fmt.Sprintf("the last %s, at most %s bit/s", Age(time.Duration(steps)*v.interval), si(top))
	return append(lines, "",
		strings.TrimRight(" receive: "+graph(rx, top, v.Unicode), " "),
		strings.TrimRight("transmit: "+graph(tx, top, v.Unicode), " "),
		"          "+span)
}

// helpLines explain keys and columns.
func helpLines() []string {
	return []string{
		"     up, down: select a tunnel (also k, j, PageUp, PageDown, Home, End)",
		"        Enter: its page: all figures, drops with their remedies",
		"Esc, Backspace: back; in the table: clear the filter",
		"            /: show those only that have a text in name, comment, state or addresses",
		"  s, S, right, left: sort by the next column, or the one before",
		"            r: the other way round",
		"       Ctrl-L: draw everything anew",
		"       Ctrl-Z: suspend; fg goes on",
		"    q, Ctrl-C: quit",
		"",
		"        STATE: running! is with a warning, which the page explains",
		"       RX, TX: bits of inner packets received and sent in a second, over the last second",
		" RX10S, TX10S: the same over the last 10 seconds",
		" RXPPS, TXPPS: packets a second, over the last second",
		"        GRAPH: both directions, an interval each; as high as its highest",
		"DROP/S, TOP-DROP: packets dropped a second, and the most frequent reason, over 10 seconds",
		"        HEARD: how long ago the peer was heard",
		"          RTT: round trip of the last probe of the keepalive that was answered",
		"         PMTU: path MTU to the remote, of outer packets",
		"         FAST: whether the kernel carries packets by eBPF",
		"        IPSEC: whether there is an SA; - is without ipsec-secret",
	}
}
