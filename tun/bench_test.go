package tun

import (
	"bytes"
	"testing"

	"ipipd/internal/packet"
)

// mss is the MSS at an inner MTU of 1480 with TCP timestamps.
const mss = 1428

func BenchmarkSplitter(b *testing.B) {
	for name, s := range map[string]spec{
		"tcp": {tcp: true, options: timestamps, payload: patternBytes(45*mss, 0)},
		"udp": {payload: patternBytes(45*mss, 0)},
	} {
		b.Run(name, func(b *testing.B) {
			p := s.build()
			batch := packet.NewBatch(64, 1500)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			segments := 0
			for b.Loop() {
				var s splitter
				s.start(p, mss)
				for segments = 0; s.more(); segments++ {
					out := batch[segments]
					out.SetLen(s.segment(out.Space()))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*segments), "ns/segment")
		})
	}
}

func BenchmarkCoalescer(b *testing.B) {
	datagrams := make([][]byte, 45)
	for i := range datagrams {
		datagrams[i] = spec{id: uint16(i), payload: patternBytes(64, i)}.build()
	}
	for name, packets := range map[string][][]byte{
		"tcp":     tcpSegments(45, mss, nil),
		"udp64":   datagrams,
		"acks":    tcpSegments(45, 0, nil),
		"16flows": interleaved(45, 16),
	} {
		b.Run(name, func(b *testing.B) {
			batch := buffers(packets...)
			c := coalescer{uso: true}
			b.SetBytes(int64(len(bytes.Join(packets, nil))))
			b.ReportAllocs()
			for b.Loop() {
				for i, p := range packets { // header changes them
					copy(batch[i].Bytes(), p[:min(len(p), 60)])
				}
				c.plan(batch)
				for i := range c.outputs {
					c.header(batch, &c.outputs[i])
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(packets)), "ns/packet")
		})
	}
}

// interleaved returns n packets of flows, round robin.
func interleaved(n, flows int) (packets [][]byte) {
	for i := range n {
		packets = append(packets, spec{tcp: true, df: true, flow: byte(i % flows), seq: uint32(i / flows * mss),
			options: timestamps, payload: patternBytes(mss, i)}.build())
	}
	return packets
}

func TestCoalescer_allocations(t *testing.T) {
	super := spec{tcp: true, options: timestamps, payload: patternBytes(45*mss, 0)}.build()
	batch := packet.NewBatch(45, 1500)
	c := coalescer{uso: true}
	if allocs := testing.AllocsPerRun(100, func() {
		var s splitter
		s.start(super, mss)
		for i := 0; s.more(); i++ {
			batch[i].SetLen(s.segment(batch[i].Space()))
		}
		c.plan(batch)
		for i := range c.outputs {
			c.header(batch, &c.outputs[i])
		}
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	if len(c.outputs) != 1 || c.outputs[0].length != len(super) {
		t.Errorf("%d outputs, the first of %d bytes, want one of %d", len(c.outputs), c.outputs[0].length, len(super))
	}
}
