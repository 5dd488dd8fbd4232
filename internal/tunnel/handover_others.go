//go:build !linux

package tunnel

func socketName(int) string { return "" }
