package fastpath

import (
	"testing"

	"ipipd/internal/ipv4"
)

// The cost of ipip_encap up to the check of the path MTU, which the packet exceeds: an encapsulated packet could not be
// run again. "alive" includes the look at the clock that one packet in 64 takes (CHECK_ALIVE).
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
