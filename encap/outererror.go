package encap

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// OuterError is an ICMP error that a router or host of the underlay sent about
// an outer packet.
//
// Nothing authenticates it: whoever can guess the two outer addresses can forge
// one. It can lower the path MTU for ten minutes, not below 68, and cause
// messages to inner senders; it never stops a tunnel from sending.
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
	// not quoted.
	SPI uint32
	// TotalLen is the length of the outer packet in bytes, as quoted.
	TotalLen int
	// Inner is as much of the inner packet as is quoted, perhaps nothing, and
	// nothing of one that is encrypted. It shares memory with the message.
	Inner []byte
}

// ParseError reads the ICMP message in b, a whole IPv4 packet that nobody has
// checked yet. DropOuterErrorUnrelated means that it is not about a packet that a
// tunnel can have sent, DropOuterErrorNotRelayed that it is a source quench, redirect or
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
		return OuterError{}, DropOuterErrorNotRelayed
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
	if h.Protocol != ipv4.ProtocolIPIP && h.Protocol != protocolESP && h.Protocol != ipv4.ProtocolUDP {
		return OuterError{}, DropOuterErrorUnrelated
	}
	quote = quote[:min(len(quote), h.TotalLen)] // quotes may be padded
	if len(quote) < min(headerLen+minQuote, h.TotalLen) {
		return OuterError{}, DropOuterErrorMalformed
	}
	e = OuterError{
		Type: message[0], Code: message[1], Reporter: p.Source(),
		Source: h.Source, Destination: h.Destination, TotalLen: h.TotalLen, Protocol: h.Protocol,
	}
	if e.TooBig() {
		e.NextHopMTU = int(binary.BigEndian.Uint16(message[6:]))
	}
	if h.FragmentOffset != 0 { // of a later fragment the quote begins amidst the payload
		quote = quote[:headerLen]
	}
	return e, e.parsePayload(quote[headerLen:])
}

const (
	protocolESP = 50
	// portNAT is where ESP in UDP leaves from (RFC 3948, section 2.1).
	portNAT   = 4500
	udpHeader = 8
)

// parsePayload reads what is quoted behind the outer header.
func (e *OuterError) parsePayload(quote []byte) Drop {
	switch e.Protocol {
	case ipv4.ProtocolIPIP:
		e.Inner = quote
		return DropNone
	case ipv4.ProtocolUDP:
		if len(quote) < udpHeader || binary.BigEndian.Uint16(quote) != portNAT {
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

// Relay makes the message for the sender of the inner packet that e is about,
// by RFC 2003, section 4:
//
//	outer                                   inner
//	3/4 datagram too big                    3/4 with mtu (4.1: MUST)
//	3/0 net, 3/1 host, 3/2 protocol         3/1: the inner sender knows neither the network nor
//	unreachable, other unreachables         the protocol that could not be reached (4.1: SHOULD)
//	3/3 port unreachable                    nothing (4.1: MUST NOT)
//	3/5 source route failed                 nothing (4.1: MUST NOT)
//	11/0 time exceeded in transit           3/1 (4.4: MUST)
//	11/1 fragment reassembly time exceeded  nothing
//
// mtu is about inner packets, the path MTU less Overhead, in bytes; from as for
// TooBig; dst needs room for 576 bytes and must not hold e.Inner's memory. On a
// Drop there is nothing to send: DropOuterErrorQuoteShort if the message quotes
// less than the inner header and 8 bytes, when only the soft state can help.
func (e *OuterError) Relay(dst *packet.Buffer, mtu int, from [4]byte) Drop {
	code := uint8(codeHostUnreachable)
	if e.TooBig() {
		code = codeTooBig
	} else if !e.Unreachable() {
		return DropOuterErrorNotRelayed
	} else {
		mtu = 0
	}
	h, headerLen, err := ipv4.ParseHeader(e.Inner)
	if err == ipv4.ErrShort {
		return DropOuterErrorQuoteShort
	}
	// Routers change the outer header on the way, not what is inside: a wrong
	// checksum there means a damaged or invented quote.
	if err != nil || ipv4.Sum(e.Inner[:headerLen], 0) != 0xffff {
		return DropOuterErrorMalformed
	}
	quote := e.Inner[:min(len(e.Inner), h.TotalLen)]
	if len(quote) < min(headerLen+minQuote, h.TotalLen) {
		return DropOuterErrorQuoteShort
	}
	if h.Source == e.Destination {
		return DropOuterErrorNotRelayed // our own reflect probe
	}
	if code == codeTooBig && !h.DF {
		return DropOuterErrorNotRelayed // the inner sender does not look for its path MTU
	}
	return putUnreachable(dst, h, headerLen, quote, code, mtu, from)
}
