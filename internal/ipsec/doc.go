// Package ipsec keeps a tunnel encrypted, or shut: it negotiates keys with the
// remote end by IKE (package ike), seals and opens packets by ESP (package esp),
// and holds the gate between the two that is closed unless there is an SA.
//
// What the data path knows of it is a Session for each tunnel that has a
// secret. An outer packet is handed to Session.Seal, and sent only if that
// returns esp.DropNone. Packets that come in by the Receivers of a Manager have
// been opened; one for such a tunnel that came in by any other way is to be
// dropped, as esp.DropPlain. There is no way to open the gate by mistake: a Session
// without an SA, before the first, after the last, or closed, seals nothing.
//
// A Manager holds UDP ports 500 and 4500 of each local address and the socket of
// IP protocol 50, so no other IKE daemon can have those. It is for Linux.
package ipsec
