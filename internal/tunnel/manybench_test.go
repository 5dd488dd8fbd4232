package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/test/memory"
)

// startMany starts a tunnel with a prefix 10.x.y.0/24 for each number below prefixes, over so many remotes.
func startMany(t testing.TB, prefixes, remotes int, set func(*Config)) *endpoint {
	t.Helper()
	socket, _ := memory.NewSocketPair()
	s := start(t, socket, outerA, outerB, func(c *Config) {
		c.RemoteAddress, c.LocalAddress = AnyRemote, outerA
		if set != nil {
			set(c)
		}
	})
	var changes []netstate.RouteChange
	for i := range prefixes {
		n := i % remotes
		changes = append(changes, netstate.RouteChange{
			Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24),
			Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: [4]byte{198, 18, byte(n >> 8), byte(n)}}}}},
		})
	}
	s.network.followRoutes(changes)
	eventually(t, "each remote has a route", func() bool { return len(s.many.routes.Load().all) == remotes })
	return s
}

// BenchmarkRemotes_forward is userspace's part of sending a packet, without the system calls, to all prefixes in turn.
func BenchmarkRemotes_forward(b *testing.B) {
	for _, n := range []struct{ prefixes, remotes int }{{1, 1}, {1000, 100}, {10000, 1000}} {
		b.Run(fmt.Sprintf("prefixes=%d/remotes=%d", n.prefixes, n.remotes), func(b *testing.B) {
			s := startMany(b, n.prefixes, n.remotes, nil)
			o := &outbound{tunnel: s.Tunnel, tx: plainTx{discardSender{}}, ids: idCounters(1)[0]}
			w := newWorker(0, nil)
			batch := packet.NewBatch(batchSize, smallSize)
			p := datagram(64, nil)
			b.ReportAllocs()
			for i := 0; b.Loop(); {
				for _, to := range batch {
					to.Set(p)
					j := i * 7919 % n.prefixes
					h := to.Bytes()
					h[16], h[17], h[18], h[19] = 10, byte(j>>8), byte(j), 1
					i++
				}
				if err := o.forward(&w.buffers, batch); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batchSize), "ns/packet")
			if drops := s.Status().Drops; len(drops) > 0 {
				b.Fatal(drops)
			}
		})
	}
}

// A packet from an unknown outer source costs what one from a known source costs: no state is made for it.
func BenchmarkRemotes_accept(b *testing.B) {
	for _, sources := range []uint32{1, 1 << 20} {
		b.Run(fmt.Sprintf("sources=%d", sources), func(b *testing.B) {
			s := startMany(b, 10, 10, func(c *Config) {
				c.AcceptFrom = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}
				c.AcceptTo = []netip.Prefix{netip.MustParsePrefix("203.0.113.5/32")}
			})
			inner := datagram(64, func(h *ipv4.Header) { h.Destination = [4]byte{203, 0, 113, 5} })
			p := make([]byte, ipv4.HeaderLen+len(inner))
			h := ipv4.Header{TotalLen: len(p), TTL: 60, Protocol: ipv4.ProtocolIPIP, Source: [4]byte{172, 16, 0, 1}, Destination: outerA.As4()}
			h.Put(p)
			copy(p[ipv4.HeaderLen:], inner)
			buffer, now, sender := packet.New(smallSize), time.Now(), underlay.Sender(discardSender{})
			b.ReportAllocs()
			for i := uint32(0); b.Loop(); i++ {
				binary.BigEndian.PutUint32(p[12:], 172<<24|16<<16|i*7919%sources)
				buffer.Set(p)
				outer, err := ipv4.Parse(buffer.Bytes())
				if err != nil {
					b.Fatal(err)
				}
				if deliver, why := s.decapsulate(buffer, outer, sender, now); !deliver {
					b.Fatal(why)
				}
			}
		})
	}
}
