package ipv4

import (
	"strconv"
	"testing"
)

func BenchmarkChecksum(b *testing.B) {
	for _, size := range []int{20, 64, 576, 1480, 65515} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			data := filled(size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				Checksum(data, 0)
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	data := golden(b, goldenFragment)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if p, err := Parse(data); err != nil || !p.HeaderChecksumValid() {
			b.Fatal(err)
		}
	}
}

func BenchmarkHeaderPut(b *testing.B) {
	h := Header{TotalLen: 1500, TTL: 64, Protocol: ProtocolIPIP}
	data := filled(HeaderLen)
	b.SetBytes(HeaderLen)
	b.ReportAllocs()
	for b.Loop() {
		h.ID++
		h.Put(data)
	}
}
