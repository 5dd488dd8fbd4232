package esp

import (
	"errors"
	"fmt"
)

// Cipher is an encryption algorithm.
type Cipher uint8

// The ciphers. AESGCM protects integrity as well (a combined mode).
const (
	AESCBC Cipher = iota + 1
	AESGCM
	TripleDESCBC
)

// Integrity is an integrity algorithm, named by its hash; the ICV is truncated
// as its RFC says. The zero value goes with a combined mode only.
type Integrity uint8

// The integrity algorithms.
const (
	HMACSHA1   Integrity = iota + 1 // 96 bits, RFC 2404
	HMACSHA256                      // 128 bits, RFC 4868
	HMACSHA384                      // 192 bits
	HMACSHA512                      // 256 bits
)

// Suite is the pair of algorithms of an SA.
type Suite struct {
	Cipher Cipher
	// KeyBits is the cipher's key length: 128, 192 or 256 for AES, 192 for 3DES.
	KeyBits int
	// Integrity is zero for AESGCM and no other.
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

// Validate reports whether the suite is one that this package has.
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

// String is the suite as people write it: aes-256-cbc/sha1, aes-128-gcm.
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

// EncryptionKeyLen is how many bytes of keying material the cipher takes, the
// salt of AES-GCM included (RFC 4106 section 8.1).
func (s Suite) EncryptionKeyLen() int {
	if s.Cipher == AESGCM {
		return s.KeyBits/8 + gcmSaltLen
	}
	return s.KeyBits / 8
}

// IntegrityKeyLen is how many bytes of keying material the integrity algorithm takes.
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
	return 8 // GCM: RFC 4106 section 3.1; 3DES: its block
}

func (s Suite) icvLen() int {
	if s.Cipher == AESGCM {
		return gcmICVLen
	}
	return integrities[s.Integrity].icv
}

// align is what payload, padding and trailer together are a multiple of: the
// cipher's block, and four bytes at least (RFC 4303 section 2.4).
func (s Suite) align() int {
	switch s.Cipher {
	case AESCBC:
		return 16
	case TripleDESCBC:
		return 8
	}
	return 4
}

// MaxInner is the largest inner packet of a tunnel over a path with that MTU:
// what is left after the outer header of 20 bytes, UDP encapsulation if udp is
// set, ESP, and the alignment of its trailer. 1438 for AES-CBC with HMAC-SHA1
// over 1500, 1422 with UDP.
func (s Suite) MaxInner(mtu int, udp bool) int {
	room := mtu - 20 - headerLen - s.ivLen() - s.icvLen()
	if udp {
		room -= udpLen
	}
	return max(0, room/s.align()*s.align()-trailerLen)
}

// Keys is the keying material of one direction of an SA. It never shows itself
// in a log or an error.
type Keys struct {
	// Encryption is Suite.EncryptionKeyLen bytes, for AES-GCM the key and then the salt.
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
