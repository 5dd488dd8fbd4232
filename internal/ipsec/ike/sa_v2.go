package ike

import (
	"encoding/binary"

	"ipipd/internal/ipsec/esp"
)

// Payload types of IKEv2 (RFC 7296 section 3.2, RFC 7383 section 2.5).
const (
	v2SecurityAssociation payloadType = 33
	v2KeyExchange         payloadType = 34
	v2IDi                 payloadType = 35
	v2IDr                 payloadType = 36
	v2Auth                payloadType = 39
	v2Nonce               payloadType = 40
	v2Notify              payloadType = 41
	v2Delete              payloadType = 42
	v2TSi                 payloadType = 44
	v2TSr                 payloadType = 45
	v2Encrypted           payloadType = 46
	v2Fragment            payloadType = 53
)

// Exchange types and flags of IKEv2.
const (
	exchangeInit          = 34
	exchangeAuth          = 35
	exchangeCreateChild   = 36
	exchangeInformational = 37

	flagInitiator = 0x08
	flagResponse  = 0x20
)

// Notify message types of IKEv2 (RFC 7296 section 3.10.1).
const (
	n2UnsupportedCritical = 1
	n2InvalidSyntax       = 7
	n2NoProposal          = 14
	n2InvalidKE           = 17
	n2AuthFailed          = 24
	n2TSUnacceptable      = 38
	n2TemporaryFailure    = 43
	n2ChildNotFound       = 44
	n2InitialContact      = 16384
	n2NATSource           = 16388
	n2NATDestination      = 16389
	n2Cookie              = 16390
	n2TransportMode       = 16391
	n2RekeySA             = 16393
	n2Fragmentation       = 16430
)

// Transform types (RFC 7296 section 3.3.2).
const (
	transformCipher, transformPRF, transformIntegrity, transformGroup, transformESN = 1, 2, 3, 4, 5

	v2ProtocolIKE = 1
	v2ProtocolESP = 3
)

var (
	v2PRFs        = map[esp.Integrity]uint16{esp.HMACSHA1: 2, esp.HMACSHA256: 5, esp.HMACSHA384: 6, esp.HMACSHA512: 7}
	v2Integrities = map[esp.Integrity]uint16{esp.HMACSHA1: 2, esp.HMACSHA256: 12, esp.HMACSHA384: 13, esp.HMACSHA512: 14}
)

// saProposalV2 is a proposal of an SA payload.
type saProposalV2 struct {
	number, protocol uint8
	spi              []byte
	transforms       []transformV2
}

type transformV2 struct {
	kind    uint8
	id      uint16
	keyBits uint16 // Key Length attribute; 0: absent
}

// parseSAV2 parses the body of an SA payload. The result aliases b.
func parseSAV2(b []byte) ([]saProposalV2, error) {
	var sas []saProposalV2
	total := 0
	for more := true; more; {
		if len(b) < 8 || len(sas) == maxProposals {
			return nil, errShort
		}
		n, spi, count := int(binary.BigEndian.Uint16(b[2:])), int(b[6]), int(b[7])
		if n < 8+spi || n > len(b) || b[0] != 0 && b[0] != 2 {
			return nil, errLength
		}
		more = b[0] == 2
		sa := saProposalV2{number: b[4], protocol: b[5], spi: b[8 : 8+spi]}
		ts := b[8+spi : n]
		if total += count; total > 4*maxTransforms {
			return nil, errMany
		}
		for range count {
			if len(ts) < 8 {
				return nil, errShort
			}
			m := int(binary.BigEndian.Uint16(ts[2:]))
			if m < 8 || m > len(ts) {
				return nil, errLength
			}
			t := transformV2{kind: ts[4], id: binary.BigEndian.Uint16(ts[6:])}
			as, err := parseAttributes(ts[8:m])
			if err != nil {
				return nil, err
			}
			for _, a := range as {
				if a.kind == attrKeyLen && a.value < 1<<16 {
					t.keyBits = uint16(a.value)
				} else {
					t.id = 0xffff // with an unknown attribute it must not match (RFC 7296 section 3.3.6)
				}
			}
			sa.transforms = append(sa.transforms, t)
			ts = ts[m:]
		}
		if len(ts) != 0 {
			return nil, errMalformed
		}
		sas = append(sas, sa)
		b = b[n:]
	}
	if len(b) != 0 {
		return nil, errMalformed
	}
	return sas, nil
}

