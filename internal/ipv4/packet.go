// Package ipv4 has a checked view of an IPv4 packet in memory (RFC 791), the Header to build one
// from, and the Internet checksum (RFC 1071, RFC 1624).
//
// A Packet comes only from Parse, so its header and lengths are valid and none of its methods
// reads out of bounds. Addresses and header bytes are in network byte order, numbers in the
// host's. Nothing here allocates.
//
// For TCP and UDP the package has the offsets of their headers, and the sum of the pseudo-header. It
// neither interprets options nor reassembles fragments.
package ipv4

import "encoding/binary"

// Offsets in the header of RFC 791, section 3.1:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-------+-------+-----------+---+-------------------------------+
//	|Version|  IHL  |   DSCP    |ECN|         Total Length          |
//	+-------+-------+-----------+---+-+-+-+-------------------------+
//	|        Identification         |0|D|M|     Fragment Offset     |
//	+---------------+---------------+-+-+-+-------------------------+
//	| Time to Live  |   Protocol    |        Header Checksum        |
//	+---------------+---------------+-------------------------------+
//	|                        Source Address                         |
//	+---------------------------------------------------------------+
//	|                      Destination Address                      |
//	+---------------------------------------------------------------+
//	|                    Options, up to 40 bytes                    |
//	+---------------------------------------------------------------+
const (
	OffVersionIHL  = 0
	OffTOS         = 1
	OffTotalLen    = 2
	OffID          = 4
	OffFragment    = 6
	OffTTL         = 8
	OffProtocol    = 9
	OffChecksum    = 10
	OffSource      = 12
	OffDestination = 16
)

const (
	// HeaderLen is the length in bytes of a header without options.
	HeaderLen = 20
	// MaxTotalLen is the length in bytes of the longest packet.
	MaxTotalLen = 65535

	version = 4

	flagDF     = 0x4000
	flagMF     = 0x2000
	maskOffset = 0x1fff
)

// IANA protocol numbers.
const (
	ProtocolICMP = 1
	ProtocolIPIP = 4
	ProtocolTCP  = 6
	ProtocolUDP  = 17
	ProtocolESP  = 50
)

// PortNATT is the UDP port of ESP and IKE through a NAT (RFC 3948, section 2.1).
const PortNATT = 4500

// EtherType is the EtherType of IPv4, in host byte order.
const EtherType = 0x0800

// ECN is the two-bit codepoint of RFC 3168, section 5.
type ECN uint8

// The codepoints. Note the order on the wire: ECT(1) is 01, ECT(0) is 10.
const (
	NotECT ECN = 0
	ECT1   ECN = 1
	ECT0   ECN = 2
	CE     ECN = 3
)

// String returns the codepoint's name in RFC 6040.
func (e ECN) String() string {
	return [4]string{"Not-ECT", "ECT(1)", "ECT(0)", "CE"}[e&3]
}

// Error is why bytes are not a valid IPv4 packet. It is comparable, and converting it to an
// error does not allocate.
type Error uint8

// The errors of Parse and ParseHeader.
const (
	// ErrShort: shorter than the header.
	ErrShort Error = iota + 1
	// ErrVersion: the version is not 4.
	ErrVersion
	// ErrHeaderLength: the IHL is below 5.
	ErrHeaderLength
	// ErrTotalLength: the total length is less than the header length.
	ErrTotalLength
	// ErrTruncated: the total length is more than the bytes present.
	ErrTruncated
)

func (e Error) Error() string {
	switch e {
	case ErrShort:
		return "ipv4: fewer bytes than a header"
	case ErrVersion:
		return "ipv4: version is not 4"
	case ErrHeaderLength:
		return "ipv4: header length below 20"
	case ErrTotalLength:
		return "ipv4: total length below the header length"
	case ErrTruncated:
		return "ipv4: total length beyond the end"
	}
	return "ipv4: unknown error"
}

// Packet is a checked view of an IPv4 packet. It shares the memory that it was parsed from. On
// the zero Packet only Bytes and TotalLen may be called.
type Packet struct {
	b []byte
}

// Parse checks version, header length and total length, and returns a view of exactly total
// length bytes; trailing bytes of b are left out. It checks neither the header checksum
// (HeaderChecksumValid) nor the options. It fails with an Error.
func Parse(b []byte) (Packet, error) {
	if len(b) < HeaderLen {
		return Packet{}, ErrShort
	}
	if b[OffVersionIHL]>>4 != version {
		return Packet{}, ErrVersion
	}
	header := int(b[OffVersionIHL]&0x0f) * 4
	if header < HeaderLen {
		return Packet{}, ErrHeaderLength
	}
	total := int(binary.BigEndian.Uint16(b[OffTotalLen:]))
	if total < header {
		return Packet{}, ErrTotalLength
	}
	if total > len(b) {
		return Packet{}, ErrTruncated
	}
	return Packet{b[:total:total]}, nil
}

