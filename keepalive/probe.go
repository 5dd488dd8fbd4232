package keepalive

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"

	"ipipd/internal/ipv4"
)

// reflectTTL is what a reflect probe starts with: the peer's forwarding takes
// one off, and GRE keepalives start with the same.
const reflectTTL = 255

// ReflectProbe is the inner packet of a probe of the form FormReflect: a header
// from the peer's outer address, remote, to ours, local, with protocol 4 and
// nothing behind it. The peer's answer is that header with nothing around it.
//
// DF is set, so that there is no fragment it could be part of, and the ID means
// nothing (RFC 6864, section 4.1).
func ReflectProbe(local, remote [4]byte) []byte {
	b := make([]byte, ipv4.HeaderLen)
	h := ipv4.Header{TotalLen: len(b), DF: true, TTL: reflectTTL, Protocol: ipv4.ProtocolIPIP, Source: remote, Destination: local}
	h.Put(b)
	return b
}

// The ICMP echo of RFC 792, behind an IPv4 header without options:
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
	typeEchoReply   = 0
	typeEchoRequest = 8

	offChecksum   = 2
	offIdentifier = 4
	offSequence   = 6
	offData       = 8

	echoTTL = 64
)

// echoData tells our replies from those to a ping of somebody on this host that
// happens to have our identifier: what is ours does not reach the host.
var echoData = []byte("ipipd keepalive\n")

// Echo makes the probes of the form FormEcho and knows the replies to them.
// One goroutine may call Request while others call IsReply.
type Echo struct {
	source, target [4]byte
	identifier     uint16
	sequence       uint16 // of the last request
}

// NewEcho asks target from source, both inner addresses, under an identifier of
// its own.
func NewEcho(source, target [4]byte) *Echo {
	return &Echo{source: source, target: target, identifier: uint16(rand.Uint32())}
}

// Request is the inner packet of the next probe: an ICMP echo request with the
// next sequence number. The caller owns it.
func (e *Echo) Request() []byte {
	e.sequence++
	b := make([]byte, ipv4.HeaderLen+offData+len(echoData))
	h := ipv4.Header{TotalLen: len(b), DF: true, TTL: echoTTL, Protocol: ipv4.ProtocolICMP, Source: e.source, Destination: e.target}
	h.Put(b)
	icmp := b[ipv4.HeaderLen:]
	icmp[0] = typeEchoRequest
	binary.BigEndian.PutUint16(icmp[offIdentifier:], e.identifier)
	binary.BigEndian.PutUint16(icmp[offSequence:], e.sequence)
	copy(icmp[offData:], echoData)
	binary.BigEndian.PutUint16(icmp[offChecksum:], ipv4.Checksum(icmp, 0))
	return b
}

// IsReply tells whether an inner packet is the reply to a Request, to an early
// one as well. Such a packet ends here. It does not allocate.
func (e *Echo) IsReply(inner ipv4.Packet) bool {
	if inner.Protocol() != ipv4.ProtocolICMP || inner.Source() != e.target || inner.Destination() != e.source || inner.IsFragment() {
		return false
	}
	icmp := inner.Payload()
	return len(icmp) == offData+len(echoData) &&
		icmp[0] == typeEchoReply && icmp[1] == 0 &&
		binary.BigEndian.Uint16(icmp[offIdentifier:]) == e.identifier &&
		bytes.Equal(icmp[offData:], echoData) &&
		ipv4.Checksum(icmp, 0) == 0
}
