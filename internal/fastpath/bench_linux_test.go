package fastpath

import (
	"testing"

	"ipipd/internal/ipv4"
)

// What ipip_encap costs up to where it finds that a packet does not fit: one that is encapsulated cannot be
// again. "alive" is with a look at the time, as one packet in 64 has it.
func BenchmarkLoadSpec_encap(b *testing.B) {
	for name, before := range map[string]uint64{"alive": 0, "plain": 1} {
		b.Run(name, func(b *testing.B) {
			tunnel := defaultTunnel()
			tunnel.PathMTU = 100
			l := newLab(b, tunnel)
			count := make([]counters, l.cpus)
			for i := range count {
				count[i].TxPackets = before
			}
			if err := l.Counters.Put(uint32(slot), count); err != nil {
				b.Fatal(err)
			}
			frame := make([]byte, etherLen)
			frame[12] = 8
			frame = append(frame, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(1000))...)
			least := 1e9
			for b.Loop() {
				_, took, err := l.Encap.Benchmark(frame, 100000, nil)
				if err != nil {
					b.Fatal(err)
				}
				least = min(least, float64(took.Nanoseconds()))
			}
			b.ReportMetric(least, "ns/packet")
		})
	}
}