// Bytes returns the whole packet, header included.
func (p Packet) Bytes() []byte { return p.b }

// TotalLen returns the length of the packet in bytes, header included.
func (p Packet) TotalLen() int { return len(p.b) }

// HeaderLen returns the length of the header in bytes, options included: 20 to 60.
func (p Packet) HeaderLen() int { return int(p.b[OffVersionIHL]&0x0f) * 4 }

// TOS returns the second byte of the header: DSCP and ECN.
func (p Packet) TOS() uint8 { return p.b[OffTOS] }

// DSCP returns the differentiated services codepoint (RFC 2474), 0 to 63.
func (p Packet) DSCP() uint8 { return p.b[OffTOS] >> 2 }

// ECN returns the explicit congestion notification codepoint.
func (p Packet) ECN() ECN { return ECN(p.b[OffTOS] & 3) }

// ID returns the identification that the fragments of a packet share.
func (p Packet) ID() uint16 { return binary.BigEndian.Uint16(p.b[OffID:]) }

func (p Packet) flagsOffset() uint16 { return binary.BigEndian.Uint16(p.b[OffFragment:]) }

// DF returns the don't-fragment flag.
func (p Packet) DF() bool { return p.flagsOffset()&flagDF != 0 }

// MF returns the more-fragments flag.
func (p Packet) MF() bool { return p.flagsOffset()&flagMF != 0 }

// FragmentOffset returns the fragment offset in bytes; the field is in units of 8 bytes.
func (p Packet) FragmentOffset() int { return int(p.flagsOffset()&maskOffset) * 8 }

// IsFragment reports whether the packet is a fragment, first or later.
func (p Packet) IsFragment() bool { return p.flagsOffset()&(flagMF|maskOffset) != 0 }

// TTL returns the time to live.
func (p Packet) TTL() uint8 { return p.b[OffTTL] }

// Protocol returns the protocol number of the payload.
func (p Packet) Protocol() uint8 { return p.b[OffProtocol] }

// Source returns the source address.
func (p Packet) Source() [4]byte { return [4]byte(p.b[OffSource:]) }

// Destination returns the destination address.
func (p Packet) Destination() [4]byte { return [4]byte(p.b[OffDestination:]) }

// Options returns the header's options, padding included.
func (p Packet) Options() []byte { return p.b[HeaderLen:p.HeaderLen()] }

// Payload returns the bytes after the header.
func (p Packet) Payload() []byte { return p.b[p.HeaderLen():] }

// HeaderChecksumValid reports whether the header checksum is correct.
func (p Packet) HeaderChecksumValid() bool {
	return Sum(p.b[:p.HeaderLen()], 0) == 0xffff
}

// SetTOS sets DSCP and ECN and updates the header checksum.
func (p Packet) SetTOS(tos uint8) {
	p.setWord(OffVersionIHL, uint16(p.b[OffVersionIHL])<<8|uint16(tos))
}

// SetECN sets the ECN codepoint and updates the header checksum.
func (p Packet) SetECN(ecn ECN) { p.SetTOS(p.b[OffTOS]&^3 | uint8(ecn&3)) }

// SetTTL sets the time to live and updates the header checksum.
func (p Packet) SetTTL(ttl uint8) {
	p.setWord(OffTTL, uint16(ttl)<<8|uint16(p.b[OffProtocol]))
}

// SetAddresses sets source and destination and updates the header checksum.
func (p Packet) SetAddresses(source, destination [4]byte) {
	p.setWord(OffSource, binary.BigEndian.Uint16(source[:2]))
	p.setWord(OffSource+2, binary.BigEndian.Uint16(source[2:]))
	p.setWord(OffDestination, binary.BigEndian.Uint16(destination[:2]))
	p.setWord(OffDestination+2, binary.BigEndian.Uint16(destination[2:]))
}

// setWord sets the 16-bit word at the even offset off and updates the header checksum
// incrementally (RFC 1624). A wrong checksum stays wrong: a packet damaged on its way must not
// become valid.
func (p Packet) setWord(off int, word uint16) {
	old := binary.BigEndian.Uint16(p.b[off:])
	binary.BigEndian.PutUint16(p.b[off:], word)
	sum := binary.BigEndian.Uint16(p.b[OffChecksum:])
	binary.BigEndian.PutUint16(p.b[OffChecksum:], UpdateChecksum16(sum, old, word))
}
