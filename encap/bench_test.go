package encap_test

import (
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

func BenchmarkOuterEncapsulate(b *testing.B) {
	buffer := bufferOf(segment(ipv4.ProtocolTCP, 1428, false))
	b.SetBytes(int64(buffer.Len()))
	b.ReportAllocs()
	id := uint16(0)
	for b.Loop() {
		inner, err := ipv4.Parse(buffer.Bytes())
		if err != nil {
			b.Fatal(err)
		}
		id++
		if d := asRouterOS.Encapsulate(buffer, inner, id); d != drop.None {
			b.Fatal(d)
		}
		buffer.Pull(encap.Overhead)
	}
}

func BenchmarkDecapsulate(b *testing.B) {
	buffer := bufferOf(build(received(), segment(ipv4.ProtocolTCP, 1428, false)))
	b.SetBytes(int64(buffer.Len() - encap.Overhead))
	b.ReportAllocs()
	for b.Loop() {
		outer, d := encap.ParseOuter(buffer)
		if d != drop.None {
			b.Fatal(d)
		}
		if _, _, d := encap.Decapsulate(buffer, outer, local, remote); d != drop.None {
			b.Fatal(d)
		}
		buffer.Push(encap.Overhead)
	}
}

func BenchmarkDeriveOffload(b *testing.B) {
	for _, partial := range []bool{false, true} {
		name := "finished"
		if partial {
			name = "partial"
		}
		b.Run(name, func(b *testing.B) {
			buffer := bufferOf(segment(ipv4.ProtocolTCP, 1428, partial))
			inner := parse(b, buffer.Bytes())
			b.SetBytes(int64(buffer.Len()))
			b.ReportAllocs()
			for b.Loop() {
				buffer.Checksum = 0
				if d := encap.DeriveOffload(buffer, inner, 1480); d != drop.None {
					b.Fatal(d)
				}
			}
		})
	}
}

func BenchmarkFragment(b *testing.B) {
	p := parse(b, build(received(), pattern(8008)))
	into := buffers(6, 1500)
	b.SetBytes(int64(p.TotalLen()))
	b.ReportAllocs()
	for b.Loop() {
		if n, d := encap.Fragment(into, p, 1500); n != 6 || d != drop.None {
			b.Fatal(n, d)
		}
	}
}

func BenchmarkTooBig(b *testing.B) {
	p := parse(b, build(inner(), pattern(1460)))
	message := dirty(600)
	b.SetBytes(576)
	b.ReportAllocs()
	for b.Loop() {
		if d := encap.TooBig(message, p, 1400, [4]byte{}); d != drop.None {
			b.Fatal(d)
		}
	}
}
