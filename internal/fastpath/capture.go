package fastpath

import "time"

// Capture says which packets of a tunnel are copied for Link.Captured; the zero value copies none.
type Capture struct {
	// Snaplen is how many bytes of each inner packet are copied; at least 1 and at most 65535.
	Snaplen int
	// Drops: only packets that are dropped.
	Drops bool
}

// Why is the reason why the fast path dropped a packet.
type Why uint8

// The values of bpf/capture.h and bpf/many.h.
const (
	NotDropped      Why = 0
	ReversePath     Why = 2
	NotInAcceptFrom Why = 3
	NotInAcceptTo   Why = 4
	SendFailed      Why = 0xff
)

// Captured is a packet that the fast path has carried or dropped. A GSO packet is one Captured, with its whole length.
type Captured struct {
	At       time.Time
	Outbound bool
	Why      Why
	// Length is the outer packet's length in bytes, which may be more than Outer has.
	Length int
	// Outer is the outer header and the first bytes of the inner packet, as many as were copied. See AsReceived.
	Outer []byte

	changed  bool // ECN was merged: tos and checksum are the inner header's as they were received
	tos      uint8
	checksum [2]byte
}

// Inner returns the part of Outer after the outer header: the inner packet as it was sent by or delivered to this host.
func (c *Captured) Inner() []byte { return c.Outer[20:] }

// AsReceived calls visit with Outer as it was received, before the ECN codepoint of its header was merged
// into the inner one (RFC 6040).
func (c *Captured) AsReceived(visit func(outer []byte)) {
	inner := c.Inner()
	if !c.changed || len(inner) < 12 {
		visit(c.Outer)
		return
	}
	tos, checksum := inner[1], [2]byte(inner[10:])
	inner[1] = c.tos
	copy(inner[10:], c.checksum[:])
	visit(c.Outer)
	inner[1] = tos
	copy(inner[10:], checksum[:])
}
