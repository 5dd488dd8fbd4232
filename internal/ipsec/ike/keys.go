package ike

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"hash"

	"ipipd/internal/ipsec/esp"
)

// newHash returns the hash function of an integrity algorithm.
func newHash(h esp.Integrity) func() hash.Hash {
	switch h {
	case esp.HMACSHA256:
		return sha256.New
	case esp.HMACSHA384:
		return sha512.New384
	case esp.HMACSHA512:
		return sha512.New
	}
	return sha1.New
}

// digest hashes the concatenation of parts.
func digest(h esp.Integrity, parts ...[]byte) []byte {
	f := newHash(h)()
	for _, p := range parts {
		f.Write(p)
	}
	return f.Sum(nil)
}

// prf is the pseudo-random function of both versions: HMAC over the concatenation of parts (RFC
// 2409 section 4, RFC 7296 section 2.13).
func prf(h esp.Integrity, key []byte, parts ...[]byte) []byte {
	f := hmac.New(newHash(h), key)
	for _, p := range parts {
		f.Write(p)
	}
	return f.Sum(nil)
}

// prfPlus returns n bytes of prf+ (RFC 7296 section 2.13).
func prfPlus(h esp.Integrity, key []byte, n int, seed ...[]byte) []byte {
	var out, t []byte
	for i := byte(1); len(out) < n; i++ {
		t = prf(h, key, append(append([][]byte{t}, seed...), []byte{i})...)
		out = append(out, t...)
	}
	return out[:n]
}

// newBlock returns the block cipher of a CBC proposal.
func newBlock(p Proposal, key []byte) (cipher.Block, error) {
	if p.Cipher == esp.TripleDESCBC {
		return des.NewTripleDESCipher(key)
	}
	return aes.NewCipher(key)
}

// v1Keys are the keys of an ISAKMP SA (RFC 2409 section 5).
type v1Keys struct {
	hash             esp.Integrity
	skeyid           []byte // SKEYID
	skeyidD, skeyidA []byte // SKEYID_d and SKEYID_a
	key              []byte // of block
	block            cipher.Block
	phase1IV         []byte // for message 5
}

// deriveV1 derives the keys for a pre-shared key (RFC 2409 section 5), the cipher's key and the
// first IV (appendix B).
func deriveV1(p Proposal, secret, ni, nr, shared, publicI, publicR []byte, ckyI, ckyR ikeSPI) (*v1Keys, error) {
	k := &v1Keys{hash: p.Hash}
	k.skeyid = prf(p.Hash, secret, ni, nr)
	k.skeyidD = prf(p.Hash, k.skeyid, shared, ckyI[:], ckyR[:], []byte{0})
	k.skeyidA = prf(p.Hash, k.skeyid, k.skeyidD, shared, ckyI[:], ckyR[:], []byte{1})
	e := prf(p.Hash, k.skeyid, k.skeyidA, shared, ckyI[:], ckyR[:], []byte{2})
	key := e
	if n := p.KeyBits / 8; len(e) < n {
		t := []byte{0}
		for key = nil; len(key) < n; {
			t = prf(p.Hash, e, t)
			key = append(key, t...)
		}
	}
	k.key = key[:p.KeyBits/8]
	var err error
	if k.block, err = newBlock(p, k.key); err != nil {
		return nil, err
	}
	k.phase1IV = digest(p.Hash, publicI, publicR)[:k.block.BlockSize()]
	return k, nil
}

// phase2IV returns the IV of the first message of a phase 2 exchange with that message ID (RFC
// 2409 appendix B).
func (k *v1Keys) phase2IV(lastOfPhase1 []byte, id uint32) []byte {
	return digest(k.hash, lastOfPhase1, be32(id))[:k.block.BlockSize()]
}

// keymat returns the keys of one direction of an ESP SA (RFC 2409 section 5.5). shared is nil
// without PFS.
func (k *v1Keys) keymat(s esp.Suite, shared []byte, spi uint32, ni, nr []byte) esp.Keys {
	var out, t []byte
	n := s.EncryptionKeyLen() + s.IntegrityKeyLen()
	for len(out) < n {
		t = prf(k.hash, k.skeyidD, t, shared, []byte{protoESP}, be32(spi), ni, nr)
		out = append(out, t...)
	}
	return splitKeys(s, out)
}

func splitKeys(s esp.Suite, b []byte) esp.Keys {
	n := s.EncryptionKeyLen()
	return esp.Keys{Encryption: b[:n:n], Integrity: b[n : n+s.IntegrityKeyLen() : n+s.IntegrityKeyLen()]}
}

func be32(v uint32) []byte { return []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)} }

// encryptV1 returns the message and its last ciphertext block, the next IV. The payloads are
// padded with zeros to whole blocks.
func (k *v1Keys) encryptV1(h header, ps []payload, iv []byte) (msg, nextIV []byte) {
	h.flags |= flagEncrypted
	h.next = firstType(ps)
	b := appendPayloads(make([]byte, headerLen, 512), ps)
	size := k.block.BlockSize()
	for (len(b)-headerLen)%size != 0 {
		b = append(b, 0)
	}
	cipher.NewCBCEncrypter(k.block, iv).CryptBlocks(b[headerLen:], b[headerLen:])
	h.put(b)
	return b, append([]byte(nil), b[len(b)-size:]...)
}

// decryptV1 decrypts a message, without authenticating it: that takes the HASH payload. The
// returned plain is the payloads without their padding.
func (k *v1Keys) decryptV1(h header, b, iv []byte) (ps []payload, plain, nextIV []byte, err error) {
	size := k.block.BlockSize()
	text := b[headerLen:]
	if len(text) == 0 || len(text)%size != 0 {
		return nil, nil, nil, errLength
	}
	plain = make([]byte, len(text))
	cipher.NewCBCDecrypter(k.block, iv).CryptBlocks(plain, text)
	ps, rest, err := parsePayloads(plain, h.next)
	if err != nil {
		return nil, nil, nil, err
	}
	return ps, plain[:len(plain)-len(rest)], append([]byte(nil), text[len(text)-size:]...), nil
}
