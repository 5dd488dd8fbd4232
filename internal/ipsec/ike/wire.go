package ike

import (
	"encoding/binary"
	"errors"
)

// A message, the same for both versions (RFC 2408 section 3.1, RFC 7296 section 3.1):
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|                  initiator's SPI (v1: cookie)                 |
//	|                                                               |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|                  responder's SPI (v1: cookie)                 |
//	|                                                               |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|  next payload |    version    | exchange type |     flags     |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|                          message ID                           |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|                            length                             |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
const (
	headerLen = 28
	// maxMessage bounds the length of a message: several times that of a peer with long proposal
	// lists.
	maxMessage = 16384
	// maxPayloads, maxProposals and maxTransforms bound the work for one message.
	maxPayloads   = 48
	maxProposals  = 32
	maxTransforms = 64
)

const (
	version1 = 0x10
	version2 = 0x20
)

// ikeSPI is the SPI of an IKE SA, which RFC 2408 calls a cookie.
type ikeSPI [8]byte

type header struct {
	initiator, responder ikeSPI
	next                 payloadType
	version, exchange    uint8
	flags                uint8
	id                   uint32
	length               int
}

// Errors of the codec. They are not more specific, as nobody sees them but in tests.
var (
	errShort     = errors.New("ike: message cut short")
	errLength    = errors.New("ike: a length does not fit")
	errMany      = errors.New("ike: more payloads than any peer has use for")
	errMalformed = errors.New("ike: malformed payload")
)

// parseHeader parses the header. Its length must be that of the datagram.
func parseHeader(b []byte) (header, error) {
	if len(b) < headerLen {
		return header{}, errShort
	}
	h := header{
		next: payloadType(b[16]), version: b[17], exchange: b[18], flags: b[19],
		id: binary.BigEndian.Uint32(b[20:]),
	}
	copy(h.initiator[:], b)
	copy(h.responder[:], b[8:])
	if length := binary.BigEndian.Uint32(b[24:]); uint64(length) != uint64(len(b)) || length > maxMessage {
		return header{}, errLength
	}
	h.length = len(b)
	return h, nil
}

// put writes the header to the front of b, which must be the whole message.
func (h *header) put(b []byte) {
	copy(b, h.initiator[:])
	copy(b[8:], h.responder[:])
	b[16], b[17], b[18], b[19] = byte(h.next), h.version, h.exchange, h.flags
	binary.BigEndian.PutUint32(b[20:], h.id)
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
}

// payloadType is the type of a payload. IKEv1 and IKEv2 have different ones.
type payloadType uint8

const payloadNone payloadType = 0

// payload is one payload of a message. Its body excludes the generic header.
type payload struct {
	kind payloadType
	// critical is IKEv2's critical flag (RFC 7296 section 3.2).
	critical bool
	body     []byte
}

// parsePayloads parses a chain of payloads whose first one has type first. The bodies alias b.
// rest is what follows the chain: the padding, in an encrypted IKEv1 message.
func parsePayloads(b []byte, first payloadType) (ps []payload, rest []byte, err error) {
	for next := first; next != payloadNone; {
		if len(ps) == maxPayloads {
			return nil, nil, errMany
		}
		if len(b) < 4 {
			return nil, nil, errShort
		}
		n := int(binary.BigEndian.Uint16(b[2:]))
		if n < 4 || n > len(b) {
			return nil, nil, errLength
		}
		ps = append(ps, payload{kind: next, critical: b[1]&0x80 != 0, body: b[4:n:n]})
		next, b = payloadType(b[0]), b[n:]
	}
	return ps, b, nil
}

// appendPayloads appends the payloads with their generic headers, chained by type.
func appendPayloads(b []byte, ps []payload) []byte {
	for i, p := range ps {
		next := payloadNone
		if i+1 < len(ps) {
			next = ps[i+1].kind
		}
		b = append(b, byte(next), 0)
		b = binary.BigEndian.AppendUint16(b, uint16(4+len(p.body)))
		b = append(b, p.body...)
	}
	return b
}

// find returns the body of the only payload of that type; nil if there is none or more than one.
func find(ps []payload, kind payloadType) []byte {
	var body []byte
	for _, p := range ps {
		if p.kind != kind {
			continue
		}
		if body != nil {
			return nil
		}
		if body = p.body; body == nil {
			body = []byte{}
		}
	}
	return body
}

// firstType returns the type of the first payload, for the header.
func firstType(ps []payload) payloadType {
	if len(ps) == 0 {
		return payloadNone
	}
	return ps[0].kind
}

// message returns an unencrypted message.
func message(h header, ps []payload) []byte {
	h.next = firstType(ps)
	b := appendPayloads(make([]byte, headerLen, 512), ps)
	h.put(b)
	return b
}

// attribute is a data attribute (RFC 2408 section 3.3). All known ones have numeric values.
type attribute struct {
	kind  uint16
	value uint32
}

// parseAttributes parses attributes. A value above 32 bits becomes 0xffffffff.
func parseAttributes(b []byte) ([]attribute, error) {
	var as []attribute
	for len(b) > 0 {
		if len(b) < 4 {
			return nil, errShort
		}
		kind, value := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		b = b[4:]
		if kind&0x8000 != 0 { // AF=1: the value itself
			as = append(as, attribute{kind & 0x7fff, uint32(value)})
			continue
		}
		if int(value) > len(b) {
			return nil, errLength
		}
		a := attribute{kind: kind}
		for i, v := range b[:value] {
			if v != 0 && i+4 < int(value) {
				a.value = 0xffffffff // too large, which only a lifetime may be
				break
			}
			a.value = a.value<<8 | uint32(v)
		}
		as = append(as, a)
		b = b[value:]
	}
	return as, nil
}

func appendAttribute(b []byte, kind uint16, value uint32) []byte {
	if value < 1<<16 {
		b = binary.BigEndian.AppendUint16(b, kind|0x8000)
		return binary.BigEndian.AppendUint16(b, uint16(value))
	}
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint16(b, 4)
	return binary.BigEndian.AppendUint32(b, value)
}
