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
