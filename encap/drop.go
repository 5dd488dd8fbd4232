package encap

import "iter"

// Drop is why a packet goes no further. It is one byte, can be compared and
// counted (it indexes an array of NumDrops counters), is an error, and making
// one does not allocate. Its String is the name that `ipipd print` shows.
//
// A reason that both directions know has a name for each: "received-" marks the
// one of packets from the underlay.
type Drop uint8

const (
	// DropNone, the zero value: the packet goes on.
	DropNone Drop = iota

	// Outbound: a packet that the host wanted sent through the tunnel.

	// DropInnerNotIPv4: not IPv4; most often IPv6 that the host tries on every interface.
	DropInnerNotIPv4
	// DropInnerMalformed: header or lengths are not sound.
	DropInnerMalformed
	// DropInnerTTLZero: RFC 2003, section 3.1.
	DropInnerTTLZero
	// DropInnerTooLong: more than MaxInner bytes, so that the outer total length cannot hold it.
	DropInnerTooLong
	// DropLoop: an outer packet of this tunnel, or one that came from its remote end, was
	// routed into it (RFC 2003, section 3.2).
	DropLoop
	// DropTooBig: longer than the path MTU, and must not be fragmented.
	DropTooBig
	// DropFragmentFailed: could not be cut to the path MTU.
	DropFragmentFailed
	// DropNoPath: there is no route to the remote end, or its name has no address.
	DropNoPath
	// DropNoLocalAddress: the local address is not on this host, which must not send from it.
	DropNoLocalAddress
	// DropQueueFull: the transmit queue of the underlay device was full (ENOBUFS).
	DropQueueFull
	// DropSendFailed: the kernel refused to send.
	DropSendFailed

	// Inbound: a packet from the underlay.

	// DropReceiveOverflow: the socket's receive buffer was full.
	DropReceiveOverflow
	// DropOuterMalformed: outer version, header length or total length is not sound.
	DropOuterMalformed
	// DropOuterNotIPIP: the outer protocol is not 4.
	DropOuterNotIPIP
	// DropOuterFragment: a fragment that nobody reassembled.
	DropOuterFragment
	// DropOuterChecksum: the outer header checksum is wrong.
	DropOuterChecksum
	// DropUnknownPeer: no tunnel has these outer addresses (RFC 2003, section 6.2).
	DropUnknownPeer
	// DropReceivedNotIPv4: what is inside is not IPv4.
	DropReceivedNotIPv4
	// DropReceivedTruncated: the inner packet is longer than what the outer one carries.
	DropReceivedTruncated
	// DropReceivedMalformed: inner header length or total length is not sound.
	DropReceivedMalformed
	// DropReceivedChecksum: the inner header checksum is wrong.
	DropReceivedChecksum
	// DropReceivedTTLZero: RFC 2003, section 3.1.
	DropReceivedTTLZero
	// DropReceivedLoop: the inner packet is one that we would send to the remote end itself,
	// or a packet of this very tunnel from it.
	DropReceivedLoop
	// DropECNCEOnNotECT: congestion was marked on the way, and the inner transport cannot be
	// told but by a loss (RFC 6040, section 4.2).
	DropECNCEOnNotECT
	// DropSuperpacketSizeUnknown: several datagrams merged into one on their way, whose
	// boundaries are lost.
	DropSuperpacketSizeUnknown
	// DropReflectTTLExpired: a reflect probe whose TTL does not allow sending it back.
	DropReflectTTLExpired
	// DropReflectLimited: more reflect probes than are answered.
	DropReflectLimited
	// DropReceivedNotRunning: the interface is not up.
	DropReceivedNotRunning
	// DropWriteFailed: the host's network stack refused the packet.
	DropWriteFailed

	// ICMP, in both directions. These count messages, not packets of the tunnel.

	// DropICMPForbidden: the inner packet is one that no ICMP error may be about (RFC 1122, section 3.2.2).
	DropICMPForbidden
	// DropICMPLimited: more ICMP errors than the tunnel makes in a second.
	DropICMPLimited
	// DropOuterErrorMalformed: a received ICMP error is damaged, or is not an error.
	DropOuterErrorMalformed
	// DropOuterErrorUnrelated: a received ICMP error is not about a packet of a tunnel.
	DropOuterErrorUnrelated
	// DropOuterErrorIgnored: a received ICMP error of a kind that says nothing about the path (RFC 2003, section 4).
	DropOuterErrorIgnored
	// DropOuterErrorNotBelieved: a received ICMP error that contradicts what is known, or is about
	// a packet that the tunnel cannot have sent: forged, or late.
	DropOuterErrorNotBelieved

	// NumDrops is how many values Drop has, DropNone included.
	NumDrops
)

var dropNames = [NumDrops]string{
	DropNone: "none",

	DropInnerNotIPv4:   "inner-not-ipv4",
	DropInnerMalformed: "inner-malformed",
	DropInnerTTLZero:   "inner-ttl-zero",
	DropInnerTooLong:   "inner-too-long",
	DropLoop:           "loop",
	DropTooBig:         "too-big",
	DropFragmentFailed: "fragment-failed",
	DropNoPath:         "no-path",
	DropNoLocalAddress: "no-local-address",
	DropQueueFull:      "queue-full",
	DropSendFailed:     "send-failed",

	DropReceiveOverflow:        "receive-overflow",
	DropOuterMalformed:         "outer-malformed",
	DropOuterNotIPIP:           "outer-not-ipip",
	DropOuterFragment:          "outer-fragment",
	DropOuterChecksum:          "outer-checksum",
	DropUnknownPeer:            "unknown-peer",
	DropReceivedNotIPv4:        "received-not-ipv4",
	DropReceivedTruncated:      "received-truncated",
	DropReceivedMalformed:      "received-malformed",
	DropReceivedChecksum:       "received-checksum",
	DropReceivedTTLZero:        "received-ttl-zero",
	DropReceivedLoop:           "received-loop",
	DropECNCEOnNotECT:          "ecn-ce-on-not-ect",
	DropSuperpacketSizeUnknown: "superpacket-size-unknown",
	DropReflectTTLExpired:      "reflect-ttl-expired",
	DropReflectLimited:         "reflect-limited",
	DropReceivedNotRunning:     "received-not-running",
	DropWriteFailed:            "write-failed",

	DropICMPForbidden:         "icmp-forbidden",
	DropICMPLimited:           "icmp-limited",
	DropOuterErrorMalformed:   "outer-error-malformed",
	DropOuterErrorUnrelated:   "outer-error-unrelated",
	DropOuterErrorIgnored:     "outer-error-ignored",
	DropOuterErrorNotBelieved: "outer-error-not-believed",
}

// String is the reason's name, in lower case with hyphens; "none" for DropNone.
func (d Drop) String() string {
	if d >= NumDrops {
		return "unknown"
	}
	return dropNames[d]
}

// Error makes a Drop an error. Do not hand out DropNone as one: it is not nil.
func (d Drop) Error() string { return "dropped: " + d.String() }

// Drops goes through every reason but DropNone, in the order of the path a packet takes.
func Drops() iter.Seq[Drop] {
	return func(yield func(Drop) bool) {
		for d := DropNone + 1; d < NumDrops; d++ {
			if !yield(d) {
				return
			}
		}
	}
}
