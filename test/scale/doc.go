// Scale measures one process with many tunnels: how long they take to start and to close,
// how much memory and how many threads they have, and what they cost while idle.
//
// Each row is a process of its own in a network namespace of its own, with tunnels to as
// many remotes behind one gateway, whose neighbour entry is permanent. It needs root, on
// Linux. Figures of different runs do not compare: a run is worth its ratios.
package main
