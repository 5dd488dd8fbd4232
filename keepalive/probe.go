package keepalive

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"

	"ipipd/internal/ipv4"
)

// reflectTTL is the initial TTL of a reflect probe, as in GRE keepalives. The peer decrements it
// once.
const reflectTTL = 255

// ReflectProbe returns the inner packet of FormReflect: a header without payload from the peer's
// outer address (remote) to ours (local), protocol 4. Decapsulated and forwarded by the peer, it
// arrives here as an outer header without payload. The caller owns the packet.
//
// DF is set, so the ID is meaningless (RFC 6864, section 4.1), and the packet can be no fragment.
func ReflectProbe(local, remote [4]byte) []byte {
	b := make([]byte, ipv4.HeaderLen)
	h := ipv4.Header{TotalLen: len(b), DF: true, TTL: reflectTTL, Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local}
	h.Put(b)
	return b
}

// ICMP echo (RFC 792), after an IPv4 header without options:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+---------------+-------------------------------+
//	|     Type      |     Code      |           Checksum            |
//	+---------------+---------------+-------------------------------+
//	|           Identifier          |        Sequence Number        |
//	+-------------------------------+-------------------------------+
//	|     Data ...
const (
	offChecksum   = 2
	offIdentifier = 4
	offSequence   = 6

	echoTTL = 64
)

// echoData tells our replies from those to a ping on this host with the same identifier: ours are
// consumed.
var echoData = []byte("ipipd keepalive\n")

// Echo builds the probes of FormEcho and recognises the replies. Request is for one goroutine;
// IsReply is safe for concurrent use.
type Echo struct {
	source, target [4]byte
	identifier     uint16
	sequence       uint16 // of the last request
}

// NewEcho returns an Echo for requests from source to target, both inner addresses, with a random
// identifier.
func NewEcho(source, target [4]byte) *Echo {
	return &Echo{source: source, target: target, identifier: uint16(rand.Uint32())}
}

// Asks reports whether requests go from source to target.
func (e *Echo) Asks(source, target [4]byte) bool { return e.source == source && e.target == target }

// Request returns the inner packet of the next probe: an ICMP echo request with the next sequence
// number. The caller owns it.
func (e *Echo) Request() []byte {
	e.sequence++
	b := make([]byte, ipv4.HeaderLen+ipv4.ICMPHeaderLen+len(echoData))
	h := ipv4.Header{TotalLen: len(b), DF: true, TTL: echoTTL, Protocol: ipv4.ProtocolICMP, Source: e.source, Destination: e.target}
	h.Put(b)
	icmp := b[ipv4.HeaderLen:]
	icmp[0] = ipv4.ICMPEchoRequest
	binary.BigEndian.PutUint16(icmp[offIdentifier:], e.identifier)
	binary.BigEndian.PutUint16(icmp[offSequence:], e.sequence)
	copy(icmp[ipv4.ICMPHeaderLen:], echoData)
	binary.BigEndian.PutUint16(icmp[offChecksum:], ipv4.Checksum(icmp, 0))
	return b
}

// IsReply reports whether an inner packet is the reply to any Request. The caller consumes such a
// packet. It does not allocate.
func (e *Echo) IsReply(inner ipv4.Packet) bool {
	if inner.Protocol() != ipv4.ProtocolICMP || inner.Source() != e.target || inner.Destination() != e.source || inner.IsFragment() {
		return false
	}
	icmp := inner.Payload()
	return len(icmp) == ipv4.ICMPHeaderLen+len(echoData) &&
		icmp[0] == ipv4.ICMPEchoReply && icmp[1] == 0 &&
		binary.BigEndian.Uint16(icmp[offIdentifier:]) == e.identifier &&
		bytes.Equal(icmp[ipv4.ICMPHeaderLen:], echoData) &&
		ipv4.Checksum(icmp, 0) == 0
}
