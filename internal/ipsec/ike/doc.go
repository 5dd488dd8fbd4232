// Package ike negotiates ESP security associations with a pre-shared key: IKEv1
// main mode and quick mode (RFC 2408, 2409) and IKEv2 (RFC 7296), initiator and
// responder, as state machines without sockets, clocks or goroutines. Messages
// and the time go in, actions come out, and whoever holds a Peer carries them out.
//
// It knows one kind of traffic: a transport-mode SA for IP protocol 4 between two
// IPv4 hosts, which is what RouterOS makes of `ipsec-secret`.
//
// It does not do: certificates, EAP, XAUTH, mode config, aggressive mode (which
// gives the hash of the secret to whoever asks), tunnel mode, AH, IPComp,
// several traffic selectors.
//
// What a stranger can send is bounded: messages, payloads, proposals and half-open
// exchanges. Nothing that is not authenticated ends anything that is.
package ike
