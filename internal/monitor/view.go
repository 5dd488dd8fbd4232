package monitor

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"ipipd/internal/drop"
)

// Action is what the caller of View.Handle has to do for a key.
type Action int

// The actions.
const (
	Stay Action = iota // the view has changed, or not
	Quit
	Suspend
	Redraw // the terminal shows something else than was drawn
)

// View is what a terminal shows of a Model, and what keys change of it.
type View struct {
	Options
	// Detail is the lines of ipipd print about the tunnel whose page is open; nil until they are known.
	Detail []string

	model    *Model
	interval time.Duration
	sortBy   string
	reversed bool
	filter   string
	typing   bool // whether the filter is being typed
	help     bool
	selected string // link of the selected tunnel
	first    int    // index of the first row that is shown
	page     string // link of the tunnel whose page is open; "": the table is shown
	scroll   int    // index of the first line that is shown of the page, or the help
	rowsFit  int    // how many rows fitted into the last frame
	most     int    // the greatest scroll in the last frame
}

// NewView returns the View of a Model: the table, or of a Model of one tunnel that tunnel's page.
func NewView(m *Model, o Options) *View {
	v := &View{Options: o, model: m, interval: m.interval, sortBy: "NAME"}
	if m.only != "" && len(m.Tunnels) > 0 {
		v.selected = m.Tunnels[0].Link
		v.page = v.selected
	}
	return v
}

// Page returns the link of the tunnel whose page is open; "" if none is. answers is whether its process does.
func (v *View) Page() (link string, answers bool) {
	t := v.model.byLink[v.page]
	return v.page, t != nil && t.Fresh
}

func itoa(n int) string { return strconv.Itoa(n) }

// sortable returns the titles of the columns by which the table can be sorted.
func sortable() (titles []string) {
	for _, c := range columns {
		if c.order != nil || c.title == "NAME" {
			titles = append(titles, c.title)
		}
	}
	return titles
}

// rows returns the tunnels that match the filter, sorted.
func (v *View) rows() []*Tunnel {
	rows := slices.DeleteFunc(slices.Clone(v.model.Tunnels), func(t *Tunnel) bool { return !t.matches(v.filter) })
	i := slices.IndexFunc(columns, func(c column) bool { return c.title == v.sortBy })
	if order := columns[i].order; order != nil {
		slices.SortStableFunc(rows, func(a, b *Tunnel) int {
			if v.reversed {
				return order(b, a)
			}
			return order(a, b)
		})
	} else if v.reversed {
		slices.Reverse(rows)
	}
	return rows
}

// Handle handles a key.
func (v *View) Handle(key Key) Action {
	switch key {
	case KeyInterrupt:
		return Quit
	case KeySuspend:
		return Suspend
	case KeyRedraw:
		return Redraw
	}
	if v.typing {
		switch key {
		case KeyEnter:
			v.typing = false
		case KeyEscape:
			v.typing, v.filter = false, ""
		default:
			v.filter = edit(v.filter, key)
		}
		return Stay
	}
	if key == 'q' {
		return Quit
	}
	if v.help || v.page != "" {
		v.handlePage(key)
		return Stay
	}
	v.handleTable(key)
	return Stay
}

// handlePage handles a key while a page, or the help, is shown.
func (v *View) handlePage(key Key) {
	switch key {
	case KeyEscape, KeyBackspace, KeyLeft, 'b':
		if v.scroll = 0; v.help {
			v.help = false
		} else {
			v.page, v.Detail = "", nil
		}
	case '?', 'h':
		v.help, v.scroll = !v.help, 0
	default:
		v.scroll = moved(v.scroll, v.most+1, key, v.rowsFit)
	}
}

// handleTable handles a key while the table is shown.
func (v *View) handleTable(key Key) {
	rows := v.rows()
	at := slices.IndexFunc(rows, func(t *Tunnel) bool { return t.Link == v.selected })
	switch key {
	case '?', 'h':
		v.help, v.scroll = true, 0
	case '/':
		v.typing = true
	case KeyEscape:
		v.filter = ""
	case 's', KeyRight, '>':
		v.sort(1)
	case 'S', KeyLeft, '<':
		v.sort(-1)
	case 'r':
		v.reversed = !v.reversed
	case KeyEnter:
		if len(rows) > 0 {
			v.selected = rows[max(at, 0)].Link
			v.page, v.scroll, v.Detail = v.selected, 0, nil
		}
	default:
		if len(rows) > 0 {
			v.selected = rows[moved(max(at, 0), len(rows), key, v.rowsFit)].Link
		}
	}
}

// sort sorts by the next sortable column, or with a step of -1 by the one before.
func (v *View) sort(step int) {
	titles := sortable()
	i := slices.Index(titles, v.sortBy) + step
	v.sortBy, v.reversed = titles[(i+len(titles))%len(titles)], false
}

// moved returns the index of the line, of n, that a key moves to from at. screen is how many lines fit.
func moved(at, n int, key Key, screen int) int {
	switch key {
	case KeyUp, 'k':
		at--
	case KeyDown, 'j':
		at++
	case KeyPageUp:
		at -= max(1, screen-1)
	case KeyPageDown, ' ':
		at += max(1, screen-1)
	case KeyHome, 'g':
		at = 0
	case KeyEnd, 'G':
		at = n - 1
	}
	return max(0, min(at, n-1))
}

// Frame returns the lines of a terminal of that size, height at most.
func (v *View) Frame(now time.Time, width, height int) []string {
	width, height = max(1, width), max(1, height)
	var lines []string
	switch t := v.model.byLink[v.page]; {
	case v.help:
		lines = v.scrolled("ipipd monitor: keys", helpLines(), "Esc back  arrows scroll  q quit", width, height)
	case v.page != "" && t != nil:
		lines = v.pageFrame(t, now, width, height)
	case v.page != "": // forgotten meanwhile
		v.page, v.Detail = "", nil
		fallthrough
	default:
		lines = v.tableFrame(now, width, height)
	}
	return lines[:min(len(lines), height)]
}

