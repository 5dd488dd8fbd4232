//go:build !linux

package encap

// MinPMTU is the Floor of a PathMTU on this host.
func MinPMTU() int { return DefaultFloor }
