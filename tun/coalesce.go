package tun

import (
	"bytes"
	"encoding/binary"

	"ipipd/internal/packet"
)

const (
	// maxOpenFlows is how many flows can be coalesced at a time.
	maxOpenFlows = 16
	// maxTCPSegments and maxUDPSegments bound the segments of an output: one iovec each
	// (UIO_MAXIOV is 1024), and UDP_GRO_CNT_MAX (udp_offload.c).
	maxTCPSegments = 512
	maxUDPSegments = 64
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
		case t.start != ipHeader: // like GRO, don't merge packets with IP options
			c.closeAddresses(p)
		default:
			flow = openFlow{
				addresses: binary.NativeEndian.Uint64(p[ipSource:]),
				ports:     binary.NativeEndian.Uint32(p[ipHeader:]),
				protocol:  t.protocol,
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
			o.gsoSize = len(p) - t.payload
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
	o.length += len(p) - t.payload
	o.expect(p, t)
	if len(p)-t.payload < o.gsoSize || o.full() || t.protocol == protocolTCP && p[ipHeader+tcpFlags]&(flagPSH|flagFIN) != 0 {
		c.close(at)
	}
	return true
}

// expect sets the ID and sequence number that must follow p.
func (o *output) expect(p []byte, t *transport) {
	o.id = binary.BigEndian.Uint16(p[ipID:]) + 1
	if t.protocol == protocolTCP {
		o.seq = binary.BigEndian.Uint32(p[ipHeader+tcpSeq:]) + uint32(len(p)-t.payload)
	}
}

func (o *output) full() bool {
	if o.transport.protocol == protocolUDP {
		return o.count >= maxUDPSegments
	}
	return o.count >= maxTCPSegments
}

// mergeable reports whether p may be the head of an output: it has payload, and no flag
// that ends one.
func (c *coalescer) mergeable(p []byte, t *transport) bool {
	if len(p) == t.payload {
		return false
	}
	if t.protocol == protocolUDP {
		return c.uso
	}
	// PSH and FIN end an output; SYN, RST, URG and CWR are never merged.
	return p[ipHeader+tcpFlags]&^flagECE == flagACK
}

// canMerge reports whether splitting the output, whose first packet is head, would restore p
// as its next segment. It does not verify checksums.
func (o *output) canMerge(head, p []byte, t *transport) bool {
	n := len(p) - t.payload
	if n == 0 || n > o.gsoSize || t.payload != o.transport.payload || o.length+n > packet.MaxSize {
		return false
	}
	// TOS (DSCP and ECN), DF, TTL; parseTransport excluded fragments.
	if head[1] != p[1] || head[ipFragment] != p[ipFragment] || head[ipTTL] != p[ipTTL] {
		return false
	}
	// Without DF the ID may be needed for reassembly. With DF the datagram is atomic and
	// its ID meaningless (RFC 6864, section 4.1).
	if p[ipFragment]&dontFragment == 0 && binary.BigEndian.Uint16(p[ipID:]) != o.id {
		return false
	}
	if t.protocol == protocolUDP {
		return true
	}
	// Only the last segment may have PSH or FIN: add closes the flow then.
	a, b := head[ipHeader:t.payload], p[ipHeader:t.payload]
	return binary.BigEndian.Uint32(b[tcpSeq:]) == o.seq &&
		binary.NativeEndian.Uint32(a[tcpAck:]) == binary.NativeEndian.Uint32(b[tcpAck:]) &&
		a[tcpDataOffset] == b[tcpDataOffset] &&
		a[tcpFlags] == b[tcpFlags]&^(flagPSH|flagFIN) &&
		binary.NativeEndian.Uint16(a[tcpWindow:]) == binary.NativeEndian.Uint16(b[tcpWindow:]) &&
		binary.NativeEndian.Uint16(a[tcpUrgent:]) == binary.NativeEndian.Uint16(b[tcpUrgent:]) &&
		bytes.Equal(a[tcpHeader:], b[tcpHeader:])
}

// header prepares the head of an output to be written, followed by the payloads of the
// others, and returns the vnetHeader to go before it. It changes the head's headers.
func (c *coalescer) header(batch []*packet.Buffer, o *output) vnetHeader {
	b, t := batch[o.head], &o.transport
	p := b.Bytes()
	switch {
	case t.payload == 0: // not TCP or UDP: nothing to offload
		return vnetHeader{}
	case o.count > 1:
		if t.protocol == protocolTCP {
			p[t.start+tcpFlags] |= batch[o.tail].Bytes()[t.start+tcpFlags] & (flagPSH | flagFIN)
		}
		t.putLengths(p, o.length)
		return t.offloadHeader(p, o.length, o.gsoSize)
	case b.SegmentSize != 0 || b.Checksum == packet.ChecksumPartial:
		return t.offloadHeader(p, len(p), int(b.SegmentSize))
	}
	return vnetHeader{}
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
	if len(p) < ipHeader {
		return
	}
	addresses := binary.NativeEndian.Uint64(p[ipSource:])
	for i := c.openCount - 1; i >= 0; i-- {
		if f := &c.open[i]; f.addresses == addresses && f.protocol == p[ipProtocol] {
			c.close(i)
		}
	}
}
