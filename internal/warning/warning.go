// Package warning has what a tunnel can warn of: one enumeration, with the name, the severity, the cause
// and the remedy of each. The log, `ipipd print`, `ipipd doctor`, the metrics and docs/warnings.md are made
// of it. A warning is a state of a tunnel, not an event: it is active as long as its cause is there. A Fault is why
// a tunnel does not start.
package warning

// Code is what is warned of.
type Code uint8

// The codes are in the order of docs/warnings.md: what lies beneath first.
const (
	InterfaceGone Code = iota
	InterfaceNotMade
	InterfaceMoved
	NotRestored
	LeftAlone
	CarrierNotSet
	MTUNotSet
	RPSNotSet
	FastPathFull
	SysctlNotSet
	RPFilterTunnel
	VIPMissing
	VIPAnswered
	SYNACKMSS

	NameNotResolved
	NameNotRefreshed
	OtherAddress
	NoRoute
	NoPath
	SamePair
	NoLocalAddress
	RouteLoop
	MTUFeedback
	PathMTULowered
	RemoteUnreachable
	PeerNotSetUp

	PeerNotHeard
	KeepaliveUnanswered
	KeepaliveBehindNAT
	PeerBehindNAT
	PeerMTU
	Fragments
	FragmentLoss

	IPsecNotEstablished
	ESPFiltered
	WeakAlgorithms
	WeakSecret

	// NumCodes is how many values Code has.
	NumCodes
)

// Severity is how bad it is.
type Severity string

const (
	// Broken: packets do not pass, or the tunnel does not start.
	Broken Severity = "broken"
	// Warning: it works only for a part, or not for long.
	Warning Severity = "warning"
	// Note: it works, and may be as it is meant to be.
	Note Severity = "note"
)

// Text is what is said about a Code. In a Remedy, NAME is the tunnel's interface, REMOTE its remote and
// PEER-INNER-ADDRESS the address of the other end inside it.
type Text struct {
	Name     string
	Severity Severity
	// What is the case, Why it matters, and the Remedy: clauses without a full stop.
	What, Why, Remedy string
	// Cleared is logged when the warning is cleared; "": nothing is.
	Cleared string
	// By is how it is logged.
	By Logging
}

// Logging is how a warning is logged.
type Logging uint8

const (
	// Always logs each beginning, and the end.
	Always Logging = iota
	// Limited logs once a minute at most: others than this host can cause it, as by a forged ICMP error.
	Limited
	// Elsewhere logs nothing: an ipsec.Event says it.
	Elsewhere
)

// Text returns the texts of c; it is never nil.
func (c Code) Text() *Text { return &texts[c] }

// String returns the name, in lower case with hyphens.
func (c Code) String() string { return texts[c].Name }

// Sentence returns What and Why.
func (t *Text) Sentence() string { return t.What + ": " + t.Why }
