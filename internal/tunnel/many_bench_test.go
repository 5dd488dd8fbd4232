package tunnel

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// The look-up of a batch to 10,000 prefixes by 1,000 remotes with cold caches: 8 MiB of other memory is touched
// before each batch. The figure is the median of all batches.
func BenchmarkRemotes_lookUp(b *testing.B) {
	const remotes1000, prefixes = 1000, 10000
	m := newRemotes(new(Config))
	e, routes := m.table.Load().Edit(), map[[4]byte]*route{}
	for i := range prefixes {
		n := i%remotes1000 + 1
		g := [4]byte{198, 18, byte(n >> 8), byte(n)}
		e.Set(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i)}), 24), []fib.Route{{Hops: []fib.Hop{{Gateway: g}}}})
		if routes[g] == nil {
			routes[g] = &route{maxInner: 1480}
		}
	}
	table, _, _ := e.Commit()
	m.table.Store(table)
	m.routes.Store(newRouteTable(routes))
	batch, to, evict := packet.NewBatch(batchSize, smallSize), make([]next, batchSize), make([]uint64, 1<<20)
	random := rand.New(rand.NewPCG(1, 2))
	var each []float64
	for b.Loop() {
		for _, p := range batch {
			h := ipv4.Header{TotalLen: 64, TTL: 64, Protocol: ipv4.ProtocolUDP, Source: [4]byte{192, 0, 2, 1}}
			binary.BigEndian.PutUint32(h.Destination[:], 10<<24|uint32(random.IntN(prefixes))<<8|1)
			p.Set(make([]byte, 64))
			h.Put(p.Bytes())
		}
		for i := 0; i < len(evict); i += 8 { // a word of each cache line
			evict[i]++
		}
		inner := 0
		for _, p := range batch {
			inner += p.Len() + int(p.Bytes()[0])
		}
		began := time.Now()
		m.lookUp(batch, to)
		for i := range to {
			inner += to[i].route.maxInner
		}
		if each = append(each, float64(time.Since(began).Nanoseconds())/batchSize); inner == 0 {
			b.Fatal("no packet")
		}
	}
	slices.Sort(each)
	b.ReportMetric(each[len(each)/2], "ns/packet")
}
