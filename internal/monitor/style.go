package monitor

import "strings"

// Style is how a part of a line is shown.
type Style byte

// The styles. Dim, Bold and Reverse are no colours: they are there with NO_COLOR too.
const (
	Plain Style = iota
	Good
	Warning
	Bad
	Accent
	Dim
	Bold
	Reverse
)

// codes are the SGR parameters of ECMA-48; "" is none.
var codes = [...]string{Good: "32", Warning: "33", Bad: "31", Accent: "36", Dim: "2", Bold: "1", Reverse: "7"}

const endStyle = "\x1b[0m"

// paint returns text in a style.
func (o *Options) paint(text string, s Style) string {
	if s == Plain || s < Reverse && strings.TrimSpace(text) == "" || !o.Styles || !o.Colours && s <= Accent {
		return text
	}
	return "\x1b[" + codes[s] + "m" + text + endStyle
}

// style returns the style of a state.
func (s State) style() Style {
	switch s {
	case StateRunning:
		return Good
	case StateWaiting, StateStarting:
		return Warning
	case StateDisabled, StateGone:
		return Dim
	}
	return Bad
}

// Options are what a terminal can show.
type Options struct {
	Styles  bool // bold, dim, reverse
	Colours bool
	Unicode bool
}
