// Package ipipd has no code of its own, only the test of who may import whom. The
// program is in cmd/ipipd; tunnel is where to start reading, tunnel/datapath.go first.
package ipipd
