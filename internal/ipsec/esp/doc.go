// Package esp is the IP Encapsulating Security Payload (RFC 4303) in transport
// mode over IPv4: security associations as functions on the bytes of a
// packet.Buffer, which they seal and open in place, in its headroom and tailroom.
//
// There is no socket, no clock, no goroutine and no log in it, and nobody
// negotiates here: keys and SPIs come from IKE (package ike), and which SA a
// packet belongs to is the gate's decision (package ipsec).
//
// Transforms: AES-CBC (RFC 3602) with HMAC-SHA1-96 (RFC 2404) or HMAC-SHA2 (RFC
// 4868), AES-GCM with a 16-byte ICV (RFC 4106), and 3DES-CBC (RFC 2451) for the
// one peer that has nothing else. Extended sequence numbers, the anti-replay
// window, dummy packets and UDP encapsulation (RFC 3948) are here.
//
// Limits: no authentication without encryption and no encryption without
// authentication; no AH; no tunnel mode, although a transport-mode packet of
// protocol 4 has the same bytes; no IPv4 fragments, which transport mode forbids
// (RFC 4303 section 3.3.4); and no resynchronisation of extended sequence
// numbers after the loss of 2^32 packets in a row (RFC 4303 appendix A3).
package esp

// Drop says why a packet does not go on. It is an error that can be compared,
// counted and returned without an allocation. The zero value is no reason: the
// packet goes on.
type Drop uint8

// The reasons, of both directions.
const (
	DropNone Drop = iota
	// DropMalformed: not a whole IPv4 packet of the announced length, or one too
	// short, or not aligned as the cipher has to leave it.
	DropMalformed
	// DropFragment: transport mode takes whole datagrams only.
	DropFragment
	// DropNoRoom: the Buffer lacks headroom or tailroom, or the result would be
	// longer than an IPv4 packet can be.
	DropNoRoom
	// DropExhausted: the next sequence number, or GCM nonce, has been used; or
	// the SA has been closed. A rekey should have replaced the SA long before.
	DropExhausted
	// DropReplay: the sequence number has been seen, or is behind the window.
	DropReplay
	// DropAuthentication: the integrity check value is wrong.
	DropAuthentication
	// DropPadding: authentic, but the padding is not 1, 2, 3… (RFC 4303 section 2.4).
	DropPadding
	// DropDummy: a dummy packet (next header 59, RFC 4303 section 2.6). Nothing
	// is wrong with it.
	DropDummy
	// DropSelector: authentic, but of a protocol that the SA is not for
	// (RFC 4301 section 5.2, step 4).
	DropSelector

	// DropNoSA: there is no SA yet, or none any more, or none with the packet's
	// SPI; the gate is closed.
	DropNoSA
	// DropCleartext: not encrypted, from a peer with which everything has to be.
	DropCleartext

	// NumDrops is the number of reasons, DropNone included, for an array of counters.
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

// String is the reason's name as counters show it.
func (d Drop) String() string {
	if int(d) < len(dropNames) {
		return dropNames[d]
	}
	return "esp-unknown"
}

// Error makes Drop an error.
func (d Drop) Error() string { return d.String() }
