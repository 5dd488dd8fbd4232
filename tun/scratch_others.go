//go:build !linux

package tun

// Scratch is the memory with which any number of Queues are read and written, by one goroutine at a
// time. The zero value is ready for use.
type Scratch struct{ splitScratch }
