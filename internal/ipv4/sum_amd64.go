package ipv4

import "golang.org/x/sys/cpu"

// vectors reports whether sumVectors can be called: it needs AVX2.
var vectors = cpu.X86.HasAVX2

// sumVectors is the sum of the little-endian words of 32 bits of b, whose length is a
// multiple of 64 and not 0. The sum is exact below a length of 16 GiB.
//
//go:noescape
func sumVectors(b []byte) uint64
