// Package mss clamps the MSS option of TCP to the tunnel's MTU, so that TCP works on paths that
// drop the ICMP errors of path MTU discovery.
//
// The option is that of RFC 9293, section 3.7.1; it is the MTU less 40, whatever the options of
// IP and TCP (RFC 6691); the checksum is updated incrementally (RFC 1624). IPv4 only.
package mss

import (
	"encoding/binary"
	"math/bits"

	"ipipd/internal/ipv4"
)

const (
	// headersLen is what RFC 6691 subtracts from the MTU: the IPv4 and TCP headers without
	// options.
	headersLen = ipv4.HeaderLen + ipv4.TCPHeaderLen

	// Option kinds (RFC 9293, section 3.1).
	kindEnd = 0
	kindNop = 1
	kindMSS = 2
	lenMSS  = 4
)

// Clamp lowers the MSS option of a SYN or SYN-ACK to mtu - 40, and reports whether it changed the
// packet. mtu is the largest inner packet in bytes. Clamp never raises an MSS, never adds the
// option, and leaves a segment with malformed options alone.
//
// Of a fragmented segment, the first fragment is clamped if it has the whole TCP header: an
// incremental checksum update does not need the other fragments.
//
// partial means that the TCP checksum field holds the sum of the pseudo-header only
// (packet.ChecksumPartial), which does not cover the option. A wrong checksum stays wrong.
func Clamp(inner ipv4.Packet, mtu int, partial bool) bool {
	if inner.Protocol() != ipv4.ProtocolTCP || inner.FragmentOffset() != 0 || mtu <= headersLen {
		return false
	}
	tcp := inner.Payload()
	if len(tcp) < ipv4.TCPHeaderLen || tcp[ipv4.OffTCPFlags]&ipv4.TCPFlagSYN == 0 {
		return false
	}
	end := int(tcp[ipv4.OffTCPDataOffset]>>4) * 4
	if end < ipv4.TCPHeaderLen || end > len(tcp) {
		return false
	}
	// Validate all options before changing any. Of several MSS options, stacks use the last and
	// others the first: lower them all.
	found := false
	for i := ipv4.TCPHeaderLen; i < end; {
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
	for i := ipv4.TCPHeaderLen; i < end; i += optionLen(tcp[i:end]) {
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
			// At an odd offset the field straddles two words of the sum, so swap its bytes (RFC
			// 1071, section 2 (B)).
			oldWord, newWord = bits.ReverseBytes16(oldWord), bits.ReverseBytes16(newWord)
		}
		sum := binary.BigEndian.Uint16(tcp[ipv4.OffTCPChecksum:])
		binary.BigEndian.PutUint16(tcp[ipv4.OffTCPChecksum:], ipv4.UpdateChecksum16(sum, oldWord, newWord))
	}
	return changed
}

// optionLen returns the length in bytes of the first option; an end-of-options takes the rest. 0
// means that it is malformed. options must not be empty.
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
