package ipsec

import "time"

// EventKind says what happened to a Session.
type EventKind uint8

// All kinds but EventUp, EventRestored and EventESPReceived are warnings.
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
	// EventRestored is EventUp with the SAs of the process before.
	EventRestored
	// EventNotRestored: the SAs of the process before are not used, because of Err.
	EventNotRestored
	// EventNotKept: the SAs do not outlive the process, because of Err.
	EventNotKept
)

// Event is a change that an operator should know about. It contains no secret.
type Event struct {
	Kind   EventKind
	Status Status
	Err    error // of EventFailed, EventNotRestored, EventNotKept
}

// Warning reports whether the event needs the operator's attention.
func (e Event) Warning() bool {
	return e.Kind != EventUp && e.Kind != EventRestored && e.Kind != EventESPReceived
}

// String returns the event as one log line.
func (e Event) String() string {
	switch e.Kind {
	case EventUp:
		return "packets are encrypted: " + e.Status.Describe(time.Now())
	case EventDown:
		return "the last SA has expired or was deleted: outbound packets are dropped until there is a new one"
	case EventProblem:
		return "no SA, outbound packets are dropped: " + e.Status.Problem
	case EventWeak:
		return "the strongest algorithms in both ends' proposals are " + e.Status.Weak + ", which are deprecated"
	case EventNoESP:
		return "an SA is established, but no ESP is received: a firewall on the path may pass IKE and drop ESP (IP protocol 50)"
	case EventESPReceived:
		return "ESP packets are received now"
	case EventFailed:
		return "a negotiated SA cannot be used, outbound packets are dropped: " + e.Err.Error()
	case EventRestored:
		return "packets are encrypted by the SAs of the process before: " + e.Status.Describe(time.Now())
	case EventNotRestored:
		return "the SAs of the process before are not used, and new ones are negotiated: " + e.Err.Error()
	case EventNotKept:
		return "the SAs do not outlive this process: " + e.Err.Error()
	}
	return ""
}
