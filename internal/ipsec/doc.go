// Package ipsec protects tunnels with IPsec in transport mode: it negotiates SAs with
// the peer by IKE (package ike) and encrypts and decrypts packets by ESP (package esp).
//
// Each tunnel that has a secret has a Session. An outer packet passes Session.Seal and
// may be sent only if that returns drop.None: a Session without an SA (before the
// first, after the last, or closed) drops everything, so no packet leaves in cleartext.
// Packets from a Receiver have been authenticated and decrypted. A packet for such a
// tunnel that arrives in any other way must be dropped, as drop.ESPPlainText.
//
// A Manager owns UDP ports 500 and 4500 of each local address and a raw socket of IP
// protocol 50, so no other IKE daemon can use these addresses. Linux only.
package ipsec
