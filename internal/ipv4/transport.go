package ipv4

// The TCP header (RFC 9293, section 3.1): offsets of its fields in bytes, its length without
// options, and its flags.
const (
	OffTCPSeq        = 4
	OffTCPAck        = 8
	OffTCPDataOffset = 12
	OffTCPFlags      = 13
	OffTCPWindow     = 14
	OffTCPChecksum   = 16
	OffTCPUrgent     = 18
	TCPHeaderLen     = 20

	TCPFlagFIN = 0x01
	TCPFlagSYN = 0x02
	TCPFlagPSH = 0x08
	TCPFlagACK = 0x10
	TCPFlagECE = 0x40
	TCPFlagCWR = 0x80
)

// The UDP header (RFC 768).
const (
	OffUDPLength   = 4
	OffUDPChecksum = 6
	UDPHeaderLen   = 8
)

// Transport is where the TCP or UDP header of a packet is: offsets from the packet's start, in
// bytes.
type Transport struct {
	Protocol uint8
	Start    int // of the TCP or UDP header
	Checksum int // of that header's checksum field
	Payload  int // of the TCP or UDP payload
}

// ParseTransport returns ok if the payload of p begins with all of a TCP header without options,
// or of a UDP header; if p is a fragment, only the first has one. The fields of that header are
// not checked: the TCP data offset can put Payload before the header's end, or beyond the packet's,
// and the UDP length can be any.
//
// It is just small enough for the compiler to inline.
func ParseTransport(p Packet) (t Transport, ok bool) {
	b := p.b
	start := int(b[OffVersionIHL]&0x0f) * 4
	switch b[OffProtocol] {
	case ProtocolTCP:
		if len(b) >= start+TCPHeaderLen {
			return Transport{ProtocolTCP, start, start + OffTCPChecksum, start + int(b[start+OffTCPDataOffset]>>4)*4}, true
		}
	case ProtocolUDP:
		if len(b) >= start+UDPHeaderLen {
			return Transport{ProtocolUDP, start, start + OffUDPChecksum, start + UDPHeaderLen}, true
		}
	}
	return
}
