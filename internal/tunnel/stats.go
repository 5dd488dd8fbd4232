package tunnel

import (
	"sync/atomic"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// counters are a tunnel's counters. Different threads write tx and rx, once per batch, so they are
// padded to separate cache lines.
type counters struct {
	tx, rx trafficCounter
	drops  drop.Counters
}

// trafficCounter counts inner packets and their bytes, IPv4 header included.
type trafficCounter struct {
	packets, bytes atomic.Uint64
	_              [112]byte
}

func (d *trafficCounter) add(packets int, bytes uint64) {
	d.packets.Add(uint64(packets))
	d.bytes.Add(bytes)
}

func (d *trafficCounter) load() (packets, bytes uint64) { return d.packets.Load(), d.bytes.Load() }

// countSegments returns the packets and bytes of a batch. A GRO or GSO packet counts as its segments,
// headers included, as in package fastpath.
func countSegments(batch []*packet.Buffer) (packets int, bytes uint64) {
	for _, b := range batch {
		packets++
		bytes += uint64(b.Len())
		if b.SegmentSize == 0 {
			continue
		}
		if headers := segmentHeaders(b.Bytes()); headers != 0 {
			more := (b.Len() - headers - 1) / int(b.SegmentSize)
			packets += more
			bytes += uint64(more * headers)
		}
	}
	return packets, bytes
}

// segmentHeaders is the length of the IPv4 and TCP or UDP headers of a superpacket, which each of its
// segments has; 0 if it is neither TCP nor UDP.
func segmentHeaders(b []byte) int {
	p, err := ipv4.Parse(b)
	if err != nil {
		return 0
	}
	t, ok := ipv4.ParseTransport(p)
	if !ok || t.Payload >= len(b) {
		return 0
	}
	return t.Payload
}
