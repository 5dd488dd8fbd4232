// Package memory implements both sides of a tunnel in memory: tun.Device, where the test is
// the host, and a connected pair of underlay.Sockets whose link can lose, duplicate, reorder
// and corrupt packets. Two tunnels can run against each other without root and under the
// race detector.
//
// Both keep the contracts of the interfaces, such as what Close unblocks. In a steady state
// they do not allocate, so that tests can count a tunnel's allocations. The package is not
// part of netlab, because the tests of tun and underlay import that.
package memory
