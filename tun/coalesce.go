package tun

import (
	"bytes"
	"encoding/binary"

	"ipipd/internal/packet"
)

const (
	// openOutputs is how many flows of one batch can be coalesced at a time.
	openOutputs = 16
	// maxTCPSegments and maxUDPSegments bound what is coalesced into one: the
	// first by the parts that writev takes (UIO_MAXIOV is 1024), the second as
	// the kernel does (UDP_GRO_CNT_MAX, udp_offload.c).
	maxTCPSegments = 512
	maxUDPSegments = 64
)

// coalescer plans how the packets of a batch are written: each by itself, or
// in-order segments of a flow as one superpacket. It does by the rules of the
// kernel's GRO (tcp_gro_receive, udp_gro_receive_segment, inet_gro_receive) what
// GRO would do if a TUN had it, so that the host's stack is walked once for many
// segments.
//
// Packets of a flow never overtake each other. An output stands where its first
// packet stood, and takes no more packets once one of its flow came that could
// not be added. Packets of different flows may be reordered.
type coalescer struct {
	// udp says that the kernel takes UDP superpackets.
	udp bool

	outputs []output
	// next[i] is the packet of the batch that follows packet i in its output, or
	// none.
	next []int32
	// open are the outputs that may still grow, at most one for each flow.
	open  [openOutputs]openFlow
	nopen int
	evict int // which one makes room for another when open is full
}

// none is no packet, no flow.
const none = -1

// output is one packet as it is written: one of the batch, or several.
type output struct {
	transport transport // of the head; its payload is 0 if it has none that is sound
	head      int32     // the first packet, its headers those of the output
	tail      int32     // the last one
	count     int32
	length    int    // of the whole, in bytes
	size      int    // payload of each segment but the last
	seq       uint32 // TCP sequence number that may follow
	id        uint16 // IP ID that may follow
	sound     bool   // the head's checksums were found right
}

// openFlow is a flow and the index of its output.
type openFlow struct {
	addresses uint64
	ports     uint32
	protocol  uint8
	output    int32
}

// plan fills outputs with how to write batch.
func (c *coalescer) plan(batch []*packet.Buffer) {
	c.outputs, c.nopen = c.outputs[:0], 0
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
		case t.start != ipHeader: // GRO leaves IP options alone, and so do we
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
			grows = b.SegmentSize == 0 && c.canGrow(p, &t)
		}
		o := output{transport: t, head: int32(i), tail: int32(i), count: 1, length: len(p)}
		c.next[i] = none
		if grows {
			o.expect(p, &t)
			o.size = len(p) - t.payload
			flow.output = int32(len(c.outputs))
			c.put(at, &flow)
		} else if at != none {
			c.close(at)
		}
		c.outputs = append(c.outputs, o)
	}
}

// add puts packet i of the batch, which has the transport t, behind an output of
// its flow. If it is false the packet is to stand by itself, and nothing is to
// be added to that output any more.
func (c *coalescer) add(batch []*packet.Buffer, at, i int, t *transport) bool {
	o := &c.outputs[c.open[at].output]
	b, head := batch[i], batch[o.head]
	p := b.Bytes()
	if b.SegmentSize != 0 || !o.mayFollow(head.Bytes(), p, t) {
		return false
	}
	// Last, because it is what costs: nothing is verified but what is coalesced.
	// The kernel will take our word for what is.
	if !o.sound {
		if !o.transport.sound(head) {
			return false
		}
		o.sound = true
	}
	if !t.sound(b) {
		return false
	}
	c.next[o.tail], c.next[i] = int32(i), none
	o.tail = int32(i)
	o.count++
	o.length += len(p) - t.payload
	o.expect(p, t)
	if len(p)-t.payload < o.size || o.full() || t.protocol == protocolTCP && p[ipHeader+tcpFlags]&(flagPSH|flagFIN) != 0 {
		c.close(at)
	}
	return true
}

// expect notes what the headers of a packet behind p must say.
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

// canGrow reports whether something may be added to p: it has payload, and is
// not the last of a run.
func (c *coalescer) canGrow(p []byte, t *transport) bool {
	if len(p) == t.payload {
		return false
	}
	if t.protocol == protocolUDP {
		return c.udp
	}
	// PSH and FIN end a run; SYN, RST, URG and CWR are never part of one.
	return p[ipHeader+tcpFlags]&^flagECE == flagACK
}

