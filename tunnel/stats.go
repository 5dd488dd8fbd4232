package tunnel

import (
	"sync/atomic"

	"ipipd/internal/packet"

	"ipipd/encap"
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

// size is the sum of the packets' lengths in bytes.
func size(batch []*packet.Buffer) (n uint64) {
	for _, b := range batch {
		n += uint64(b.Len())
	}
	return n
}
