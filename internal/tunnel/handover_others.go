//go:build !linux

package tunnel

func socketName(string, int) string { return "" }
