package encap

import "iter"

// Drop is the reason why a packet was dropped. It is one byte, comparable, an index into an
// array of NumDrops counters, and an error; converting it to one does not allocate. String is
// the name that `ipipd print` shows.
//
// A reason that exists in both directions has two values: the name for packets from the underlay
// begins with "received-".
type Drop uint8

const (
	// DropNone, the zero value: not dropped.
	DropNone Drop = iota

	// Outbound: packets from the TUN.

	// DropInnerNotIPv4: the version is not 4; most often IPv6, which hosts try on every
	// interface.
	DropInnerNotIPv4
	// DropInnerMalformed: invalid header length or total length.
	DropInnerMalformed
	// DropInnerTTLZero: the TTL is 0 (RFC 2003, section 3.1).
	DropInnerTTLZero
	// DropInnerTooLong: more than MaxInner bytes, which does not fit the outer total length.
	DropInnerTooLong
	// DropLoop: the packet is an outer packet of this tunnel, or its source is the remote end
	// (RFC 2003, section 3.2).
	DropLoop
	// DropTooBig: longer than the path MTU, with DF=1.
	DropTooBig
	// DropFragmentFailed: cannot be fragmented to the path MTU.
	DropFragmentFailed
	// DropNoPath: no route to the remote end, or its name does not resolve.
	DropNoPath
	// DropNoLocalAddress: this host does not have the local address, so it must not send from
	// it.
	DropNoLocalAddress
	// DropQueueFull: the transmit queue of the underlay interface was full (ENOBUFS).
	DropQueueFull
	// DropSendFailed: the kernel refused to send.
	DropSendFailed

	// Inbound: packets from the underlay.

	// DropReceiveOverflow: the socket's receive buffer was full.
	DropReceiveOverflow
	// DropOuterMalformed: invalid outer version, header length or total length.
	DropOuterMalformed
	// DropOuterNotIPIP: the outer protocol is not 4.
	DropOuterNotIPIP
	// DropOuterFragment: an outer fragment that was not reassembled.
	DropOuterFragment
	// DropOuterChecksum: the outer header checksum is wrong.
	DropOuterChecksum
	// DropUnknownPeer: no tunnel has these outer addresses (RFC 2003, section 6.2).
	DropUnknownPeer
	// DropReceivedNotIPv4: the inner version is not 4.
	DropReceivedNotIPv4
	// DropReceivedTruncated: the inner packet is longer than the outer payload.
	DropReceivedTruncated
	// DropReceivedMalformed: invalid inner header length or total length.
	DropReceivedMalformed
	// DropReceivedChecksum: the inner header checksum is wrong.
	DropReceivedChecksum
	// DropReceivedTTLZero: the inner TTL is 0 (RFC 2003, section 3.1).
	DropReceivedTTLZero
	// DropReceivedLoop: the inner packet has the tunnel's own outer addresses: it would be sent
	// back to the remote end, or be received again.
	DropReceivedLoop
	// DropECNCEOnNotECT: CE on the outer header and Not-ECT on the inner one: the inner
	// transport reacts only to loss (RFC 6040, section 4.2).
	DropECNCEOnNotECT
	// DropSuperpacketSizeUnknown: a superpacket whose segment size is unknown, such as UDP
	// datagrams merged on the way.
	DropSuperpacketSizeUnknown
	// DropReflectTTLExpired: a reflect probe whose TTL is at most 1.
	DropReflectTTLExpired
	// DropReflectLimited: a reflect probe above the rate limit.
	DropReflectLimited
	// DropReceivedNotRunning: the TUN interface is down.
	DropReceivedNotRunning
	// DropWriteFailed: the host's network stack refused the packet.
	DropWriteFailed

	// ICMP, in both directions. These count ICMP messages, not packets of the tunnel.

	// DropICMPForbidden: no ICMP error may be sent about the inner packet (RFC 1122, section
	// 3.2.2).
	DropICMPForbidden
	// DropICMPLimited: an ICMP error above the tunnel's rate limit.
	DropICMPLimited
	// DropOuterErrorMalformed: a received ICMP error is malformed, or is not an error.
	DropOuterErrorMalformed
	// DropOuterErrorUnrelated: a received ICMP error is not about an outer packet.
	DropOuterErrorUnrelated
	// DropOuterErrorIgnored: a received ICMP error of a type that says nothing about the path
	// (RFC 2003, section 4).
	DropOuterErrorIgnored
	// DropOuterErrorNotBelieved: a received ICMP error contradicts what is known, or quotes a
	// packet that the tunnel cannot have sent: forged, or late.
	DropOuterErrorNotBelieved

	// NumDrops is the number of values of Drop, DropNone included.
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

// String returns the reason's name, in lower case with hyphens; "none" for DropNone.
func (d Drop) String() string {
	if d >= NumDrops {
		return "unknown"
	}
	return dropNames[d]
}

// Error makes Drop an error. DropNone is not nil: do not return it as an error.
func (d Drop) Error() string { return "dropped: " + d.String() }

// Drops yields every reason but DropNone, in the order above.
func Drops() iter.Seq[Drop] {
	return func(yield func(Drop) bool) {
		for d := DropNone + 1; d < NumDrops; d++ {
			if !yield(d) {
				return
			}
		}
	}
}
