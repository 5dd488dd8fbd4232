// Package ipv4 is a checked view of an IPv4 packet in memory (RFC 791), the value
// form that builds a header, and the Internet checksum (RFC 1071, RFC 1624).
//
// A Packet comes only from Parse: whoever holds one knows that the header and
// the lengths are sound, and no method of it can run out of bounds. Addresses
// and header bytes are in network byte order, numbers in the host's. Nothing
// here allocates.
//
// The package knows no transport protocol beyond the pseudo-header of TCP and
// UDP, does not interpret options, and does not reassemble.
package ipv4

import "encoding/binary"

// The header of RFC 791, section 3.1:
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
	offVersionIHL  = 0
	offTOS         = 1
	offTotalLen    = 2
	offID          = 4
	offFragment    = 6
	offTTL         = 8
	offProtocol    = 9
	offChecksum    = 10
	offSource      = 12
	offDestination = 16
)

const (
	// HeaderLen is the length in bytes of a header without options.
	HeaderLen = 20
	// MaxHeaderLen is the length in bytes of the longest header.
	MaxHeaderLen = 60
	// MaxTotalLen is the length in bytes of the longest packet.
	MaxTotalLen = 65535

	version = 4

	flagDF     = 0x4000
	flagMF     = 0x2000
	maskOffset = 0x1fff
)

// Protocol numbers (IANA) of the payloads that a tunnel looks at.
const (
	ProtocolICMP = 1
	ProtocolIPIP = 4
	ProtocolTCP  = 6
	ProtocolUDP  = 17
	ProtocolESP  = 50
)

// PortNATT is the UDP port of ESP and IKE through a NAT (RFC 3948, section 2.1).
const PortNATT = 4500

// EtherType is IPv4's in an Ethernet header.
const EtherType = 0x0800

// ECN is the two-bit codepoint of RFC 3168, section 5.
type ECN uint8

// The codepoints. Mind the order on the wire: ECT(1) is 01, ECT(0) is 10.
const (
	NotECT ECN = 0
	ECT1   ECN = 1
	ECT0   ECN = 2
	CE     ECN = 3
)

// String is the name RFC 6040 uses.
func (e ECN) String() string {
	return [4]string{"Not-ECT", "ECT(1)", "ECT(0)", "CE"}[e&3]
}

// Error says why bytes are not an IPv4 packet. Its values can be compared, and
// making an error of one does not allocate.
type Error uint8

