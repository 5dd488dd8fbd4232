package ike

import (
	"encoding/binary"
	"slices"
	"time"

	"ipipd/internal/ipsec/esp"
)

// Payload types of IKEv1 (RFC 2408 section 3.1, RFC 3947 section 3.2).
const (
	v1SecurityAssociation payloadType = 1
	v1Proposal            payloadType = 2
	v1Transform           payloadType = 3
	v1KeyExchange         payloadType = 4
	v1Identification      payloadType = 5
	v1Hash                payloadType = 8
	v1Nonce               payloadType = 10
	v1Notification        payloadType = 11
	v1Delete              payloadType = 12
	v1VendorID            payloadType = 13
	v1NATDiscovery        payloadType = 20
)

// Exchange types and the encryption flag of IKEv1.
const (
	exchangeMain  = 2
	exchangeInfo  = 5
	exchangeQuick = 32

	flagEncrypted = 1
)

const (
	doiIPsec      = 1
	protoISAKMP   = 1
	protoESP      = 3
	keyIKE        = 1 // KEY_IKE, the transform ID of phase 1
	encapUDP      = 4 // UDP-Encapsulated-Transport, RFC 3947 section 5.1
	encapNormal   = 2 // Transport
	lifeSeconds   = 1
	authPreshared = 1
)

// Attribute types of phase 1 (RFC 2409 appendix A) and phase 2 (RFC 2407 section 4.5).
const (
	attrCipher, attrHash, attrAuth, attrGroup, attrLifeType, attrLife, attrKeyLen = 1, 2, 3, 4, 11, 12, 14

	attr2LifeType, attr2Life, attr2Group, attr2Mode, attr2Auth, attr2KeyLen = 1, 2, 3, 4, 5, 6
)

// saProposalV1 is a Proposal payload with its Transform payloads.
type saProposalV1 struct {
	number, protocol uint8
	spi              []byte
	transforms       []transformV1
}

type transformV1 struct {
	number, id uint8
	raw        []byte // the attributes, unparsed
}

// parseSAV1 parses the body of an SA payload. The result aliases b.
func parseSAV1(b []byte) ([]saProposalV1, error) {
	if len(b) < 8 {
		return nil, errShort
	}
	if binary.BigEndian.Uint32(b) != doiIPsec || binary.BigEndian.Uint32(b[4:]) != 1 {
		return nil, errMalformed
	}
	chain, rest, err := parsePayloads(b[8:], v1Proposal)
	if err != nil {
		return nil, err
	}
	if len(rest) != 0 || len(chain) > maxProposals {
		return nil, errMalformed
	}
	var sas []saProposalV1
	total := 0
	for _, p := range chain {
		if p.kind != v1Proposal || len(p.body) < 4 {
			return nil, errMalformed
		}
		spi := int(p.body[2])
		if len(p.body) < 4+spi {
			return nil, errShort
		}
		sa := saProposalV1{number: p.body[0], protocol: p.body[1], spi: p.body[4 : 4+spi]}
		if p.body[3] > 0 {
			ts, rest, err := parsePayloads(p.body[4+spi:], v1Transform)
			if err != nil {
				return nil, err
			}
			if total += len(ts); len(rest) != 0 || total > maxTransforms {
				return nil, errMalformed
			}
			for _, t := range ts {
				if t.kind != v1Transform || len(t.body) < 4 {
					return nil, errMalformed
				}
				sa.transforms = append(sa.transforms, transformV1{t.body[0], t.body[1], t.body[4:]})
			}
		}
		sas = append(sas, sa)
	}
	return sas, nil
}

// appendSAV1 returns the body of an SA payload with one proposal.
func appendSAV1(sa saProposalV1) []byte {
	ts := make([]payload, len(sa.transforms))
	for i, t := range sa.transforms {
		ts[i] = payload{kind: v1Transform, body: append([]byte{t.number, t.id, 0, 0}, t.raw...)}
	}
	body := append([]byte{sa.number, sa.protocol, byte(len(sa.spi)), byte(len(ts))}, sa.spi...)
	body = appendPayloads(body, ts)
	b := append(be32(doiIPsec), be32(1)...)
	return appendPayloads(b, []payload{{kind: v1Proposal, body: body}})
}

// Hash algorithms of phase 1 (RFC 2409 appendix A, IANA), and authentication algorithms of phase
// 2 (RFC 2407, IANA).
var (
	v1Hashes = map[esp.Integrity]uint32{esp.HMACSHA1: 2, esp.HMACSHA256: 4, esp.HMACSHA384: 5, esp.HMACSHA512: 6}
	v1Auths  = map[esp.Integrity]uint32{esp.HMACSHA1: 2, esp.HMACSHA256: 5, esp.HMACSHA384: 6, esp.HMACSHA512: 7}
)

// Transform IDs of ESP, the same in both versions.
var espTransforms = map[esp.Cipher]uint8{esp.AESCBC: 12, esp.AESGCM: 20, esp.TripleDESCBC: 3}

