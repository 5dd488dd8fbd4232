package ike

import "encoding/binary"

const (
	maxFragments = 16
	// fragmentSize is the length of the plaintext in a fragment: with it the IPv4 packet stays
	// below 1280 bytes (RFC 7383 section 2.5.1).
	fragmentSize = 1100
)

// reassembly collects the fragments of one message (RFC 7383 section 2.6).
type reassembly struct {
	bodies map[int][]byte // by fragment number, from 1; nil if none has arrived
	total  int
	id     uint32
	first  payloadType // the first payload inside, named by fragment 1
}

// add adds an authentic fragment. done reports that message is complete.
func (f *reassembly) add(id uint32, number, total int, first payloadType, body []byte) (_ payloadType, message []byte, done bool, err error) {
	if f.bodies == nil || f.id != id || f.total < total {
		*f = reassembly{bodies: map[int][]byte{}, total: total, id: id}
	}
	if total != f.total {
		return 0, nil, false, errMalformed
	}
	f.bodies[number] = body
	if number == 1 {
		f.first = first
	}
	if len(f.bodies) < total {
		return 0, nil, false, nil
	}
	for i := 1; i <= total; i++ {
		message = append(message, f.bodies[i]...)
	}
	f.bodies = nil
	if len(message) > maxMessage {
		return 0, nil, false, errMany
	}
	return f.first, message, true, nil
}

// open decrypts a message into its payloads. incomplete reports that there is nothing to process
// yet: the message is a fragment and others are missing. If the message is not fresh, it is a
// retransmission, of which only the first fragment causes the response to be resent (RFC 7383
// section 2.6.1).
func (s *v2SA) open(h header, b []byte, fresh bool) (ps []payload, incomplete bool, err error) {
	// Payloads in front of the Encrypted one would be in cleartext, and no peer sends any.
	if h.next != v2Encrypted && h.next != v2Fragment || len(b) < headerLen+8 {
		return nil, false, errMalformed
	}
	if int(binary.BigEndian.Uint16(b[headerLen+2:])) != len(b)-headerLen {
		return nil, false, errLength
	}
	first, skip := payloadType(b[headerLen]), 4
	if h.next == v2Fragment {
		skip = 8
	}
	plain, err := s.keys.open(b, headerLen, skip)
	if err != nil {
		return nil, false, err
	}
	if h.next == v2Fragment {
		number, total := int(binary.BigEndian.Uint16(b[headerLen+4:])), int(binary.BigEndian.Uint16(b[headerLen+6:]))
		if number == 0 || number > total || total > maxFragments {
			return nil, false, errMalformed
		}
		if !fresh {
			return nil, number != 1, nil
		}
		f := &s.requestFragments
		if h.flags&flagResponse != 0 {
			f = &s.responseFragments
		}
		var done bool
		if first, plain, done, err = f.add(h.id, number, total, first, plain); err != nil || !done {
			return nil, err == nil, err
		}
	}
	ps, rest, err := parsePayloads(plain, first)
	if err == nil && len(rest) != 0 {
		err = errMalformed
	}
	return ps, false, err
}

// seal returns the datagrams of an encrypted message, several if it has to be fragmented.
func (s *v2SA) seal(h header, ps []payload) [][]byte {
	plain := appendPayloads(nil, ps)
	if !s.canFragment || len(plain) <= fragmentSize {
		return [][]byte{s.keys.seal(h, firstType(ps), plain, 0, 0)}
	}
	total := (len(plain) + fragmentSize - 1) / fragmentSize
	var out [][]byte
	for i := range total {
		first := payloadNone
		if i == 0 {
			first = firstType(ps)
		}
		out = append(out, s.keys.seal(h, first, plain[i*fragmentSize:min(len(plain), (i+1)*fragmentSize)], i+1, total))
	}
	return out
}