// appendSAV2 returns the body of an SA payload.
func appendSAV2(sas []saProposalV2) []byte {
	var b []byte
	for i, sa := range sas {
		start := len(b)
		more := byte(2)
		if i == len(sas)-1 {
			more = 0
		}
		b = append(b, more, 0, 0, 0, sa.number, sa.protocol, byte(len(sa.spi)), byte(len(sa.transforms)))
		b = append(b, sa.spi...)
		for j, t := range sa.transforms {
			more, size := byte(3), byte(8)
			if j == len(sa.transforms)-1 {
				more = 0
			}
			if t.keyBits != 0 {
				size = 12
			}
			b = append(b, more, 0, 0, size, t.kind, 0, byte(t.id>>8), byte(t.id))
			if t.keyBits != 0 {
				b = appendAttribute(b, attrKeyLen, uint32(t.keyBits))
			}
		}
		binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start))
	}
	return b
}

// transforms returns the proposal's transforms. groups and esn are the alternatives offered for
// ESP: the Diffie-Hellman groups, and 1 for extended sequence numbers, 0 for 32-bit ones.
func (p Proposal) transforms(ike bool, groups []Group, esn []uint16) []transformV2 {
	ts := []transformV2{{kind: transformCipher, id: uint16(espTransforms[p.Cipher]), keyBits: uint16(p.KeyBits)}}
	if p.Cipher == esp.TripleDESCBC {
		ts[0].keyBits = 0
	}
	if ike {
		ts = append(ts, transformV2{kind: transformPRF, id: v2PRFs[p.Hash]})
		groups = []Group{p.Group}
	}
	if p.Cipher != esp.AESGCM {
		ts = append(ts, transformV2{kind: transformIntegrity, id: v2Integrities[p.Hash]})
	}
	for _, g := range groups {
		ts = append(ts, transformV2{kind: transformGroup, id: uint16(g)})
	}
	for _, e := range esn {
		ts = append(ts, transformV2{kind: transformESN, id: e})
	}
	return ts
}

func offerIKE(ps []Proposal, spi []byte) []saProposalV2 {
	sas := make([]saProposalV2, len(ps))
	for i, p := range ps {
		sas[i] = saProposalV2{uint8(i + 1), v2ProtocolIKE, spi, p.transforms(true, nil, nil)}
	}
	return sas
}

func offerESP(ps []Proposal, spi uint32, groups []Group) []saProposalV2 {
	sas := make([]saProposalV2, len(ps))
	for i, p := range ps {
		sas[i] = saProposalV2{uint8(i + 1), v2ProtocolESP, be32(spi), p.transforms(false, groups, []uint16{1, 0})}
	}
	return sas
}

// has reports whether the proposal offers t.
func (sa saProposalV2) has(t transformV2) bool {
	for _, x := range sa.transforms {
		if x == t {
			return true
		}
	}
	return false
}

func (sa saProposalV2) hasKind(kind uint8) bool {
	for _, x := range sa.transforms {
		if x.kind == kind && !(x.id == 0 && (kind == transformIntegrity || kind == transformGroup)) {
			return true
		}
	}
	return false
}

// covers reports whether the proposal offers all of want, and no transform type that is not in
// want. NONE (integrity, group) does not count as a type.
func (sa saProposalV2) covers(want []transformV2) bool {
	var kinds [256]bool
	for _, t := range want {
		if !sa.has(t) {
			return false
		}
		kinds[t.kind] = true
	}
	for _, t := range sa.transforms {
		if !kinds[t.kind] && sa.hasKind(t.kind) {
			return false
		}
	}
	return true
}

