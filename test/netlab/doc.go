// Package netlab builds test networks: network namespaces joined by veth pairs, guests with
// kernels of their own, captures with checks on packets, and ipipd processes. It needs root.
package netlab
