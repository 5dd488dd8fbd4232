package ipsec

import "time"

// EventKind is what has happened to a Session.
type EventKind uint8

// The kinds. All but Opened and Heard are warnings.
const (
	// Opened: there is an SA, and packets go through, encrypted.
	Opened EventKind = iota + 1
	// Shut: there is no SA any more, and nothing is sent.
	Shut
	// Blocked: Status.Problem keeps the gate shut, and did not so before.
	Blocked
	// Weak: the SA uses Status.Weak, the best that both ends have on offer.
	Weak
	// Silent: packets are sent, and none comes back.
	Silent
	// Heard: one has come after all.
	Heard
	// Failed: Err keeps an SA from being used.
	Failed
)

// Event is something that an operator should be told. It holds no secret.
type Event struct {
	Kind   EventKind
	Status Status
	Err    error // of Failed
}

// Warning reports whether something is not as it should be.
func (e Event) Warning() bool { return e.Kind != Opened && e.Kind != Heard }

// String is the event in one line.
func (e Event) String() string {
	switch e.Kind {
	case Opened:
		return "packets are encrypted: " + e.Status.Describe(time.Now())
	case Shut:
		return "the SA is gone: nothing is sent without one"
	case Blocked:
		return "no SA, and nothing is sent without one: " + e.Status.Problem
	case Weak:
		return "the best that both ends have on offer is " + e.Status.Weak + ", which should no longer be used"
	case Silent:
		return "there is an SA, but nothing arrives by it: a firewall on the way may take IKE and not ESP (IP protocol 50)"
	case Heard:
		return "packets arrive by ESP now"
	case Failed:
		return "an SA that was negotiated cannot be used, and nothing is sent: " + e.Err.Error()
	}
	return ""
}
