package ipv4

import "encoding/binary"

// Header is an IPv4 header in value form, without options: to build a packet from, or of a
// quoted packet that is truncated.
type Header struct {
	// TOS is DSCP and ECN.
	TOS uint8
	// TotalLen is the length of the packet in bytes, header included.
	TotalLen int
	// ID is the identification.
	ID uint16
	// DF and MF are the flags: don't fragment, more fragments.
	DF, MF bool
	// FragmentOffset is in bytes, a multiple of 8.
	FragmentOffset int
	// TTL is the time to live.
	TTL uint8
	// Protocol is the protocol number of the payload.
	Protocol uint8
	// Source and Destination are the addresses, in network byte order.
	Source, Destination [4]byte
}

// Put writes the header without options to b[:20], checksum included. It writes every byte, and
// panics if b is shorter. Bits of TotalLen and FragmentOffset beyond their fields are lost.
func (h *Header) Put(b []byte) { h.PutOptions(b, nil) }

// PutOptions is Put with options, which the caller has padded to a multiple of 4 bytes, at most
// 40. It writes b[:20+len(options)].
func (h *Header) PutOptions(b, options []byte) {
	b = b[:HeaderLen+len(options)]
	copy(b[HeaderLen:], options)
	fragment := uint16(h.FragmentOffset/8) & maskOffset
	if h.DF {
		fragment |= flagDF
	}
	if h.MF {
		fragment |= flagMF
	}
	b[OffVersionIHL] = version<<4 | uint8(len(b)/4)
	b[OffTOS] = h.TOS
	binary.BigEndian.PutUint16(b[OffTotalLen:], uint16(h.TotalLen))
	binary.BigEndian.PutUint16(b[OffID:], h.ID)
	binary.BigEndian.PutUint16(b[OffFragment:], fragment)
	b[OffTTL] = h.TTL
	b[OffProtocol] = h.Protocol
	binary.BigEndian.PutUint16(b[OffChecksum:], 0)
	*(*[4]byte)(b[OffSource:]) = h.Source
	*(*[4]byte)(b[OffDestination:]) = h.Destination
	binary.BigEndian.PutUint16(b[OffChecksum:], Checksum(b, 0))
}

// Header returns the packet's header without its options.
func (p Packet) Header() Header {
	h, _, _ := ParseHeader(p.b) // cannot fail: Parse has checked it
	return h
}

// ParseHeader parses a header whose packet may be truncated anywhere after the header. headerLen
// is in bytes, options included. It fails with an Error, never ErrTruncated.
func ParseHeader(b []byte) (h Header, headerLen int, err error) {
	if len(b) < HeaderLen {
		return Header{}, 0, ErrShort
	}
	if b[OffVersionIHL]>>4 != version {
		return Header{}, 0, ErrVersion
	}
	headerLen = int(b[OffVersionIHL]&0x0f) * 4
	if headerLen < HeaderLen {
		return Header{}, 0, ErrHeaderLength
	}
	if len(b) < headerLen {
		return Header{}, 0, ErrShort
	}
	total := int(binary.BigEndian.Uint16(b[OffTotalLen:]))
	if total < headerLen {
		return Header{}, 0, ErrTotalLength
	}
	fragment := binary.BigEndian.Uint16(b[OffFragment:])
	return Header{
		TOS:            b[OffTOS],
		TotalLen:       total,
		ID:             binary.BigEndian.Uint16(b[OffID:]),
		DF:             fragment&flagDF != 0,
		MF:             fragment&flagMF != 0,
		FragmentOffset: int(fragment&maskOffset) * 8,
		TTL:            b[OffTTL],
		Protocol:       b[OffProtocol],
		Source:         [4]byte(b[OffSource:]),
		Destination:    [4]byte(b[OffDestination:]),
	}, headerLen, nil
}
