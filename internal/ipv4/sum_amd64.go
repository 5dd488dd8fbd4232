package ipv4

import "golang.org/x/sys/cpu"

// haveAVX2 reports whether sumAVX2 can be called: it needs AVX2.
var haveAVX2 = cpu.X86.HasAVX2

// sumAVX2 is the sum of the little-endian words of 32 bits of b, whose length is a
// multiple of 64 and not 0. The sum is exact below a length of 16 GiB.
//
//go:noescape
func sumAVX2(b []byte) uint64
