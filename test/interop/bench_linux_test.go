package interop

import (
	"slices"
	"testing"

	"ipipd/test/netlab"
)

// BenchmarkGuest is bulk TCP between this host and the kernel's own ipip in a guest,
// with socat at this end and with ipipd, both ways. The guest is the slower end; what
// counts is that no tunnel is slower than socat. The wire segments, since the guest's
// driver takes no superpackets of the fast path.
func BenchmarkGuest(b *testing.B) {
	if testing.Short() {
		b.Skip("a minute long")
	}
	for _, tunnel := range []struct {
		name  string
		start func(b *testing.B, ns *netlab.NS)
	}{
		{"socat", func(b *testing.B, ns *netlab.NS) { socat(b, ns, ourOuter, peerOuter, ourInner) }},
		{"userspace", func(b *testing.B, ns *netlab.NS) { up(b, ns) }},
		{"fastpath", func(b *testing.B, ns *netlab.NS) {
			if s := up(b, ns, "--allow-fast-path", "yes").Status().FastPath; s != "active" {
				b.Skipf("no fast path here: %s", s)
			}
		}},
	} {
		b.Run(tunnel.name, func(b *testing.B) {
			for _, way := range []struct {
				name    string
				reverse bool
			}{{"to-guest", false}, {"from-guest", true}} {
				b.Run(way.name, func(b *testing.B) {
					l := newKernelLab(b)
					netlab.Segment(l.ours, "eth0")
					tunnel.start(b, l.ours)
					l.tunnel(b, "")
					var gbps []float64
					for b.Loop() {
						gbps = append(gbps, bulk(b, inNamespace(l.ours), l.guest.Run, peerInner, way.reverse))
					}
					slices.Sort(gbps)
					b.SetBytes(bulkBytes)
					b.ReportMetric(gbps[len(gbps)/2], "Gb/s")
				})
			}
		})
	}
}