// What Parse and ParseHeader can find.
const (
	// ErrShort: fewer bytes than a header has.
	ErrShort Error = iota + 1
	// ErrVersion: the version is not 4.
	ErrVersion
	// ErrHeaderLength: the IHL says less than 20 bytes.
	ErrHeaderLength
	// ErrTotalLength: the total length is less than the header length.
	ErrTotalLength
	// ErrTruncated: the total length is more than the bytes at hand.
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

// Packet is a checked view of one IPv4 packet. It shares the memory it was
// parsed from and is valid as long as that is. The zero Packet holds nothing,
// and only its Bytes and TotalLen may be called.
type Packet struct {
	b []byte
}

// Parse checks version, header length and total length, and returns a view of
// exactly total length bytes: what follows them in b is left out. It checks
// neither the header checksum (HeaderChecksumValid does) nor the options. A
// failure is an Error.
func Parse(b []byte) (Packet, error) {
	if len(b) < HeaderLen {
		return Packet{}, ErrShort
	}
	if b[offVersionIHL]>>4 != version {
		return Packet{}, ErrVersion
	}
	header := int(b[offVersionIHL]&0x0f) * 4
	if header < HeaderLen {
		return Packet{}, ErrHeaderLength
	}
	total := int(binary.BigEndian.Uint16(b[offTotalLen:]))
	if total < header {
		return Packet{}, ErrTotalLength
	}
	if total > len(b) {
		return Packet{}, ErrTruncated
	}
	return Packet{b[:total:total]}, nil
}

// Bytes is the whole packet, header included.
func (p Packet) Bytes() []byte { return p.b }

// TotalLen is the length of the packet in bytes, header included.
func (p Packet) TotalLen() int { return len(p.b) }

// HeaderLen is the length of the header in bytes, options included: 20 to 60.
func (p Packet) HeaderLen() int { return int(p.b[offVersionIHL]&0x0f) * 4 }

// TOS is the second byte of the header: DSCP and ECN.
func (p Packet) TOS() uint8 { return p.b[offTOS] }

// DSCP is the differentiated services codepoint (RFC 2474), 0 to 63.
func (p Packet) DSCP() uint8 { return p.b[offTOS] >> 2 }

// ECN is the explicit congestion notification codepoint.
func (p Packet) ECN() ECN { return ECN(p.b[offTOS] & 3) }

// ID is the identification that the fragments of a packet share.
func (p Packet) ID() uint16 { return binary.BigEndian.Uint16(p.b[offID:]) }

func (p Packet) flagsOffset() uint16 { return binary.BigEndian.Uint16(p.b[offFragment:]) }

// DF is the don't-fragment flag.
func (p Packet) DF() bool { return p.flagsOffset()&flagDF != 0 }

// MF is the more-fragments flag.
func (p Packet) MF() bool { return p.flagsOffset()&flagMF != 0 }

// FragmentOffset is where the payload belongs in the unfragmented packet's, in
// bytes: the field counts in units of 8.
func (p Packet) FragmentOffset() int { return int(p.flagsOffset()&maskOffset) * 8 }

// IsFragment reports whether the packet is a fragment, first or later.
func (p Packet) IsFragment() bool { return p.flagsOffset()&(flagMF|maskOffset) != 0 }

// TTL is the time to live.
func (p Packet) TTL() uint8 { return p.b[offTTL] }

// Protocol is the number of the payload's protocol.
func (p Packet) Protocol() uint8 { return p.b[offProtocol] }

// Source is the source address.
func (p Packet) Source() [4]byte { return [4]byte(p.b[offSource:]) }

// Destination is the destination address.
func (p Packet) Destination() [4]byte { return [4]byte(p.b[offDestination:]) }

// Options are the header's options, padding included; empty if there are none.
func (p Packet) Options() []byte { return p.b[HeaderLen:p.HeaderLen()] }

// Payload is what follows the header.
func (p Packet) Payload() []byte { return p.b[p.HeaderLen():] }

// HeaderChecksumValid reports whether the header checksum is right.
func (p Packet) HeaderChecksumValid() bool {
	return Sum(p.b[:p.HeaderLen()], 0) == 0xffff
}

// SetTOS changes DSCP and ECN. If the header checksum was right it stays right.
func (p Packet) SetTOS(tos uint8) {
	p.setWord(offVersionIHL, uint16(p.b[offVersionIHL])<<8|uint16(tos))
}

// SetECN changes the ECN codepoint. If the header checksum was right it stays right.
func (p Packet) SetECN(ecn ECN) { p.SetTOS(p.b[offTOS]&^3 | uint8(ecn&3)) }

// SetTTL changes the time to live. If the header checksum was right it stays right.
func (p Packet) SetTTL(ttl uint8) {
	p.setWord(offTTL, uint16(ttl)<<8|uint16(p.b[offProtocol]))
}

// SetDestination changes the destination and updates the header checksum.
func (p Packet) SetDestination(a [4]byte) {
	p.setWord(offDestination, binary.BigEndian.Uint16(a[:2]))
	p.setWord(offDestination+2, binary.BigEndian.Uint16(a[2:]))
}

// setWord changes the 16-bit word at the even offset off, and the header
// checksum with it. A wrong checksum stays wrong by as much, which is the reason
// not to compute it anew: a packet damaged on its way must not be passed off as
// a sound one.
func (p Packet) setWord(off int, word uint16) {
	old := binary.BigEndian.Uint16(p.b[off:])
	binary.BigEndian.PutUint16(p.b[off:], word)
	sum := binary.BigEndian.Uint16(p.b[offChecksum:])
	binary.BigEndian.PutUint16(p.b[offChecksum:], UpdateChecksum16(sum, old, word))
}
