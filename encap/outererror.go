package encap

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
)

// OuterError is an ICMP error that a router or host of the underlay sent about
// an outer packet.
//
// Nothing authenticates it: whoever can guess the two outer addresses can forge
// one. What it may teach is the soft state of RFC 2003, section 5, and no more: a
// path MTU for ten minutes, not below PathMTU's floor; and, while the remote is
// not heard, that it is unreachable. Inner senders are told by that soft state, with
// their next packet, and never with bytes out of the message. No message stops a
// tunnel from sending.
type OuterError struct {
	// Type is 3 (destination unreachable) or 11 (time exceeded).
	Type, Code uint8
	// NextHopMTU is what a too big (3/4) says fits, in bytes of outer packet; 0
	// if it does not say, as before RFC 1191.
	NextHopMTU int
	// Reporter is the address that the message came from.
	Reporter [4]byte
	// Source and Destination are of the quoted outer packet: the tunnel's local
	// and remote address.
	Source, Destination [4]byte
	// Protocol of the quoted outer packet: 4, or, of a tunnel that is encrypted, 50
	// (ESP) or 17 (ESP in UDP, RFC 3948).
	Protocol uint8
	// SPI is that of the quoted ESP packet, in host byte order; 0 if it is none, or
	// not quoted: a router that quotes 8 bytes only ends before that of ESP in UDP.
	SPI uint32
	// DF is that of the outer packet, as quoted.
	DF bool
	// TotalLen is the length of the outer packet in bytes, as quoted. A router that
	// has put segments together (GRO) quotes the length of all of them.
	TotalLen int
}

// ParseError reads the ICMP message in b, a whole IPv4 packet that nobody has
// checked yet. DropOuterErrorUnrelated means that it is not about a packet that a
// tunnel can have sent, DropOuterErrorIgnored that it is a source quench, redirect or
// parameter problem (RFC 2003, sections 4.2, 4.3 and 4.5), all of which say
// nothing that a tunnel acts on.
func ParseError(b []byte) (e OuterError, d Drop) {
	p, err := ipv4.Parse(b)
	if err != nil || p.Protocol() != ipv4.ProtocolICMP || p.IsFragment() || !p.HeaderChecksumValid() {
		return OuterError{}, DropOuterErrorMalformed
	}
	message := p.Payload()
	if len(message) < icmpHeaderLen || ipv4.Sum(message, 0) != 0xffff {
		return OuterError{}, DropOuterErrorMalformed
	}
	switch message[0] {
	case icmpUnreachable, icmpTimeExceeded:
	case icmpSourceQuench, icmpRedirect, icmpParameterProblem:
		return OuterError{}, DropOuterErrorIgnored
	default:
		return OuterError{}, DropOuterErrorMalformed
	}
	quote := message[icmpHeaderLen:]
	// RFC 4884, section 4.1: if the sixth byte is not 0 it is the length of the
	// quote in words of 4 bytes, and extensions follow.
	if n := int(message[5]) * 4; n != 0 && n < len(quote) {
		quote = quote[:n]
	}
	h, headerLen, err := ipv4.ParseHeader(quote)
	if err != nil {
		return OuterError{}, DropOuterErrorMalformed
	}
	if h.Protocol != ipv4.ProtocolIPIP && h.Protocol != ipv4.ProtocolESP && h.Protocol != ipv4.ProtocolUDP {
		return OuterError{}, DropOuterErrorUnrelated
	}
	quote = quote[:min(len(quote), h.TotalLen)] // quotes may be padded
	if len(quote) < min(headerLen+minQuote, h.TotalLen) {
		return OuterError{}, DropOuterErrorMalformed
	}
	e = OuterError{
		Type: message[0], Code: message[1], Reporter: p.Source(),
		Source: h.Source, Destination: h.Destination, TotalLen: h.TotalLen, DF: h.DF, Protocol: h.Protocol,
	}
	if e.TooBig() {
		e.NextHopMTU = int(binary.BigEndian.Uint16(message[6:]))
	}
	if h.FragmentOffset != 0 { // of a later fragment the quote begins amidst the payload
		quote = quote[:headerLen]
	}
	return e, e.parsePayload(quote[headerLen:])
}

const udpHeader = 8

// parsePayload reads what is quoted behind the outer header.
func (e *OuterError) parsePayload(quote []byte) Drop {
	switch e.Protocol {
	case ipv4.ProtocolIPIP:
		return DropNone
	case ipv4.ProtocolUDP:
		if len(quote) < udpHeader || binary.BigEndian.Uint16(quote) != ipv4.PortNATT {
			return DropOuterErrorUnrelated
		}
		quote = quote[udpHeader:]
	}
	if len(quote) >= 4 {
		e.SPI = binary.BigEndian.Uint32(quote)
	}
	return DropNone
}

// TooBig reports whether the message is a datagram too big: 3/4.
func (e *OuterError) TooBig() bool { return e.Type == icmpUnreachable && e.Code == codeTooBig }

// ProtocolUnreachable reports whether the message says that the remote host has
// nothing that takes Protocol: 3/2. A tunnel end that is not started answers so.
func (e *OuterError) ProtocolUnreachable() bool {
	return e.Type == icmpUnreachable && e.Code == codeProtocolUnreachable
}

// Unreachable reports whether the message says that the remote end of the
// tunnel cannot be reached, which its soft state should remember (Reachability).
func (e *OuterError) Unreachable() bool {
	switch e.Type {
	case icmpTimeExceeded:
		return e.Code == 0 // code 1: a fragment was lost on its way to where it would be reassembled
	case icmpUnreachable:
		switch e.Code {
		case codePortUnreachable, codeTooBig, codeSourceRouteFailed:
			return false
		}
		return e.Code <= 15 // RFC 1812, section 5.2.7.1, has the last codes
	}
	return false
}