// tableFrame returns the lines of the table, scrolled to the selected row.
func (v *View) tableFrame(now time.Time, width, height int) []string {
	rows := v.rows()
	at := slices.IndexFunc(rows, func(t *Tunnel) bool { return t.Link == v.selected })
	if at < 0 && len(rows) > 0 {
		at = 0
		v.selected = rows[0].Link
	}
	head, feet := []string{v.title(now, width, len(rows))}, v.feet(rows, at, now, width, height)
	longest := 0
	for _, t := range rows {
		longest = max(longest, textWidth(clean(t.Name, v.Unicode)))
	}
	shown := layout(width, longest)
	if height >= 3 {
		head = append(head, v.tableHead(shown, v.sortBy, v.reversed))
	}
	fit := max(0, height-len(head)-len(feet))
	v.rowsFit = fit
	v.first = max(0, min(v.first, len(rows)-fit))
	if at < v.first {
		v.first = max(0, at)
	} else if at >= v.first+fit {
		v.first = at - fit + 1
	}
	lines := head
	cells := &cellView{Options: &v.Options, now: now, interval: v.interval}
	for i := v.first; i < min(len(rows), v.first+fit); i++ {
		lines = append(lines, v.tableRow(rows[i], shown, cells, i == at && height >= 3))
	}
	if len(rows) == 0 && fit > 0 {
		text := "no tunnels run"
		if len(v.model.Tunnels) > 0 {
			text = "no tunnel matches"
		}
		lines = append(lines, fitLine(text, width))
	}
	for len(lines) < height-len(feet) {
		lines = append(lines, "")
	}
	return append(lines, feet...)
}

// fitLine cuts clean text to width, without the padding of fit.
func fitLine(text string, width int) string { return strings.TrimRight(fit(text, width, false), " ") }

// title returns the first line of the table.
func (v *View) title(now time.Time, width, matching int) string {
	counts := map[State]int{}
	var rx, tx float64
	for _, t := range v.model.Tunnels {
		counts[t.State]++
		rx, tx = rx+8*t.rate1s.RxBytes, tx+8*t.rate1s.TxBytes
	}
	text := plural(len(v.model.Tunnels), "tunnel")
	if v.filter != "" {
		text = fmt.Sprintf("%d of %s match %q", matching, text, clean(v.filter, v.Unicode))
	}
	var parts []string
	for _, s := range []State{StateRunning, StateSilent, StateLost, StateUnheard, StateNoSA, StateDown, StateWaiting, StateStarting, StateGone, StateDisabled} {
		if counts[s] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", counts[s], s))
		}
	}
	if len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	text += fmt.Sprintf("; rx %s tx %s bit/s", si(rx), si(tx))
	clock := now.Format(time.TimeOnly)
	if room := width - len(clock) - gap; room >= 20 {
		return v.paint(fit(text, room, false)+"  "+clock, Bold)
	}
	return v.paint(fitLine(text, width), Bold)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// feet returns the lines below the table: the notes, a line about the selected tunnel, and the keys.
func (v *View) feet(rows []*Tunnel, at int, now time.Time, width, height int) (feet []string) {
	add := func(text string, s Style) { feet = append(feet, v.paint(fitLine(clean(text, v.Unicode), width), s)) }
	notes := v.notes(now)
	for i, note := range notes {
		if most := (height - 4) / 3; i >= most || i >= 5 {
			break
		}
		add(note, Warning)
	}
	if height >= 7 && at >= 0 {
		add(rows[at].summary(), Accent)
	}
	switch {
	case v.typing:
		add("filter: "+v.filter+"_  (Enter keeps it, Esc clears it)", Plain)
	case height >= 5:
		add("q quit  ? help  Enter page  / filter  s sort by "+v.sortBy+"  r reverse", Dim)
	}
	return feet
}

// notes returns what is to be said that is not about a tunnel.
func (v *View) notes(now time.Time) (notes []string) {
	m := v.model
	if !m.UndoAt.IsZero() {
		notes = append(notes, fmt.Sprintf("to be undone in %s without ipipd confirm", Age(m.UndoAt.Sub(now))))
	}
	if m.StrayRate > 0 {
		notes = append(notes, fmt.Sprintf("packets of no tunnel: %s/s %s", few(m.StrayRate), m.StrayTop.String()))
	}
	return append(notes, m.Problems...)
}

// summary describes the tunnel in a line.
func (t *Tunnel) summary() string {
	text := t.Name
	if t.Interface != "" && t.Interface != t.Name {
		text += " (" + t.Interface + ")"
	}
	if t.LocalAddress+t.RemoteAddress != "" {
		unknown := "?"
		if t.Remotes != nil { // each has its own, and the local address is the source of the route to it
			unknown = "any"
		}
		text += ": " + cmp.Or(t.LocalAddress, unknown) + " > " + cmp.Or(t.RemoteAddress, unknown)
	}
	if r := t.Remotes; r != nil {
		text += fmt.Sprintf(", %d remotes", r.Count)
		if r.NotOK > 0 {
			text += fmt.Sprintf(" (%d not ok)", r.NotOK)
		}
	}
	if t.State == StateWaiting {
		text += "; waiting for " + t.WaitingFor
	} else if w := t.warning(); w != nil {
		text += "; " + w.Text
	}
	if t.top != drop.None {
		text += fmt.Sprintf("; drops: %s, %s", t.top.String(), t.top.Why())
	}
	if t.Comment != "" {
		text += "; " + t.Comment
	}
	return text
}
