package esp

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"hash"
	"sync/atomic"
)

// engine is the keyed cipher and MAC state of an SA. The standard library's block modes
// and HMACs are not safe for concurrent use, so each packet in progress takes an engine
// from the enginePool.
type engine struct {
	suite Suite
	// For AES-GCM.
	aead cipher.AEAD
	salt [gcmSaltLen]byte
	// For CBC with HMAC. SetIV saves allocating a BlockMode per packet.
	mode cbcMode
	mac  hash.Hash

	// Scratch space: arguments of interface methods escape to the heap.
	nonce   [gcmSaltLen + gcmIVLen]byte
	aad     [12]byte
	seqHigh [4]byte
	sum     [64]byte
	iv      [16]byte
}

// cbcMode is implemented by the results of cipher.NewCBCEncrypter and NewCBCDecrypter.
type cbcMode interface {
	cipher.BlockMode
	SetIV([]byte)
}

func newEngine(suite Suite, keys Keys, encrypt bool) (*engine, error) {
	e := &engine{suite: suite}
	if suite.Cipher == AESGCM {
		n := len(keys.Encryption) - gcmSaltLen
		block, err := aes.NewCipher(keys.Encryption[:n])
		if err != nil {
			return nil, err
		}
		copy(e.salt[:], keys.Encryption[n:])
		e.aead, err = cipher.NewGCM(block)
		return e, err
	}
	newCipher := aes.NewCipher
	if suite.Cipher == TripleDESCBC {
		newCipher = des.NewTripleDESCipher
	}
	block, err := newCipher(keys.Encryption)
	if err != nil {
		return nil, err
	}
	var mode cipher.BlockMode
	if encrypt {
		mode = cipher.NewCBCEncrypter(block, e.iv[:block.BlockSize()])
	} else {
		mode = cipher.NewCBCDecrypter(block, e.iv[:block.BlockSize()])
	}
	var ok bool
	if e.mode, ok = mode.(cbcMode); !ok {
		return nil, errors.New("esp: the standard library's CBC mode takes no new IV")
	}
	switch suite.Integrity {
	case HMACSHA1:
		e.mac = hmac.New(sha1.New, keys.Integrity)
	case HMACSHA256:
		e.mac = hmac.New(sha256.New, keys.Integrity)
	case HMACSHA384:
		e.mac = hmac.New(sha512.New384, keys.Integrity)
	case HMACSHA512:
		e.mac = hmac.New(sha512.New, keys.Integrity)
	}
	return e, nil
}

// additionalData returns AES-GCM's AAD: SPI and sequence number, 64 bits of it with ESN
// (RFC 4106 section 5).
func (e *engine) additionalData(header []byte, sequence uint64, esn bool) []byte {
	copy(e.aad[:4], header)
	if !esn {
		copy(e.aad[4:], header[4:headerLen])
		return e.aad[:8]
	}
	binary.BigEndian.PutUint64(e.aad[4:], sequence)
	return e.aad[:]
}

// seal encrypts in place and sets the ICV. body is the ESP packet, with SPI, sequence
// number and IV set.
func (e *engine) seal(body []byte, sequence uint64, esn bool) {
	iv, icv := e.suite.ivLen(), e.suite.icvLen()
	text := body[headerLen+iv : len(body)-icv]
	if e.aead != nil {
		copy(e.nonce[:], e.salt[:])
		copy(e.nonce[gcmSaltLen:], body[headerLen:])
		e.aead.Seal(text[:0], e.nonce[:], text, e.additionalData(body, sequence, esn))
		return
	}
	e.mode.SetIV(body[headerLen : headerLen+iv])
	e.mode.CryptBlocks(text, text)
	copy(body[len(body)-icv:], e.computeICV(body[:len(body)-icv], sequence, esn))
}

// open authenticates and decrypts the ESP packet body in place, and reports whether it is
// authentic.
func (e *engine) open(body []byte, sequence uint64, esn bool) bool {
	iv, icv := e.suite.ivLen(), e.suite.icvLen()
	text := body[headerLen+iv : len(body)-icv]
	if e.aead != nil {
		copy(e.nonce[:], e.salt[:])
		copy(e.nonce[gcmSaltLen:], body[headerLen:headerLen+gcmIVLen])
		_, err := e.aead.Open(text[:0], e.nonce[:], body[headerLen+iv:], e.additionalData(body, sequence, esn))
		return err == nil
	}
	mac := e.computeICV(body[:len(body)-icv], sequence, esn)
	if subtle.ConstantTimeCompare(mac, body[len(body)-icv:]) != 1 {
		return false
	}
	e.mode.SetIV(body[headerLen : headerLen+iv])
	e.mode.CryptBlocks(text, text)
	return true
}

// computeICV returns the truncated HMAC over the packet and, with ESN, the upper half of
// the sequence number, which is not transmitted (RFC 4303 section 2.2.1).
func (e *engine) computeICV(packet []byte, sequence uint64, esn bool) []byte {
	e.mac.Reset()
	e.mac.Write(packet)
	if esn {
		binary.BigEndian.PutUint32(e.seqHigh[:], uint32(sequence>>32))
		e.mac.Write(e.seqHigh[:])
	}
	return e.mac.Sum(e.sum[:0])[:e.suite.icvLen()]
}

// enginePool is a lock-free pool of engines. get makes one if none is free; put discards
// one if the pool is full.
type enginePool struct {
	suite   Suite
	keys    Keys
	encrypt bool
	free    [8]atomic.Pointer[engine]
}

func newEnginePool(suite Suite, keys Keys, encrypt bool) (*enginePool, error) {
	es := &enginePool{suite: suite, encrypt: encrypt, keys: Keys{
		Encryption: append([]byte(nil), keys.Encryption...),
		Integrity:  append([]byte(nil), keys.Integrity...),
	}}
	e, err := newEngine(suite, es.keys, encrypt)
	if err != nil {
		return nil, err
	}
	es.put(e)
	return es, nil
}

func (es *enginePool) get() *engine {
	for i := range es.free {
		if es.free[i].Load() == nil {
			continue
		}
		if e := es.free[i].Swap(nil); e != nil {
			return e
		}
	}
	e, err := newEngine(es.suite, es.keys, es.encrypt)
	if err != nil {
		panic(err) // newEnginePool succeeded with the same arguments
	}
	return e
}

func (es *enginePool) put(e *engine) {
	for i := range es.free {
		if es.free[i].CompareAndSwap(nil, e) {
			return
		}
	}
}
