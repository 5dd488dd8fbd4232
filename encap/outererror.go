package encap

import (
	"encoding/binary"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// OuterError is an ICMP error from the underlay about an outer packet.
//
// It is not authenticated: whoever can guess the two outer addresses can forge one. So it only
// changes the soft state of RFC 2003, section 5: the path MTU, for ten minutes and not below
// PathMTU's floor; and, while nothing is received from the remote, that it is unreachable. Inner
// senders are told by that soft state, with their next packet, and never with bytes of the
// message. No message stops a tunnel from sending.
type OuterError struct {
	// Type is 3 (destination unreachable) or 11 (time exceeded).
	Type, Code uint8
	// NextHopMTU is the next-hop MTU of a too big (3/4), in bytes of outer packet; 0 if the
	// router does not report it, as before RFC 1191.
	NextHopMTU int
	// Reporter is the source of the message, in network byte order.
	Reporter [4]byte
	// Source and Destination are those of the quoted outer packet: the tunnel's local and remote
	// address, in network byte order.
	Source, Destination [4]byte
	// Protocol is the quoted outer packet's protocol number: 4, or, if the tunnel is encrypted,
	// 50 (ESP) or 17 (ESP in UDP, RFC 3948).
	Protocol uint8
	// SPI is the SPI of the quoted ESP packet, in host byte order; 0 if it is not ESP, or not
	// quoted: a quote of only 8 bytes ends before the SPI of ESP in UDP.
	SPI uint32
	// DF is the quoted outer packet's don't-fragment flag.
	DF bool
	// TotalLen is the quoted outer packet's total length, in bytes. A router with GRO quotes the
	// length of the merged packet.
	TotalLen int
}

// ParseError parses the ICMP message in b, a whole, unchecked IPv4 packet.
// e is zero if the quoted packet is another program's: neither IPIP nor ESP, nor UDP from port 4500.
// drop.OuterErrorIgnored means that it is a source quench, redirect or parameter problem, on
// which a tunnel does not act (RFC 2003, sections 4.2, 4.3 and 4.5).
func ParseError(b []byte) (e OuterError, d drop.Reason) {
	p, err := ipv4.Parse(b)
	if err != nil || p.Protocol() != ipv4.ProtocolICMP || p.IsFragment() || !p.HeaderChecksumValid() {
		return OuterError{}, drop.OuterErrorMalformed
	}
	message := p.Payload()
	if len(message) < ipv4.ICMPHeaderLen || ipv4.Sum(message, 0) != 0xffff {
		return OuterError{}, drop.OuterErrorMalformed
	}
	switch message[0] {
	case ipv4.ICMPUnreachable, ipv4.ICMPTimeExceeded:
	case ipv4.ICMPSourceQuench, ipv4.ICMPRedirect, ipv4.ICMPParameterProblem:
		return OuterError{}, drop.OuterErrorIgnored
	default:
		return OuterError{}, drop.OuterErrorMalformed
	}
	quote := message[ipv4.ICMPHeaderLen:]
	// RFC 4884, section 4.1: a sixth byte other than 0 is the length of the quote in 32-bit
	// words, and extensions follow the quote.
	if n := int(message[5]) * 4; n != 0 && n < len(quote) {
		quote = quote[:n]
	}
	h, headerLen, err := ipv4.ParseHeader(quote)
	if err != nil {
		return OuterError{}, drop.OuterErrorMalformed
	}
	if h.Protocol != ipv4.ProtocolIPIP && h.Protocol != ipv4.ProtocolESP && h.Protocol != ipv4.ProtocolUDP {
		return OuterError{}, drop.None
	}
	quote = quote[:min(len(quote), h.TotalLen)] // quotes may be padded
	if len(quote) < min(headerLen+minQuote, h.TotalLen) {
		return OuterError{}, drop.OuterErrorMalformed
	}
	e = OuterError{
		Type: message[0], Code: message[1], Reporter: p.Source(),
		Source: h.Source, Destination: h.Destination, TotalLen: h.TotalLen, DF: h.DF, Protocol: h.Protocol,
	}
	if e.TooBig() {
		e.NextHopMTU = int(binary.BigEndian.Uint16(message[6:]))
	}
	if h.FragmentOffset != 0 { // the payload of a later fragment has no transport header
		quote = quote[:headerLen]
	}
	if !e.parsePayload(quote[headerLen:]) {
		return OuterError{}, drop.None
	}
	return e, drop.None
}

// parsePayload parses the quoted payload of the outer packet, and reports whether a tunnel can have sent it.
func (e *OuterError) parsePayload(quote []byte) bool {
	switch e.Protocol {
	case ipv4.ProtocolIPIP:
		return true
	case ipv4.ProtocolUDP:
		if len(quote) < ipv4.UDPHeaderLen || binary.BigEndian.Uint16(quote) != ipv4.PortNATT {
			return false
		}
		quote = quote[ipv4.UDPHeaderLen:]
	}
	if len(quote) >= 4 {
		e.SPI = binary.BigEndian.Uint32(quote)
	}
	return true
}

// TooBig reports whether the message is a datagram too big: type 3, code 4.
func (e *OuterError) TooBig() bool {
	return e.Type == ipv4.ICMPUnreachable && e.Code == ipv4.CodeTooBig
}

// ProtocolUnreachable reports whether the remote host does not accept Protocol: type 3, code 2.
// It answers so while its tunnel end is not running.
func (e *OuterError) ProtocolUnreachable() bool {
	return e.Type == ipv4.ICMPUnreachable && e.Code == ipv4.CodeProtocolUnreachable
}

// Unreachable reports whether the message means that the remote end is unreachable
// (Reachability).
func (e *OuterError) Unreachable() bool {
	switch e.Type {
	case ipv4.ICMPTimeExceeded:
		return e.Code == 0 // code 1: fragment reassembly time exceeded
	case ipv4.ICMPUnreachable:
		switch e.Code {
		case ipv4.CodePortUnreachable, ipv4.CodeTooBig, ipv4.CodeSourceRouteFailed:
			return false
		}
		return e.Code <= 15 // RFC 1812, section 5.2.7.1, has the last codes
	}
	return false
}
