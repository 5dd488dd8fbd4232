package tun

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// vnetHeader is struct virtio_net_hdr, which stands in front of every packet of
// a device opened with IFF_VNET_HDR (Virtio 1.3, section 5.1.6). Its fields have
// the byte order of the host, as in legacy virtio.
//
//	 0       1         2           4           6             8               10
//	+-------+---------+-----------+-----------+-------------+---------------+
//	| flags | gsoType | hdrLen    | gsoSize   | csumStart   | csumOffset    |
//	+-------+---------+-----------+-----------+-------------+---------------+
type vnetHeader struct {
	flags   uint8
	gsoType uint8
	// hdrLen is a hint of how much is headers. What comes from the kernel is
	// often the length of all that is in the first page, so it is only sent.
	hdrLen uint16
	// gsoSize is the payload in bytes of each segment but the last.
	gsoSize uint16
	// csumStart is where the checksum's coverage starts, csumOffset where from
	// there the field is, in bytes.
	csumStart, csumOffset uint16
}

const (
	vnetNeedsChecksum = 1 // the field holds a sum to be added to and complemented
	vnetDataValid     = 2 // the checksum has been verified

	vnetNone  = 0
	vnetTCPv4 = 1
	vnetUDP   = 5    // UDP segmentation offload, of both IP versions
	vnetECN   = 0x80 // CWR is set: on the first segment only
)

// Offsets in an IPv4 packet and, with the prefix of the protocol, in what it
// carries (RFC 791, section 3.1; RFC 9293, section 3.1; RFC 768).
const (
	ipTotalLen = 2
	ipID       = 4
	ipFragment = 6
	ipTTL      = 8
	ipProtocol = 9
	ipChecksum = 10
	ipSource   = 12
	ipHeader   = 20

	tcpSeq        = 4
	tcpAck        = 8
	tcpDataOffset = 12
	tcpFlags      = 13
	tcpWindow     = 14
	tcpChecksum   = 16
	tcpUrgent     = 18
	tcpHeader     = 20

	udpLength   = 4
	udpChecksum = 6
	udpHeader   = 8

	protocolTCP = 6
	protocolUDP = 17

	flagFIN = 0x01
	flagPSH = 0x08
	flagACK = 0x10
	flagECE = 0x40
	flagCWR = 0x80

	dontFragment = 0x40 // in the byte at ipFragment
)

// transport says where the parts of an IPv4 packet with a whole TCP or UDP
// segment are, as offsets from its start.
type transport struct {
	protocol uint8
	start    int // of the TCP or UDP header
	checksum int // of that header's checksum field
	payload  int // of what the header carries
}

// parseTransport reports whether p is one unfragmented IPv4 packet that ends
// where its header says, with a TCP or UDP segment whose header is sound.
func parseTransport(p []byte) (t transport, ok bool) {
	if len(p) < ipHeader || p[0]>>4 != 4 {
		return t, false
	}
	t.protocol = p[ipProtocol]
	t.start = int(p[0]&0x0f) * 4
	if t.start < ipHeader || int(binary.BigEndian.Uint16(p[ipTotalLen:])) != len(p) ||
		binary.BigEndian.Uint16(p[ipFragment:])&0x3fff != 0 { // MF or an offset
		return t, false
	}
	switch t.protocol {
	case protocolTCP:
		if len(p) < t.start+tcpHeader {
			return t, false
		}
		t.checksum = t.start + tcpChecksum
		length := int(p[t.start+tcpDataOffset]>>4) * 4
		t.payload = t.start + length
		return t, length >= tcpHeader && t.payload <= len(p)
	case protocolUDP:
		if len(p) < t.start+udpHeader {
			return t, false
		}
		t.checksum = t.start + udpChecksum
		t.payload = t.start + udpHeader
		return t, int(binary.BigEndian.Uint16(p[t.start+udpLength:])) == len(p)-t.start
	}
	return t, false
}

// pseudoSum is the sum of p's pseudo-header, if p has that length in bytes.
func (t *transport) pseudoSum(p []byte, length int) uint64 {
	return ipv4.PseudoHeaderSum([4]byte(p[ipSource:]), [4]byte(p[ipSource+4:]), t.protocol, length-t.start)
}

// sound reports whether the checksums of b's packet are right: the IP header's
// is always computed, TCP's and UDP's unless it is known. A UDP datagram without
// a checksum (RFC 768: zero) has none to be right.
func (t *transport) sound(b *packet.Buffer) bool {
	p := b.Bytes()
	if ipv4.Sum(p[:t.start], 0) != 0xffff {
		return false
	}
	if b.Checksum == packet.ChecksumPartial {
		return true
	}
	if t.protocol == protocolUDP && p[t.checksum]|p[t.checksum+1] == 0 {
		return false
	}
	return b.Checksum == packet.ChecksumValid || ipv4.Sum(p[t.start:], t.pseudoSum(p, len(p))) == 0xffff
}

// putChecksum computes the TCP or UDP checksum of p.
func (t *transport) putChecksum(p []byte) {
	binary.BigEndian.PutUint16(p[t.checksum:], 0)
	sum := ipv4.Checksum(p[t.start:], t.pseudoSum(p, len(p)))
	if sum == 0 && t.protocol == protocolUDP {
		sum = 0xffff // zero would say that there is none (RFC 768)
	}
	binary.BigEndian.PutUint16(p[t.checksum:], sum)
}

// putLengths sets the lengths that the headers at p tell to those of a packet of
// length bytes, and the IP header's checksum.
func (t *transport) putLengths(p []byte, length int) {
	binary.BigEndian.PutUint16(p[ipTotalLen:], uint16(length))
	if t.protocol == protocolUDP {
		binary.BigEndian.PutUint16(p[t.start+udpLength:], uint16(length-t.start))
	}
	binary.BigEndian.PutUint16(p[ipChecksum:], 0)
	binary.BigEndian.PutUint16(p[ipChecksum:], ipv4.Checksum(p[:t.start], 0))
}

// partial makes the headers at p those of a packet of length bytes with a
// partial checksum, and returns the header that tells the kernel so. With a
// size, the payload in bytes of each segment, it is that of a superpacket, unless
// one segment would hold it all.
func (t *transport) partial(p []byte, length, size int) vnetHeader {
	// The kernel wants the pseudo-header's sum in the field, not complemented.
	binary.BigEndian.PutUint16(p[t.checksum:], ipv4.Fold(t.pseudoSum(p, length)))
	h := vnetHeader{
		flags:      vnetNeedsChecksum,
		hdrLen:     uint16(t.payload),
		csumStart:  uint16(t.start),
		csumOffset: uint16(t.checksum - t.start),
	}
	if size == 0 || length-t.payload <= size {
		return h
	}
	h.gsoSize = uint16(size)
	switch {
	case t.protocol == protocolUDP:
		h.gsoType = vnetUDP
	case p[t.start+tcpFlags]&flagCWR != 0:
		h.gsoType = vnetTCPv4 | vnetECN
	default:
		h.gsoType = vnetTCPv4
	}
	return h
}
