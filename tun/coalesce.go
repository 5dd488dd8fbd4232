package tun

import (
	"bytes"
	"encoding/binary"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

const (
	// maxOpenFlows is how many flows can be coalesced at a time.
	maxOpenFlows = 16
	// maxTCPSegments and maxUDPSegments bound the segments of an output: one iovec each
	// (UIO_MAXIOV is 1024), and UDP_GRO_CNT_MAX (udp_offload.c).
	maxTCPSegments = 512
	maxUDPSegments = 64

	dontFragment = 0x40 // in the byte at ipv4.OffFragment
)

// coalescer merges in-order segments of a flow within a batch into superpackets, by the
// rules of the kernel's GRO (tcp_gro_receive, udp_gro_receive_segment, inet_gro_receive), so
// that the host's stack is traversed once for many segments. TUN has GRO for what is written
// to it only with IFF_NAPI, which we don't use.
//
// Packets of a flow are never reordered: an output is written in the place of its first
// packet, and is closed by the first packet of its flow that cannot be merged. Packets of
// different flows may be reordered.
type coalescer struct {
	// uso reports that the kernel accepts UDP superpackets.
	uso bool

	outputs []output
	// next[i] is the index in the batch of the packet after packet i in its output, or
	// none.
	next []int32
	// open[:openCount] are the flows whose output can still grow, each at most once.
	open      [maxOpenFlows]openFlow
	openCount int
	evict     int // the last slot of open that was replaced, round robin
}

// none is the index of no packet, and of no flow.
const none = -1

// output is one packet to be written, with packets of the batch by index.
type output struct {
	transport transport // of the head; zero if that is not well-formed TCP or UDP
	head      int32     // the first packet, whose headers the output has
	tail      int32     // the last packet
	count     int32
	length    int    // in bytes, headers included
	gsoSize   int    // payload of each segment but the last
	seq       uint32 // TCP sequence number of the next segment
	id        uint16 // IP ID of the next segment
	verified  bool   // the head's checksums are correct
}

// openFlow is an open flow and the index of its output. Addresses and ports are as on the
// wire, source first.
type openFlow struct {
	addresses uint64
	ports     uint32
	protocol  uint8
	output    int32
}

// plan fills c.outputs, in the order to write them in. They refer to batch by index.
func (c *coalescer) plan(batch []*packet.Buffer) {
	c.outputs, c.openCount = c.outputs[:0], 0
	if len(c.next) < len(batch) {
		c.next = make([]int32, len(batch))
		c.outputs = make([]output, 0, len(batch))
	}
	for i, b := range batch {
		p, at := b.Bytes(), none
		t, ok := parseTransport(p)
		grows := false
		var flow openFlow
		switch {
		case !ok:
			t = transport{}
			c.closeAddresses(p)
		case t.Start != ipv4.HeaderLen: // like GRO, don't merge packets with IP options
			c.closeAddresses(p)
		default:
			flow = openFlow{
				addresses: binary.NativeEndian.Uint64(p[ipv4.OffSource:]),
				ports:     binary.NativeEndian.Uint32(p[ipv4.HeaderLen:]),
				protocol:  t.Protocol,
			}
			if at = c.find(&flow); at != none && c.add(batch, at, i, &t) {
				continue
			}
			grows = b.SegmentSize == 0 && c.mergeable(p, &t)
		}
		o := output{transport: t, head: int32(i), tail: int32(i), count: 1, length: len(p)}
		c.next[i] = none
		if grows {
			o.expect(p, &t)
			o.gsoSize = len(p) - t.Payload
			flow.output = int32(len(c.outputs))
			c.put(at, &flow)
		} else if at != none {
			c.close(at)
		}
		c.outputs = append(c.outputs, o)
	}
}

// add merges packet i of the batch, with layout t, into the output of open flow at. If it
// returns false, that flow must be closed or replaced.
func (c *coalescer) add(batch []*packet.Buffer, at, i int, t *transport) bool {
	o := &c.outputs[c.open[at].output]
	b, head := batch[i], batch[o.head]
	p := b.Bytes()
	if b.SegmentSize != 0 || !o.canMerge(head.Bytes(), p, t) {
		return false
	}
	// The kernel trusts the checksums of a superpacket, so verify them; last, because
	// only that is expensive.
	if !o.verified {
		if !o.transport.checksumsValid(head) {
			return false
		}
		o.verified = true
	}
	if !t.checksumsValid(b) {
		return false
	}
	c.next[o.tail], c.next[i] = int32(i), none
	o.tail = int32(i)
	o.count++
	o.length += len(p) - t.Payload
	o.expect(p, t)
	if len(p)-t.Payload < o.gsoSize || o.full() || t.Protocol == ipv4.ProtocolTCP && p[ipv4.HeaderLen+ipv4.OffTCPFlags]&(ipv4.TCPFlagPSH|ipv4.TCPFlagFIN) != 0 {
		c.close(at)
	}
	return true
}

// expect sets the ID and sequence number that must follow p.
func (o *output) expect(p []byte, t *transport) {
	o.id = binary.BigEndian.Uint16(p[ipv4.OffID:]) + 1
	if t.Protocol == ipv4.ProtocolTCP {
		o.seq = binary.BigEndian.Uint32(p[ipv4.HeaderLen+ipv4.OffTCPSeq:]) + uint32(len(p)-t.Payload)
	}
}

func (o *output) full() bool {
	if o.transport.Protocol == ipv4.ProtocolUDP {
		return o.count >= maxUDPSegments
	}
	return o.count >= maxTCPSegments
}

// mergeable reports whether p may be the head of an output: it has payload, and no flag
// that ends one.
func (c *coalescer) mergeable(p []byte, t *transport) bool {
	if len(p) == t.Payload {
		return false
	}
	if t.Protocol == ipv4.ProtocolUDP {
		return c.uso
	}
	// PSH and FIN end an output; SYN, RST, URG and CWR are never merged.
	return p[ipv4.HeaderLen+ipv4.OffTCPFlags]&^ipv4.TCPFlagECE == ipv4.TCPFlagACK
}

// canMerge reports whether splitting the output, whose first packet is head, would restore p
// as its next segment. It does not verify checksums.
func (o *output) canMerge(head, p []byte, t *transport) bool {
	n := len(p) - t.Payload
	if n == 0 || n > o.gsoSize || t.Payload != o.transport.Payload || o.length+n > packet.MaxSize {
		return false
	}
	// TOS (DSCP and ECN), DF, TTL; parseTransport excluded fragments.
	if head[ipv4.OffTOS] != p[ipv4.OffTOS] || head[ipv4.OffFragment] != p[ipv4.OffFragment] || head[ipv4.OffTTL] != p[ipv4.OffTTL] {
		return false
	}
	// Without DF the ID may be needed for reassembly. With DF the datagram is atomic and
	// its ID meaningless (RFC 6864, section 4.1).
	if p[ipv4.OffFragment]&dontFragment == 0 && binary.BigEndian.Uint16(p[ipv4.OffID:]) != o.id {
		return false
	}
	if t.Protocol == ipv4.ProtocolUDP {
		return true
	}
	// Only the last segment may have PSH or FIN: add closes the flow then.
	a, b := head[ipv4.HeaderLen:t.Payload], p[ipv4.HeaderLen:t.Payload]
	return binary.BigEndian.Uint32(b[ipv4.OffTCPSeq:]) == o.seq &&
		binary.NativeEndian.Uint32(a[ipv4.OffTCPAck:]) == binary.NativeEndian.Uint32(b[ipv4.OffTCPAck:]) &&
		a[ipv4.OffTCPDataOffset] == b[ipv4.OffTCPDataOffset] &&
		a[ipv4.OffTCPFlags] == b[ipv4.OffTCPFlags]&^(ipv4.TCPFlagPSH|ipv4.TCPFlagFIN) &&
		binary.NativeEndian.Uint16(a[ipv4.OffTCPWindow:]) == binary.NativeEndian.Uint16(b[ipv4.OffTCPWindow:]) &&
		binary.NativeEndian.Uint16(a[ipv4.OffTCPUrgent:]) == binary.NativeEndian.Uint16(b[ipv4.OffTCPUrgent:]) &&
		bytes.Equal(a[ipv4.TCPHeaderLen:], b[ipv4.TCPHeaderLen:])
}

// header prepares the head of an output to be written, followed by the payloads of the
// others, and returns the vnet.Header to go before it. It changes the head's headers.
func (c *coalescer) header(batch []*packet.Buffer, o *output) vnet.Header {
	b, t := batch[o.head], &o.transport
	p := b.Bytes()
	switch {
	case t.Payload == 0: // not TCP or UDP: nothing to offload
		return vnet.Header{}
	case o.count > 1:
		if t.Protocol == ipv4.ProtocolTCP {
			p[t.Start+ipv4.OffTCPFlags] |= batch[o.tail].Bytes()[t.Start+ipv4.OffTCPFlags] & (ipv4.TCPFlagPSH | ipv4.TCPFlagFIN)
		}
		t.putLengths(p, o.length)
		return t.offloadHeader(p, o.length, o.gsoSize)
	case b.SegmentSize != 0 || b.Checksum == packet.ChecksumPartial:
		return t.offloadHeader(p, len(p), int(b.SegmentSize))
	}
	return vnet.Header{}
}

// find returns the index of flow in open, or none.
func (c *coalescer) find(flow *openFlow) int {
	for i := range c.open[:c.openCount] {
		f := &c.open[i]
		if f.ports == flow.ports && f.addresses == flow.addresses && f.protocol == flow.protocol {
			return i
		}
	}
	return none
}

// put opens flow in slot at or, if at is none, in a free slot, evicting another flow if
// there is none.
func (c *coalescer) put(at int, flow *openFlow) {
	if at == none {
		if c.openCount < len(c.open) {
			at = c.openCount
			c.openCount++
		} else {
			c.evict = (c.evict + 1) % len(c.open)
			at = c.evict
		}
	}
	c.open[at] = *flow
}

func (c *coalescer) close(at int) {
	c.openCount--
	c.open[at] = c.open[c.openCount]
}

// closeAddresses closes all flows of p's protocol between p's addresses. It is for packets
// whose flow is not known: fragments, malformed packets and those with IP options.
func (c *coalescer) closeAddresses(p []byte) {
	if len(p) < ipv4.HeaderLen {
		return
	}
	addresses := binary.NativeEndian.Uint64(p[ipv4.OffSource:])
	for i := c.openCount - 1; i >= 0; i-- {
		if f := &c.open[i]; f.addresses == addresses && f.protocol == p[ipv4.OffProtocol] {
			c.close(i)
		}
	}
}
