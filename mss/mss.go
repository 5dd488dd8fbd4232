// Package mss lowers the maximum segment size that a TCP connection agrees on to
// what goes through the tunnel in one piece, so that a path on which ICMP errors
// are lost does not become a black hole.
//
// The option is the one of RFC 9293, section 3.7.1; that it is the MTU less 40,
// whatever IP and TCP options there are, is RFC 6691 (and RFC 879); the checksum
// is updated by RFC 1624. IPv4 only.
package mss

import (
	"encoding/binary"
	"math/bits"

	"ipipd/internal/ipv4"
)

const (
	// headersLen is what RFC 6691 subtracts from the MTU: the IPv4 and the TCP
	// header without options.
	headersLen = 40

	tcpHeaderLen  = 20
	offDataOffset = 12
	offFlags      = 13
	offChecksum   = 16
	flagSYN       = 0x02

	// Options (RFC 9293, section 3.1).
	kindEnd = 0
	kindNop = 1
	kindMSS = 2
	lenMSS  = 4
)

// Clamp lowers the MSS option of a SYN or a SYN-ACK to mtu - 40, mtu being the
// largest inner packet in bytes, and says whether it changed the packet. It
// never raises an MSS and never adds the option; where the options are
// malformed, or the option comes twice with one of them malformed, nothing is
// touched.
//
// A fragment that does not begin with the TCP header is left alone. One that
// does is clamped: the checksum is about all of the fragments, and an update
// needs only what changed.
//
// partial says that the TCP checksum field holds the sum of the pseudo-header
// only (packet.ChecksumPartial): that does not cover the option and stays.
// A checksum that was wrong stays wrong.
func Clamp(inner ipv4.Packet, mtu int, partial bool) bool {
	if inner.Protocol() != ipv4.ProtocolTCP || inner.FragmentOffset() != 0 || mtu <= headersLen {
		return false
	}
	tcp := inner.Payload()
	if len(tcp) < tcpHeaderLen || tcp[offFlags]&flagSYN == 0 {
		return false
	}
	end := int(tcp[offDataOffset]>>4) * 4
	if end < tcpHeaderLen || end > len(tcp) {
		return false
	}
	// Look through all of the options before any is changed. The stacks take the
	// last of several MSS options, others the first: lower all of them.
	found := false
	for i := tcpHeaderLen; i < end; {
		n := optionLen(tcp[i:end])
		if n == 0 {
			return false
		}
		found = found || tcp[i] == kindMSS
		i += n
	}
	if !found {
		return false
	}
	limit := uint16(min(mtu-headersLen, 0xffff))
	changed := false
	for i := tcpHeaderLen; i < end; i += optionLen(tcp[i:end]) {
		if tcp[i] != kindMSS {
			continue
		}
		field := tcp[i+2 : i+4]
		old := binary.BigEndian.Uint16(field)
		if old <= limit {
			continue
		}
		binary.BigEndian.PutUint16(field, limit)
		changed = true
		if partial {
			continue
		}
		oldWord, newWord := old, limit
		if i%2 != 0 {
			// The field lies across two of the words that are summed up: its
			// bytes count as if they were swapped (RFC 1071, section 2 (B)).
			oldWord, newWord = bits.ReverseBytes16(oldWord), bits.ReverseBytes16(newWord)
		}
		sum := binary.BigEndian.Uint16(tcp[offChecksum:])
		binary.BigEndian.PutUint16(tcp[offChecksum:], ipv4.UpdateChecksum16(sum, oldWord, newWord))
	}
	return changed
}

// optionLen is the length in bytes of the option that options begin with, which
// must not be empty; the end-of-options mark takes all that is left. 0 stands
// for a malformed option.
func optionLen(options []byte) int {
	switch options[0] {
	case kindEnd:
		return len(options)
	case kindNop:
		return 1
	}
	if len(options) < 2 {
		return 0
	}
	n := int(options[1])
	if n < 2 || n > len(options) || options[0] == kindMSS && n != lenMSS {
		return 0
	}
	return n
}
