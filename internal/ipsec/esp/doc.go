// Package esp is the IP Encapsulating Security Payload (RFC 4303) in transport
// mode over IPv4. An SA encrypts (Seal) or decrypts (Open) a packet.Buffer in place,
// in its headroom and tailroom.
//
// The package has no socket, clock, goroutine or log. Keys and SPIs come from package
// ike; package ipsec looks up the SA of a packet.
//
// Algorithms: AES-CBC (RFC 3602) with HMAC-SHA1-96 (RFC 2404) or HMAC-SHA2 (RFC
// 4868), AES-GCM with a 16-byte ICV (RFC 4106), and 3DES-CBC (RFC 2451) for peers
// that have nothing else. It supports extended sequence numbers, the anti-replay
// window, dummy packets on receipt, and UDP encapsulation (RFC 3948).
//
// Limits: no authentication without encryption and no encryption without
// authentication; no AH; no tunnel mode, although a transport-mode packet of
// protocol 4 has the same bytes; no IPv4 fragments, which transport mode forbids
// (RFC 4303 section 3.3.4); and no resynchronisation of extended sequence
// numbers after the loss of 2^32 packets in a row (RFC 4303 appendix A3).
package esp

// Drop is the reason why a packet is dropped. It implements error without allocating, and
// can index an array of counters. The zero value means that the packet is not dropped.
type Drop uint8

// The reasons, of both directions.
const (
	DropNone Drop = iota
	// DropMalformed: the total length differs from the packet's, or the ESP packet is too
	// short, or the ciphertext is not a multiple of the block size.
	DropMalformed
	// DropFragment: transport mode is for whole datagrams only (RFC 4303 section 3.3.4).
	DropFragment
	// DropNoRoom: the Buffer lacks headroom or tailroom, or the ESP packet would exceed
	// 65535 bytes.
	DropNoRoom
	// DropExhausted: no sequence number is left (or GCM nonce, which is derived from it),
	// or the SA has been closed. A rekey should have replaced the SA long before.
	DropExhausted
	// DropReplay: the sequence number has been received before, or is left of the
	// anti-replay window.
	DropReplay
	// DropAuthentication: the integrity check value is wrong.
	DropAuthentication
	// DropPadding: authentic, but the padding is not 1, 2, 3… (RFC 4303 section 2.4).
	DropPadding
	// DropDummy: a dummy packet (next header 59, RFC 4303 section 2.6); not an error.
	DropDummy
	// DropSelector: authentic, but the protocol does not match the SA's selector
	// (RFC 4301 section 5.2, step 4).
	DropSelector

	// DropNoSA: there is no SA, or none with the packet's SPI.
	DropNoSA
	// DropCleartext: not encrypted, from a peer that must encrypt.
	DropCleartext

	// NumDrops is the length of an array of counters, DropNone included.
	NumDrops = int(DropCleartext) + 1
)

var dropNames = [NumDrops]string{
	DropNone:           "none",
	DropMalformed:      "esp-malformed",
	DropFragment:       "esp-fragment",
	DropNoRoom:         "esp-no-room",
	DropExhausted:      "esp-exhausted",
	DropReplay:         "esp-replay",
	DropAuthentication: "esp-authentication",
	DropPadding:        "esp-padding",
	DropDummy:          "esp-dummy",
	DropSelector:       "esp-selector",
	DropNoSA:           "esp-no-sa",
	DropCleartext:      "esp-plain-text",
}

// String returns the reason's name as in the drop counters.
func (d Drop) String() string {
	if int(d) < len(dropNames) {
		return dropNames[d]
	}
	return "esp-unknown"
}

// Error implements error.
func (d Drop) Error() string { return d.String() }
