//go:build !amd64

package ipv4

const haveAVX2 = false

func sumAVX2([]byte) uint64 { panic("no vector instructions") }