// encodePhase1 encodes proposals for IKE. It skips AES-GCM, which IKEv1 does not have.
func encodePhase1(ps []Proposal, life time.Duration) saProposalV1 {
	sa := saProposalV1{number: 1, protocol: protoISAKMP}
	for _, p := range ps {
		var raw []byte
		switch p.Cipher {
		case esp.AESCBC:
			raw = appendAttribute(raw, attrCipher, 7)
			raw = appendAttribute(raw, attrKeyLen, uint32(p.KeyBits))
		case esp.TripleDESCBC:
			raw = appendAttribute(raw, attrCipher, 5)
		default:
			continue
		}
		raw = appendAttribute(raw, attrHash, v1Hashes[p.Hash])
		raw = appendAttribute(raw, attrGroup, uint32(p.Group))
		raw = appendAttribute(raw, attrAuth, authPreshared)
		raw = appendAttribute(raw, attrLifeType, lifeSeconds)
		raw = appendAttribute(raw, attrLife, uint32(life/time.Second))
		sa.transforms = append(sa.transforms, transformV1{uint8(len(sa.transforms) + 1), keyIKE, raw})
	}
	return sa
}

// attributeMap parses attributes into a map, or returns nil if one is unknown: its meaning could
// be anything. Of the lifetimes only the one in seconds counts; a second one is in kilobytes.
func attributeMap(raw []byte, lifeType, life uint16, known ...uint16) map[uint16]uint32 {
	as, err := parseAttributes(raw)
	if err != nil {
		return nil
	}
	m := make(map[uint16]uint32, len(as))
	inSeconds := false
	for _, a := range as {
		switch {
		case a.kind == lifeType:
			inSeconds = a.value == lifeSeconds
		case a.kind == life:
			if inSeconds {
				m[life] = a.value
			}
		case slices.Contains(known, a.kind):
			if before, twice := m[a.kind]; twice && before != a.value {
				return nil
			}
			m[a.kind] = a.value
		default:
			return nil
		}
	}
	return m
}

// decodePhase1 decodes a transform of phase 1. ok is false if it is not supported.
func decodePhase1(t transformV1) (p Proposal, life time.Duration, ok bool) {
	as := attributeMap(t.raw, attrLifeType, attrLife, attrCipher, attrHash, attrAuth, attrGroup, attrKeyLen)
	if t.id != keyIKE || as == nil || as[attrAuth] != authPreshared {
		return p, 0, false
	}
	switch as[attrCipher] {
	case 7:
		p.Cipher, p.KeyBits = esp.AESCBC, int(as[attrKeyLen])
		if p.KeyBits == 0 {
			p.KeyBits = 128
		}
	case 5:
		p.Cipher, p.KeyBits = esp.TripleDESCBC, 192
	default:
		return p, 0, false
	}
	for h, n := range v1Hashes {
		if n == as[attrHash] {
			p.Hash = h
		}
	}
	p.Group = Group(as[attrGroup])
	life = seconds(as[attrLife])
	return p, life, p.Hash != 0 && p.Group.rank() != 0
}

// seconds converts a lifetime attribute; 0 is none.
func seconds(v uint32) time.Duration { return time.Duration(v) * time.Second }

// encodePhase2 encodes proposals for ESP.
func encodePhase2(ps []Proposal, spi uint32, group Group, udp bool, life time.Duration) saProposalV1 {
	sa := saProposalV1{number: 1, protocol: protoESP, spi: be32(spi)}
	mode := uint32(encapNormal)
	if udp {
		mode = encapUDP
	}
	for _, p := range ps {
		var raw []byte
		if p.Cipher != esp.TripleDESCBC {
			raw = appendAttribute(raw, attr2KeyLen, uint32(p.KeyBits))
		}
		if p.Cipher != esp.AESGCM {
			raw = appendAttribute(raw, attr2Auth, v1Auths[p.Hash])
		}
		if group != 0 {
			raw = appendAttribute(raw, attr2Group, uint32(group))
		}
		raw = appendAttribute(raw, attr2Mode, mode)
		raw = appendAttribute(raw, attr2LifeType, lifeSeconds)
		raw = appendAttribute(raw, attr2Life, uint32(life/time.Second))
		sa.transforms = append(sa.transforms, transformV1{uint8(len(sa.transforms) + 1), espTransforms[p.Cipher], raw})
	}
	return sa
}

// decodePhase2 decodes a transform for ESP. ok is false if it is not supported, or has not the
// encapsulation mode that udp asks for.
func decodePhase2(t transformV1, udp bool) (p Proposal, life time.Duration, ok bool) {
	as := attributeMap(t.raw, attr2LifeType, attr2Life, attr2Group, attr2Mode, attr2Auth, attr2KeyLen)
	if as == nil {
		return p, 0, false
	}
	for c, n := range espTransforms {
		if n == t.id {
			p.Cipher, p.KeyBits = c, int(as[attr2KeyLen])
		}
	}
	switch {
	case p.Cipher == esp.TripleDESCBC:
		p.KeyBits = 192
	case p.KeyBits == 0:
		p.KeyBits = 128
	}
	for h, n := range v1Auths {
		if n == as[attr2Auth] {
			p.Hash = h
		}
	}
	if p.Cipher == esp.AESGCM {
		p.Hash = 0
	}
	mode := uint32(encapNormal)
	if udp {
		mode = encapUDP
	}
	p.Group = Group(as[attr2Group])
	life = seconds(as[attr2Life])
	return p, life, p.suite().Validate() == nil && as[attr2Mode] == mode && (p.Group == 0 || p.Group.rank() != 0)
}
