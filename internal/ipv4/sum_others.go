//go:build !amd64

package ipv4

const vectors = false

func sumVectors([]byte) uint64 { panic("no vector instructions") }
