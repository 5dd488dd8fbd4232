// Package drop has the reasons for which a packet goes no further: one enumeration for
// both directions, ESP and ICMP, with the name, the cause and the remedy of each. What
// `ipipd print` shows, what an error says and docs/drops.md are made of it.
package drop

import "iter"

// Reason is why a packet goes no further. It is one byte, is compared with ==, indexes
// Counters, and is an error that costs no allocation.
//
// Where a reason exists in both directions, "received-" begins the name of the inbound one.
type Reason uint8

// None is no reason, the zero value: the packet goes on.
const None Reason = 0

// Outbound: inner packets from the TUN device.
const (
	InnerNotIPv4 Reason = 1 + iota
	InnerMalformed
	InnerTTLZero // RFC 2003, section 3.1
	InnerTooLong
	Loop // RFC 2003, section 3.2
	TooBig
	FragmentFailed
	NoPath
	NoRemote
	RemoteNotUsable
	NoLocalAddress
	QueueFull // ENOBUFS
	SendFailed
	endOutbound
)

// Inbound: outer packets from the underlay.
const (
	ReceiveOverflow Reason = endOutbound + iota
	OuterMalformed
	OuterNotIPIP
	OuterFragment
	OuterChecksum
	UnknownPeer // RFC 2003, section 6.2
	ReversePath // RFC 3704, section 2.2
	NotInAcceptFrom
	NotInAcceptTo
	ReceivedNotIPv4
	ReceivedTruncated
	ReceivedMalformed
	ReceivedChecksum
	ReceivedTTLZero // RFC 2003, section 3.1
	ReceivedLoop
	ECNCEOnNotECT // RFC 6040, section 4.2
	SuperpacketSizeUnknown
	ReflectTTLExpired
	ReflectLimited
	ReceivedNotRunning // EIO
	WriteFailed
	endInbound
)

// ESP, both directions.
const (
	ESPNoSA Reason = endInbound + iota
	ESPNoGateway
	ESPPlainText
	ESPAuthentication
	ESPReplay // RFC 4303, section 3.4.3
	ESPMalformed
	ESPFragment  // RFC 4303, section 3.3.4
	ESPPadding   // RFC 4303, section 2.4
	ESPSelector  // RFC 4301, section 5.2, step 4
	ESPDummy     // RFC 4303, section 2.6
	ESPExhausted // RFC 4303, section 3.3.3
	ESPNoRoom
	endESP
)

// ICMP: these count messages, not packets of a tunnel.
const (
	ICMPForbidden Reason = endESP + iota // RFC 1122, section 3.2.2
	ICMPLimited
	OuterErrorMalformed
	OuterErrorIgnored // RFC 2003, section 4
	OuterErrorNotBelieved

	// NumReasons is how many values Reason has, None included.
	NumReasons
)

// String is the reason's name, in lower case with hyphens; "none" for None.
func (r Reason) String() string { return r.text().name }

// Why is the cause in a clause, without a full stop.
func (r Reason) Why() string { return r.text().why }

// Remedy is what an operator does about it, in a clause; it may begin with "none needed".
func (r Reason) Remedy() string { return r.text().remedy }

// Error makes a Reason an error, cause included. None is not a nil error.
func (r Reason) Error() string { return "dropped: " + r.String() + ": " + r.Why() }

func (r Reason) text() *text {
	if r >= NumReasons {
		return &text{name: "unknown"}
	}
	return &texts[r]
}

// All goes through every Reason but None, in the order of a packet's path.
func All() iter.Seq[Reason] { return between(None+1, NumReasons) }

// Group is a part of All with a heading.
type Group struct {
	// Name is Outbound, Inbound, ESP or ICMP.
	Name    string
	Reasons iter.Seq[Reason]
}

// Groups goes through All by groups.
func Groups() []Group {
	return []Group{
		{"Outbound", between(InnerNotIPv4, endOutbound)},
		{"Inbound", between(ReceiveOverflow, endInbound)},
		{"ESP", between(ESPNoSA, endESP)},
		{"ICMP", between(ICMPForbidden, NumReasons)},
	}
}

func between(first, end Reason) iter.Seq[Reason] {
	return func(yield func(Reason) bool) {
		for r := first; r < end; r++ {
			if !yield(r) {
				return
			}
		}
	}
}
