package ipsec

import "time"

// EventKind says what happened to a Session.
type EventKind uint8

// All kinds but EventUp and EventESPReceived are warnings.
const (
	// EventUp: an SA is established; packets are encrypted and sent.
	EventUp EventKind = iota + 1
	// EventDown: the last SA is gone; nothing is sent.
	EventDown
	// EventProblem: Status.Problem, which is new, prevents an SA.
	EventProblem
	// EventWeak: the SA uses the algorithms in Status.Weak; the peers have no better in
	// common.
	EventWeak
	// EventNoESP: ESP is sent, but none has been received by the SA.
	EventNoESP
	// EventESPReceived ends EventNoESP.
	EventESPReceived
	// EventFailed: the SA cannot be used, because of Err.
	EventFailed
)

// Event is a change that an operator should know about. It contains no secret.
type Event struct {
	Kind   EventKind
	Status Status
	Err    error // of EventFailed
}

// Warning reports whether the event needs the operator's attention.
func (e Event) Warning() bool { return e.Kind != EventUp && e.Kind != EventESPReceived }

// String returns the event as one log line.
func (e Event) String() string {
	switch e.Kind {
	case EventUp:
		return "packets are encrypted: " + e.Status.Describe(time.Now())
	case EventDown:
		return "the SA is gone: nothing is sent without one"
	case EventProblem:
		return "no SA, and nothing is sent without one: " + e.Status.Problem
	case EventWeak:
		return "the best that both ends have on offer is " + e.Status.Weak + ", which should no longer be used"
	case EventNoESP:
		return "there is an SA, but nothing arrives by it: a firewall on the way may take IKE and not ESP (IP protocol 50)"
	case EventESPReceived:
		return "packets arrive by ESP now"
	case EventFailed:
		return "an SA that was negotiated cannot be used, and nothing is sent: " + e.Err.Error()
	}
	return ""
}
