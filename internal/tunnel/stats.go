package tunnel

import (
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// counters are what a tunnel counts. The two directions are written by different
// threads, so they lie on different cache lines; each is added to once a batch.
type counters struct {
	tx, rx direction
	drops  drops
}

// direction counts inner packets and the bytes of them, IPv4 header included.
type direction struct {
	packets, bytes atomic.Uint64
	_              [112]byte
}

func (d *direction) add(packets int, bytes uint64) {
	d.packets.Add(uint64(packets))
	d.bytes.Add(bytes)
}

func (d *direction) load() (packets, bytes uint64) { return d.packets.Load(), d.bytes.Load() }

// drops counts, for each reason, the packets that went no further.
type drops [encap.NumDrops]atomic.Uint64

func (d *drops) add(reason encap.Drop, n int) { d[reason].Add(uint64(n)) }

// addTo adds reason → count to m, the reasons that never occurred left out.
func (d *drops) addTo(m map[string]uint64) {
	for i := range d {
		if n := d[i].Load(); n > 0 {
			m[encap.Drop(i).String()] += n
		}
	}
}

// countSegments says how many packets a batch is for the peer that sent it, and their bytes:
// one that was merged of several on its way counts as those, with the headers that
// each had, as package fastpath counts it.
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

// segmentHeaders is the length of the headers that every segment of a superpacket
// has; 0 if it is none.
func segmentHeaders(b []byte) (n int) {
	p, err := ipv4.Parse(b)
	if err != nil {
		return 0
	}
	transport := p.Payload()
	switch {
	case p.Protocol() == ipv4.ProtocolTCP && len(transport) >= 20:
		n = p.HeaderLen() + int(transport[12]>>4)*4
	case p.Protocol() == ipv4.ProtocolUDP && len(transport) >= 8:
		n = p.HeaderLen() + 8
	}
	if n >= len(b) {
		return 0
	}
	return n
}
