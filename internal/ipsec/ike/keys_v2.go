package ike

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"encoding/binary"
	"io"
	"net/netip"

	"ipipd/internal/ipsec/esp"
)

// v2Keys are the keys of an IKE SA (RFC 7296 section 2.14).
type v2Keys struct {
	proposal   Proposal
	material   []byte // output of prf+, which the other keys are cut from
	skD        []byte
	skPi, skPr []byte
	send, recv v2Direction
}

// v2Direction is the encryption and integrity protection of one direction.
type v2Direction struct {
	auth    []byte
	block   cipher.Block
	aead    cipher.AEAD
	salt    []byte
	counter uint64 // the IV of AES-GCM, which must not repeat (RFC 5282 section 3.1)
}

// skeyseed is SKEYSEED of IKE_SA_INIT, and rekeySKEYSEED that of a rekey (RFC 7296 section 2.18).
func skeyseed(p Proposal, ni, nr, shared []byte) []byte {
	return prf(p.Hash, append(append([]byte(nil), ni...), nr...), shared)
}

func (k *v2Keys) rekeySKEYSEED(ni, nr, shared []byte) []byte {
	return prf(k.proposal.Hash, k.skD, shared, ni, nr)
}

// deriveV2 derives the keys of an IKE SA from SKEYSEED.
func deriveV2(p Proposal, skeyseed, ni, nr []byte, spiI, spiR ikeSPI, initiator bool) (*v2Keys, error) {
	return splitV2(p, prfPlus(p.Hash, skeyseed, materialLenV2(p), ni, nr, spiI[:], spiR[:]), initiator)
}

func prfLenV2(p Proposal) int {
	return esp.Suite{Cipher: esp.AESCBC, Integrity: p.Hash}.IntegrityKeyLen()
}

func materialLenV2(p Proposal) int {
	suite := p.suite()
	return 3*prfLenV2(p) + 2*suite.IntegrityKeyLen() + 2*suite.EncryptionKeyLen()
}

// splitV2 cuts the keys from b, the output of prf+.
func splitV2(p Proposal, b []byte, initiator bool) (*v2Keys, error) {
	prfLen, authLen, keyLen := prfLenV2(p), p.suite().IntegrityKeyLen(), p.suite().EncryptionKeyLen()
	k := &v2Keys{proposal: p, material: b}
	next := func(n int) []byte {
		x := b[:n:n]
		b = b[n:]
		return x
	}
	k.skD = next(prfLen)
	ai, ar, ei, er := next(authLen), next(authLen), next(keyLen), next(keyLen)
	k.skPi, k.skPr = next(prfLen), next(prfLen)
	var err error
	own, peers := &k.send, &k.recv
	if !initiator {
		own, peers = peers, own
	}
	if *own, err = newDirection(p, ai, ei); err == nil {
		*peers, err = newDirection(p, ar, er)
	}
	return k, err
}

func newDirection(p Proposal, auth, key []byte) (d v2Direction, err error) {
	if p.Cipher != esp.AESGCM {
		d.auth = auth
		d.block, err = newBlock(p, key)
		return d, err
	}
	n := len(key) - 4
	block, err := aes.NewCipher(key[:n])
	if err != nil {
		return d, err
	}
	d.salt = key[n:]
	d.aead, err = cipher.NewGCM(block)
	return d, err
}

func (d *v2Direction) icvLen(p Proposal) int {
	if d.aead != nil {
		return 16
	}
	return map[esp.Integrity]int{esp.HMACSHA1: 12, esp.HMACSHA256: 16, esp.HMACSHA384: 24, esp.HMACSHA512: 32}[p.Hash]
}

