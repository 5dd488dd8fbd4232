package tun

import (
	"encoding/binary"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// vnetHeader is struct virtio_net_hdr, which precedes every packet of a device opened with
// IFF_VNET_HDR (Virtio 1.3, section 5.1.6). Its fields are in host byte order, as in legacy
// virtio.
//
//	 0       1         2           4           6             8               10
//	+-------+---------+-----------+-----------+-------------+---------------+
//	| flags | gsoType | hdrLen    | gsoSize   | csumStart   | csumOffset    |
//	+-------+---------+-----------+-----------+-------------+---------------+
type vnetHeader struct {
	flags   uint8
	gsoType uint8
	// hdrLen is a hint of the headers' length. It is only written: the kernel often
	// sets it to the length of the skb's linear part.
	hdrLen uint16
	// gsoSize is the payload in bytes of each segment but the last.
	gsoSize uint16
	// csumStart is the offset of the first byte that the checksum covers, csumOffset
	// that of the checksum field from there.
	csumStart, csumOffset uint16
}

const (
	vnetNeedsChecksum = 1 // partial checksum: the field holds the pseudo-header's sum
	vnetDataValid     = 2 // the checksum was verified

	vnetNone  = 0
	vnetTCPv4 = 1
	vnetUDP   = 5    // USO, IPv4 and IPv6 (VIRTIO_NET_HDR_GSO_UDP_L4)
	vnetECN   = 0x80 // CWR is set, for the first segment only
)

// Offsets in the IPv4, TCP and UDP headers, and the lengths of those headers without options
// (RFC 791, section 3.1; RFC 9293, section 3.1; RFC 768).
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

// transport is the layout of an unfragmented IPv4 packet with TCP or UDP: offsets from the
// packet's start, in bytes.
type transport struct {
	protocol uint8
	start    int // of the TCP or UDP header
	checksum int // of that header's checksum field
	payload  int // of the TCP or UDP payload
}

// parseTransport returns the layout of p. It returns false unless p is an unfragmented IPv4
// packet of exactly its total length with a well-formed TCP or UDP header.
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

// pseudoSum returns the sum of the pseudo-header of p, an IPv4 packet of length bytes.
func (t *transport) pseudoSum(p []byte, length int) uint64 {
	return ipv4.PseudoHeaderSum([4]byte(p[ipSource:]), [4]byte(p[ipSource+4:]), t.protocol, length-t.start)
}

// checksumsValid verifies the IP header checksum of b's packet and, unless b.Checksum is
// ChecksumPartial or ChecksumValid, the TCP or UDP checksum. It returns false for UDP
// without a checksum (zero, RFC 768), unless that is partial: merging would add one.
func (t *transport) checksumsValid(b *packet.Buffer) bool {
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
		sum = 0xffff // zero means no checksum (RFC 768)
	}
	binary.BigEndian.PutUint16(p[t.checksum:], sum)
}

// putLengths sets the length fields of the headers at p for a packet of length bytes, and
// recomputes the IP header checksum.
func (t *transport) putLengths(p []byte, length int) {
	binary.BigEndian.PutUint16(p[ipTotalLen:], uint16(length))
	if t.protocol == protocolUDP {
		binary.BigEndian.PutUint16(p[t.start+udpLength:], uint16(length-t.start))
	}
	binary.BigEndian.PutUint16(p[ipChecksum:], 0)
	binary.BigEndian.PutUint16(p[ipChecksum:], ipv4.Checksum(p[:t.start], 0))
}

// offloadHeader puts a partial checksum into the headers at p, of a packet of length bytes,
// and returns the vnetHeader to go with it. If the payload exceeds size, the payload of each
// segment in bytes, that requests segmentation; size 0 does not.
func (t *transport) offloadHeader(p []byte, length, size int) vnetHeader {
	// CHECKSUM_PARTIAL: the pseudo-header's sum, not complemented.
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
