package encap

import (
	"encoding/binary"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// ICMP errors to inner senders (RFC 792). They are written to the TUN, as if from a router
// behind the tunnel, and never sent on the underlay.

const (
	// maxICMPError is the maximum length of an ICMP error in bytes, IP header included (RFC
	// 1812, section 4.3.2.3).
	maxICMPError = 576
	// icmpTOS is precedence internetwork control (RFC 1812, section 4.3.2.5), Not-ECT.
	icmpTOS = 0xc0
	icmpTTL = 64
	// minQuote is how many payload bytes of a packet an ICMP error quotes at least, if the
	// packet has as many (RFC 792).
	minQuote = 8
)

// TooBig makes the ICMP error for the sender of inner: type 3, code 4 (RFC 2003, section 4.1),
// with mtu, in bytes, as the next-hop MTU (RFC 1191, section 4). mtu is the MTU of inner
// packets: the path MTU less Overhead.
//
// from is the source of the message, in network byte order. It must not be an address of this
// host, which would drop the message as a martian. Zero means the destination of inner, whose
// reverse path leads through the tunnel.
//
// dst needs room for 576 bytes and must not share memory with inner. On drop.ICMPForbidden dst is
// empty, and no message may be sent; either way inner itself counts as drop.TooBig. The caller
// limits the rate.
func TooBig(dst *packet.Buffer, inner ipv4.Packet, mtu int, from [4]byte) drop.Reason {
	return putUnreachable(dst, inner, ipv4.CodeTooBig, mtu, from)
}

// HostUnreachable makes the ICMP error for the sender of inner when the remote end is
// unreachable: type 3, code 1. See TooBig.
func HostUnreachable(dst *packet.Buffer, inner ipv4.Packet, from [4]byte) drop.Reason {
	return putUnreachable(dst, inner, ipv4.CodeHostUnreachable, 0, from)
}

// putUnreachable writes a destination unreachable about inner:
//
//	+---------------+---------------+-------------------------------+
//	|   Type (3)    |     Code      |           Checksum            |
//	+---------------+---------------+-------------------------------+
//	|           unused (0)          |   Next-Hop MTU, or unused (0) |
//	+-------------------------------+-------------------------------+
//	|     the packet it is about, as much as fits into 576 bytes    |
//	+---------------------------------------------------------------+
func putUnreachable(dst *packet.Buffer, inner ipv4.Packet, code uint8, mtu int, from [4]byte) drop.Reason {
	space := dst.Space()
	h := inner.Header()
	if !icmpAllowed(&h, inner.Payload()) {
		return drop.ICMPForbidden
	}
	if from == ([4]byte{}) {
		from = h.Destination
	}
	const overhead = ipv4.HeaderLen + ipv4.ICMPHeaderLen
	quote := inner.Bytes()
	quote = quote[:min(len(quote), maxICMPError-overhead)]
	total := overhead + len(quote)
	header := ipv4.Header{
		// DF=0, or an error about a too big packet could be too big itself. The inner packet's
		// ID serves as well as any.
		TOS: icmpTOS, TotalLen: total, ID: h.ID, TTL: icmpTTL, Protocol: ipv4.ProtocolICMP,
		Source: from, Destination: h.Source,
	}
	header.Put(space)
	message := space[ipv4.HeaderLen:total]
	message[0], message[1] = ipv4.ICMPUnreachable, code
	message[2], message[3], message[4], message[5] = 0, 0, 0, 0
	binary.BigEndian.PutUint16(message[6:], uint16(min(max(mtu, 0), ipv4.MaxTotalLen)))
	copy(message[ipv4.ICMPHeaderLen:], quote)
	binary.BigEndian.PutUint16(message[2:], ipv4.Checksum(message, 0))
	dst.SetLen(total)
	return drop.None
}

// icmpAllowed reports whether an ICMP error may be sent about a packet with header h and
// payload, which may be truncated (RFC 1122, section 3.2.2): not about an ICMP error or an
// unknown ICMP type, a fragment other than the first, a multicast or broadcast destination, or a
// source that is not a single host. Without the netmask, directed broadcasts go undetected.
func icmpAllowed(h *ipv4.Header, payload []byte) bool {
	if h.FragmentOffset != 0 || h.Destination[0] >= 224 {
		return false
	}
	if s := h.Source[0]; s == 0 || s == 127 || s >= 224 {
		return false
	}
	if h.Protocol != ipv4.ProtocolICMP {
		return true
	}
	if len(payload) == 0 {
		return false
	}
	switch payload[0] {
	case 0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43: // requests, replies, advertisements
		return true
	}
	return false // errors and unknown types
}
