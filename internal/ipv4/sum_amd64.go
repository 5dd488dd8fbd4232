package ipv4

import "golang.org/x/sys/cpu"

// haveAVX2 reports whether sumAVX2 may be called. Tests clear it.
var haveAVX2 = cpu.X86.HasAVX2

// sumAVX2 returns the sum of the little-endian 32-bit words of b, whose length must be a
// multiple of 64 and not 0. The sum is exact below 16 GiB.
//
//go:noescape
func sumAVX2(b []byte) uint64