// chooseIKE returns the first of our proposals that the peer offers, and the proposal to answer
// with.
func chooseIKE(ours []Proposal, offered []saProposalV2) (p Proposal, answer saProposalV2, ok bool) {
	for _, p := range ours {
		want := p.transforms(true, nil, nil)
		for _, sa := range offered {
			if sa.protocol == v2ProtocolIKE && sa.covers(want) {
				return p, saProposalV2{sa.number, v2ProtocolIKE, sa.spi, want}, true
			}
		}
	}
	return Proposal{}, saProposalV2{}, false
}

// chooseESP is chooseIKE for ESP. groups are the acceptable Diffie-Hellman groups in order of
// preference, nil for none.
func chooseESP(ours []Proposal, offered []saProposalV2, groups []Group) (p Proposal, esn bool, answer saProposalV2, ok bool) {
	alternatives := [][]Group{nil}
	if groups != nil {
		alternatives = nil
		for _, g := range groups {
			alternatives = append(alternatives, []Group{g})
		}
	}
	for _, p := range ours {
		for _, gs := range alternatives {
			for _, e := range []uint16{1, 0} {
				want := p.transforms(false, gs, []uint16{e})
				for _, sa := range offered {
					if sa.protocol != v2ProtocolESP || len(sa.spi) != 4 || binary.BigEndian.Uint32(sa.spi) < 256 || !sa.covers(want) {
						continue
					}
					if len(gs) > 0 {
						p.Group = gs[0]
					}
					return p, e == 1, saProposalV2{sa.number, v2ProtocolESP, sa.spi, want}, true
				}
			}
		}
	}
	return Proposal{}, false, saProposalV2{}, false
}

func formatOfferV2(sas []saProposalV2) string {
	text := ""
	name := func(m map[esp.Integrity]uint16, id uint16) string {
		for _, h := range hashes {
			if m[h.hash] == id {
				return "-" + h.name
			}
		}
		return "-?"
	}
	for _, sa := range sas {
		if text != "" {
			text += ","
		}
		for _, t := range sa.transforms {
			switch t.kind {
			case transformCipher:
				known := "?"
				for _, c := range ciphers {
					if uint16(espTransforms[c.cipher]) == t.id && (uint16(c.bits) == t.keyBits || c.cipher == esp.TripleDESCBC) {
						known = c.name
					}
				}
				text += known
			case transformIntegrity:
				text += name(v2Integrities, t.id)
			case transformPRF:
				if !sa.hasKind(transformIntegrity) {
					text += name(v2PRFs, t.id)
				}
			case transformGroup:
				text += "-" + Group(t.id).String()
			}
		}
	}
	if text == "" {
		return "nothing"
	}
	return text
}

// trafficSelector returns the body of a TS payload for protocol 4 and one address (RFC 7296
// section 3.13).
func trafficSelector(ip [4]byte) []byte {
	b := []byte{1, 0, 0, 0, 7, protocolIPIP, 0, 16, 0, 0, 0xff, 0xff}
	b = append(b, ip[:]...)
	return append(b, ip[:]...)
}

// tsIncludes reports whether the body of a TS payload includes protocol 4 of ip. With anyAddress,
// for an end behind a NAT, any single address will do, and is returned.
func tsIncludes(b []byte, ip [4]byte, anyAddress bool) (found [4]byte, ok bool) {
	if len(b) < 4 {
		return found, false
	}
	n := int(b[0])
	for b = b[4:]; n > 0; n-- {
		if len(b) < 8 {
			return found, false
		}
		size := int(binary.BigEndian.Uint16(b[2:]))
		if size < 8 || size > len(b) {
			return found, false
		}
		if b[0] == 7 && size == 16 && (b[1] == 0 || b[1] == protocolIPIP) && b[4] == 0 && b[5] == 0 && b[6] == 0xff && b[7] == 0xff {
			from, to, at := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(ip[:])
			if from <= at && at <= to {
				return ip, true
			}
			if anyAddress && from == to {
				return [4]byte(b[8:12]), true
			}
		}
		b = b[size:]
	}
	return found, false
}
