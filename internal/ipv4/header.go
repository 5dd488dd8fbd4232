package ipv4

import "encoding/binary"

// Header is a header in value form: what a builder fills in, and what is left
// of a packet that an ICMP message quotes only the beginning of.
type Header struct {
	// TOS is DSCP and ECN.
	TOS uint8
	// TotalLen is the length of the whole packet in bytes.
	TotalLen int
	// ID is the identification.
	ID uint16
	// DF and MF are the flags: don't fragment, more fragments.
	DF, MF bool
	// FragmentOffset is in bytes, a multiple of 8.
	FragmentOffset int
	// TTL is the time to live.
	TTL uint8
	// Protocol is the number of the payload's protocol.
	Protocol uint8
	// Source and Destination are the addresses.
	Source, Destination [4]byte
}

// Put writes the header into b[:20], checksum included, with no options. It
// writes every byte of those and panics if b has fewer. The bits of a TotalLen
// or FragmentOffset that the field has no room for are lost.
func (h *Header) Put(b []byte) { h.PutOptions(b, nil) }

// PutOptions is Put with options behind the header, padded by the caller to a
// multiple of 4 bytes, at most 40: it writes b[:20+len(options)].
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
	b[offVersionIHL] = version<<4 | uint8(len(b)/4)
	b[offTOS] = h.TOS
	binary.BigEndian.PutUint16(b[offTotalLen:], uint16(h.TotalLen))
	binary.BigEndian.PutUint16(b[offID:], h.ID)
	binary.BigEndian.PutUint16(b[offFragment:], fragment)
	b[offTTL] = h.TTL
	b[offProtocol] = h.Protocol
	binary.BigEndian.PutUint16(b[offChecksum:], 0)
	*(*[4]byte)(b[offSource:]) = h.Source
	*(*[4]byte)(b[offDestination:]) = h.Destination
	binary.BigEndian.PutUint16(b[offChecksum:], Checksum(b, 0))
}

// Header is the packet's header in value form, its options left out.
func (p Packet) Header() Header {
	h, _, _ := ParseHeader(p.b) // Parse has checked all that could fail
	return h
}

// ParseHeader reads a header whose packet need not be there as a whole: b may
// end anywhere behind the header. It returns the header and its length in bytes,
// options included. A failure is an Error, never ErrTruncated.
func ParseHeader(b []byte) (h Header, headerLen int, err error) {
	if len(b) < HeaderLen {
		return Header{}, 0, ErrShort
	}
	if b[offVersionIHL]>>4 != version {
		return Header{}, 0, ErrVersion
	}
	headerLen = int(b[offVersionIHL]&0x0f) * 4
	if headerLen < HeaderLen {
		return Header{}, 0, ErrHeaderLength
	}
	if len(b) < headerLen {
		return Header{}, 0, ErrShort
	}
	total := int(binary.BigEndian.Uint16(b[offTotalLen:]))
	if total < headerLen {
		return Header{}, 0, ErrTotalLength
	}
	fragment := binary.BigEndian.Uint16(b[offFragment:])
	return Header{
		TOS:            b[offTOS],
		TotalLen:       total,
		ID:             binary.BigEndian.Uint16(b[offID:]),
		DF:             fragment&flagDF != 0,
		MF:             fragment&flagMF != 0,
		FragmentOffset: int(fragment&maskOffset) * 8,
		TTL:            b[offTTL],
		Protocol:       b[offProtocol],
		Source:         [4]byte(b[offSource:]),
		Destination:    [4]byte(b[offDestination:]),
	}, headerLen, nil
}
