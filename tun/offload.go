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

// transport is the layout of an unfragmented IPv4 packet with well-formed TCP or UDP.
type transport ipv4.Transport

// parseTransport returns the layout of b. It returns false unless b is an unfragmented IPv4
// packet of exactly its total length with a well-formed TCP or UDP header.
func parseTransport(b []byte) (t transport, ok bool) {
	p, err := ipv4.Parse(b)
	if err != nil || p.TotalLen() != len(b) || p.IsFragment() {
		return t, false
	}
	v, ok := ipv4.ParseTransport(p)
	switch {
	case !ok:
	case v.Protocol == ipv4.ProtocolUDP:
		ok = int(binary.BigEndian.Uint16(b[v.Start+ipv4.OffUDPLength:])) == len(b)-v.Start
	default:
		ok = v.Payload >= v.Start+ipv4.TCPHeaderLen && v.Payload <= len(b)
	}
	return transport(v), ok
}

// pseudoSum returns the sum of the pseudo-header of p, an IPv4 packet of length bytes.
func (t *transport) pseudoSum(p []byte, length int) uint64 {
	return ipv4.PseudoHeaderSum([4]byte(p[ipv4.OffSource:]), [4]byte(p[ipv4.OffSource+4:]), t.Protocol, length-t.Start)
}

// checksumsValid verifies the IP header checksum of b's packet and, unless b.Checksum is
// ChecksumPartial or ChecksumValid, the TCP or UDP checksum. It returns false for UDP
// without a checksum (zero, RFC 768), unless that is partial: merging would add one.
func (t *transport) checksumsValid(b *packet.Buffer) bool {
	p := b.Bytes()
	if ipv4.Sum(p[:t.Start], 0) != 0xffff {
		return false
	}
	if b.Checksum == packet.ChecksumPartial {
		return true
	}
	if t.Protocol == ipv4.ProtocolUDP && p[t.Checksum]|p[t.Checksum+1] == 0 {
		return false
	}
	return b.Checksum == packet.ChecksumValid || ipv4.Sum(p[t.Start:], t.pseudoSum(p, len(p))) == 0xffff
}

// putChecksum computes the TCP or UDP checksum of p.
func (t *transport) putChecksum(p []byte) {
	binary.BigEndian.PutUint16(p[t.Checksum:], 0)
	sum := ipv4.Checksum(p[t.Start:], t.pseudoSum(p, len(p)))
	if sum == 0 && t.Protocol == ipv4.ProtocolUDP {
		sum = 0xffff // zero means no checksum (RFC 768)
	}
	binary.BigEndian.PutUint16(p[t.Checksum:], sum)
}

// putLengths sets the length fields of the headers at p for a packet of length bytes, and
// recomputes the IP header checksum.
func (t *transport) putLengths(p []byte, length int) {
	binary.BigEndian.PutUint16(p[ipv4.OffTotalLen:], uint16(length))
	if t.Protocol == ipv4.ProtocolUDP {
		binary.BigEndian.PutUint16(p[t.Start+ipv4.OffUDPLength:], uint16(length-t.Start))
	}
	binary.BigEndian.PutUint16(p[ipv4.OffChecksum:], 0)
	binary.BigEndian.PutUint16(p[ipv4.OffChecksum:], ipv4.Checksum(p[:t.Start], 0))
}

// offloadHeader puts a partial checksum into the headers at p, of a packet of length bytes,
// and returns the vnetHeader to go with it. If the payload exceeds size, the payload of each
// segment in bytes, that requests segmentation; size 0 does not.
func (t *transport) offloadHeader(p []byte, length, size int) vnetHeader {
	// CHECKSUM_PARTIAL: the pseudo-header's sum, not complemented.
	binary.BigEndian.PutUint16(p[t.Checksum:], ipv4.Fold(t.pseudoSum(p, length)))
	h := vnetHeader{
		flags:      vnetNeedsChecksum,
		hdrLen:     uint16(t.Payload),
		csumStart:  uint16(t.Start),
		csumOffset: uint16(t.Checksum - t.Start),
	}
	if size == 0 || length-t.Payload <= size {
		return h
	}
	h.gsoSize = uint16(size)
	switch {
	case t.Protocol == ipv4.ProtocolUDP:
		h.gsoType = vnetUDP
	case p[t.Start+ipv4.OffTCPFlags]&ipv4.TCPFlagCWR != 0:
		h.gsoType = vnetTCPv4 | vnetECN
	default:
		h.gsoType = vnetTCPv4
	}
	return h
}