// mayFollow reports whether p can be the next segment of an output that starts
// with head, so that cutting it up again gives back both. Checksums aside.
func (o *output) mayFollow(head, p []byte, t *transport) bool {
	n := len(p) - t.payload
	if n == 0 || n > o.size || t.payload != o.transport.payload || o.length+n > packet.MaxSize {
		return false
	}
	// TOS with its ECN mark, DF, TTL; the other flags are 0, as is the offset.
	if head[1] != p[1] || head[ipFragment] != p[ipFragment] || head[ipTTL] != p[ipTTL] {
		return false
	}
	// Without DF the receiver may need the ID to reassemble fragments; with it
	// the ID means nothing (RFC 6864, section 4.1).
	if p[ipFragment]&dontFragment == 0 && binary.BigEndian.Uint16(p[ipID:]) != o.id {
		return false
	}
	if t.protocol == protocolUDP {
		return true
	}
	// The same ACK number, window and urgent pointer, and the same options; only
	// the last segment may have PSH or FIN, and an output that has stays closed.
	a, b := head[ipHeader:t.payload], p[ipHeader:t.payload]
	return binary.BigEndian.Uint32(b[tcpSeq:]) == o.seq &&
		binary.NativeEndian.Uint32(a[tcpAck:]) == binary.NativeEndian.Uint32(b[tcpAck:]) &&
		a[tcpDataOffset] == b[tcpDataOffset] &&
		a[tcpFlags] == b[tcpFlags]&^(flagPSH|flagFIN) &&
		binary.NativeEndian.Uint16(a[tcpWindow:]) == binary.NativeEndian.Uint16(b[tcpWindow:]) &&
		binary.NativeEndian.Uint16(a[tcpUrgent:]) == binary.NativeEndian.Uint16(b[tcpUrgent:]) &&
		bytes.Equal(a[tcpHeader:], b[tcpHeader:])
}

// header makes the head of an output ready to be written, followed by the
// payloads of the others, and returns what stands in front of it.
func (c *coalescer) header(batch []*packet.Buffer, o *output) vnetHeader {
	b, t := batch[o.head], &o.transport
	p := b.Bytes()
	switch {
	case t.payload == 0: // nothing that the kernel could help with
		return vnetHeader{}
	case o.count > 1:
		if t.protocol == protocolTCP {
			p[t.start+tcpFlags] |= batch[o.tail].Bytes()[t.start+tcpFlags] & (flagPSH | flagFIN)
		}
		t.putLengths(p, o.length)
		return t.partial(p, o.length, o.size)
	case b.SegmentSize != 0 || b.Checksum == packet.ChecksumPartial:
		return t.partial(p, len(p), int(b.SegmentSize))
	}
	return vnetHeader{}
}

// find is the index in open of a flow, or none.
func (c *coalescer) find(flow *openFlow) int {
	for i := range c.open[:c.nopen] {
		f := &c.open[i]
		if f.ports == flow.ports && f.addresses == flow.addresses && f.protocol == flow.protocol {
			return i
		}
	}
	return none
}

// put makes flow an open one, in the place of an older one of the same flow if
// there is any.
func (c *coalescer) put(at int, flow *openFlow) {
	if at == none {
		if c.nopen < len(c.open) {
			at = c.nopen
			c.nopen++
		} else {
			c.evict = (c.evict + 1) % len(c.open)
			at = c.evict
		}
	}
	c.open[at] = *flow
}

func (c *coalescer) close(at int) {
	c.nopen--
	c.open[at] = c.open[c.nopen]
}

// closeAddresses closes all flows between the two addresses of p, which may be
// of any of them: a fragment, or one with IP options.
func (c *coalescer) closeAddresses(p []byte) {
	if len(p) < ipHeader {
		return
	}
	addresses := binary.NativeEndian.Uint64(p[ipSource:])
	for i := c.nopen - 1; i >= 0; i-- {
		if f := &c.open[i]; f.addresses == addresses && f.protocol == p[ipProtocol] {
			c.close(i)
		}
	}
}
