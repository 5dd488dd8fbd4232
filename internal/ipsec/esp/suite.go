package esp

import (
	"errors"
	"fmt"
)

// Cipher is an encryption algorithm.
type Cipher uint8

// The ciphers. AESGCM is a combined mode, with integrity.
const (
	AESCBC Cipher = iota + 1
	AESGCM
	TripleDESCBC
)

// Integrity is an integrity algorithm, an HMAC with a truncated ICV. The zero value is for
// combined modes.
type Integrity uint8

// The integrity algorithms, with the length of the ICV.
const (
	HMACSHA1   Integrity = iota + 1 // 96 bits, RFC 2404
	HMACSHA256                      // 128 bits, RFC 4868
	HMACSHA384                      // 192 bits
	HMACSHA512                      // 256 bits
)

// Suite is the algorithms of an SA.
type Suite struct {
	Cipher Cipher
	// KeyBits is the cipher's key length: 128, 192 or 256 for AES, 192 for 3DES.
	KeyBits int
	// Integrity is zero for AESGCM only.
	Integrity Integrity
}

const (
	headerLen  = 8  // SPI and sequence number
	trailerLen = 2  // pad length and next header
	udpLen     = 8  // UDP header of an encapsulated packet
	gcmSaltLen = 4  // RFC 4106 section 4
	gcmIVLen   = 8  // RFC 4106 section 3.1
	gcmICVLen  = 16 // RFC 4106 section 6
)

var integrities = [...]struct {
	name        string
	keyLen, icv int
}{
	HMACSHA1:   {"sha1", 20, 12},
	HMACSHA256: {"sha256", 32, 16},
	HMACSHA384: {"sha384", 48, 24},
	HMACSHA512: {"sha512", 64, 32},
}

// Validate returns an error unless the suite is supported.
func (s Suite) Validate() error {
	switch s.Cipher {
	case AESCBC, AESGCM:
		if s.KeyBits != 128 && s.KeyBits != 192 && s.KeyBits != 256 {
			return fmt.Errorf("esp: AES has no key of %d bits", s.KeyBits)
		}
	case TripleDESCBC:
		if s.KeyBits != 192 {
			return fmt.Errorf("esp: 3DES has no key of %d bits", s.KeyBits)
		}
	default:
		return fmt.Errorf("esp: unknown cipher %d", s.Cipher)
	}
	if s.Cipher == AESGCM {
		if s.Integrity != 0 {
			return errors.New("esp: AES-GCM takes no integrity algorithm beside it")
		}
		return nil
	}
	if s.Integrity < HMACSHA1 || s.Integrity > HMACSHA512 {
		return errors.New("esp: a cipher that is not a combined mode needs an integrity algorithm")
	}
	return nil
}

// String formats the suite: aes-256-cbc/sha1, aes-128-gcm.
func (s Suite) String() string {
	switch s.Cipher {
	case AESGCM:
		return fmt.Sprintf("aes-%d-gcm", s.KeyBits)
	case TripleDESCBC:
		return "3des/" + s.integrityName()
	case AESCBC:
		return fmt.Sprintf("aes-%d-cbc/%s", s.KeyBits, s.integrityName())
	}
	return "none"
}

func (s Suite) integrityName() string {
	if int(s.Integrity) < len(integrities) {
		return integrities[s.Integrity].name
	}
	return "unknown"
}

// EncryptionKeyLen returns the length of the cipher's keying material in bytes, with the
// salt of AES-GCM (RFC 4106 section 8.1).
func (s Suite) EncryptionKeyLen() int {
	if s.Cipher == AESGCM {
		return s.KeyBits/8 + gcmSaltLen
	}
	return s.KeyBits / 8
}

// IntegrityKeyLen returns the length of the integrity algorithm's key in bytes.
func (s Suite) IntegrityKeyLen() int {
	if s.Cipher == AESGCM {
		return 0
	}
	return integrities[s.Integrity].keyLen
}

func (s Suite) ivLen() int {
	if s.Cipher == AESCBC {
		return 16
	}
	return 8 // GCM: RFC 4106 section 3.1; 3DES: the block size
}

func (s Suite) icvLen() int {
	if s.Cipher == AESGCM {
		return gcmICVLen
	}
	return integrities[s.Integrity].icv
}

// align returns the alignment in bytes of payload, padding and trailer together: the
// cipher's block size, but at least 4 (RFC 4303 section 2.4).
func (s Suite) align() int {
	switch s.Cipher {
	case AESCBC:
		return 16
	case TripleDESCBC:
		return 8
	}
	return 4
}

// MaxInner returns the size in bytes of the largest inner packet over a path of this MTU,
// with an outer IPv4 header of 20 bytes, ESP, and UDP encapsulation if udp is set. For
// AES-CBC with HMAC-SHA1 and MTU 1500 it is 1438, with UDP 1422.
func (s Suite) MaxInner(mtu int, udp bool) int {
	ciphertext := mtu - 20 - headerLen - s.ivLen() - s.icvLen()
	if udp {
		ciphertext -= udpLen
	}
	return max(0, ciphertext/s.align()*s.align()-trailerLen)
}

// Keys is the keying material of an SA. It cannot be printed, logged or encoded.
type Keys struct {
	// Encryption is Suite.EncryptionKeyLen bytes; for AES-GCM the key followed by the salt.
	Encryption []byte
	// Integrity is Suite.IntegrityKeyLen bytes.
	Integrity []byte
}

// String hides the keys.
func (Keys) String() string { return "(keys)" }

// GoString hides the keys from %#v.
func (Keys) GoString() string { return "(keys)" }

// Format hides the keys from every verb.
func (Keys) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(keys)")) }

// MarshalJSON hides the keys from encoders.
func (Keys) MarshalJSON() ([]byte, error) { return []byte(`"(keys)"`), nil }

func (s Suite) checkKeys(k Keys) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if len(k.Encryption) != s.EncryptionKeyLen() || len(k.Integrity) != s.IntegrityKeyLen() {
		return fmt.Errorf("esp: keys of %d and %d bytes do not fit %s", len(k.Encryption), len(k.Integrity), s)
	}
	return nil
}
