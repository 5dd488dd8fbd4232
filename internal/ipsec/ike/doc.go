// Package ike negotiates ESP security associations with a pre-shared key: IKEv1 main mode and
// quick mode (RFC 2408, 2409) and IKEv2 (RFC 7296), as initiator and responder. A Peer is a state
// machine without sockets, clocks or goroutines: messages and the time are its input, Actions its
// output, and the caller carries them out.
//
// The only traffic negotiated is IP protocol 4 between two IPv4 hosts in transport mode, which is
// what RouterOS makes of `ipsec-secret`.
//
// Not supported: certificates, EAP, XAUTH, mode config, aggressive mode (it discloses a hash of
// the secret to any initiator), tunnel mode, AH, IPComp, several traffic selectors.
//
// Unauthenticated input is bounded: messages, payloads, proposals, half-open SAs. An
// unauthenticated message never ends an authenticated SA.
package ike