// seal returns a message with an Encrypted payload or, if total is not 0, an Encrypted Fragment
// number (from 1) of total. first is the type of the first payload in plain.
func (k *v2Keys) seal(h header, first payloadType, plain []byte, number, total int) []byte {
	d := &k.send
	h.next = v2Encrypted
	b := make([]byte, headerLen, headerLen+len(plain)+80)
	b = append(b, byte(first), 0, 0, 0)
	if total > 0 {
		h.next = v2Fragment
		b = binary.BigEndian.AppendUint16(b, uint16(number))
		b = binary.BigEndian.AppendUint16(b, uint16(total))
	}
	start := len(b)
	icv := d.icvLen(k.proposal)
	finish := func(size int) {
		h.put(b[:size])
		binary.BigEndian.PutUint16(b[headerLen+2:], uint16(size-headerLen))
	}
	if d.aead != nil {
		d.counter++
		b = binary.BigEndian.AppendUint64(b, d.counter)
		text := append(append([]byte(nil), plain...), 0)
		b = append(b, make([]byte, len(text)+icv)...)
		finish(len(b))
		nonce := append(append([]byte(nil), d.salt...), b[start:start+8]...)
		d.aead.Seal(b[:start+8], nonce, text, b[:start])
		return b
	}
	size := d.block.BlockSize()
	iv := make([]byte, size)
	if _, err := io.ReadFull(rand.Reader, iv); err != nil {
		panic("ike: no random numbers: " + err.Error())
	}
	pad := size - (len(plain)+1)%size
	if pad == size {
		pad = 0
	}
	text := append(append([]byte(nil), plain...), make([]byte, pad+1)...)
	text[len(text)-1] = byte(pad)
	cipher.NewCBCEncrypter(d.block, iv).CryptBlocks(text, text)
	b = append(append(append(b, iv...), text...), make([]byte, icv)...)
	finish(len(b))
	copy(b[len(b)-icv:], prf(k.proposal.Hash, d.auth, b[:len(b)-icv]))
	return b
}

// open authenticates and decrypts the Encrypted payload at offset at of b, which must be the last
// one. The IV starts skip bytes into the payload.
func (k *v2Keys) open(b []byte, at, skip int) ([]byte, error) {
	d := &k.recv
	start, icv := at+skip, d.icvLen(k.proposal)
	if d.aead != nil {
		if len(b) < start+8+1+icv {
			return nil, errShort
		}
		nonce := append(append([]byte(nil), d.salt...), b[start:start+8]...)
		plain, err := d.aead.Open(nil, nonce, b[start+8:], b[:start])
		if err != nil {
			return nil, errMalformed
		}
		return unpad(plain)
	}
	size := d.block.BlockSize()
	n := len(b) - icv - start - size
	if n < size || n%size != 0 {
		return nil, errLength
	}
	tag := prf(k.proposal.Hash, d.auth, b[:len(b)-icv])[:icv]
	if subtle.ConstantTimeCompare(tag, b[len(b)-icv:]) != 1 {
		return nil, errMalformed
	}
	plain := make([]byte, n)
	cipher.NewCBCDecrypter(d.block, b[start:start+size]).CryptBlocks(plain, b[start+size:len(b)-icv])
	return unpad(plain)
}

func unpad(b []byte) ([]byte, error) {
	n := len(b) - 1 - int(b[len(b)-1])
	if n < 0 {
		return nil, errMalformed
	}
	return b[:n], nil
}

// authV2 returns the AUTH data for a shared secret (RFC 7296 section 2.15).
func authV2(h esp.Integrity, secret Secret, message, nonce, sk, id []byte) []byte {
	return prf(h, prf(h, secret, []byte("Key Pad for IKEv2")), message, nonce, prf(h, sk, id))
}

// childKeys returns the keys of a Child SA (RFC 7296 section 2.17), by who sends with them: the
// initiator of the exchange, then its responder.
func (k *v2Keys) childKeys(s esp.Suite, shared, ni, nr []byte) (initiators, responders esp.Keys) {
	n := s.EncryptionKeyLen() + s.IntegrityKeyLen()
	b := prfPlus(k.proposal.Hash, k.skD, 2*n, shared, ni, nr)
	return splitKeys(s, b[:n]), splitKeys(s, b[n:])
}

// natHashV2 returns SHA-1 over the SPIs, the address and the port (RFC 7296 section 2.23).
func natHashV2(i, r ikeSPI, at netip.AddrPort) []byte {
	ip := at.Addr().As4()
	b := append(append(append([]byte(nil), i[:]...), r[:]...), ip[:]...)
	sum := sha1.Sum(binary.BigEndian.AppendUint16(b, at.Port()))
	return sum[:]
}
