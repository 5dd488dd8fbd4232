// Package soak runs two ends of ten tunnels for minutes or hours while everything around them
// changes and fails: `make soak`. Its test needs root, and the build tag soak.
//
//	end a, 192.0.2.1 ── eth0 (TAP) ──┐                       ┌── eth0 (TAP) ── 192.0.2.2, end b
//	                                 └── wire, of this test ─┘
//	                                      ▲ hostile packets
//
// The wire stands for netem, which not every kernel has, for the bridge and for the attacker. It
// loses, doubles, reorders and damages frames by the seed, and counts them: with its counters
// those of both ends have to agree. What differs from a veth pair: no superpackets pass it.
//
// A round is twenty seconds of events by the seed (the schedule, printed as it goes), then calm:
// all is put back, each tunnel has to carry packets again, and then the counters, descriptors,
// goroutines, memory, routes, interfaces and eBPF programs are compared. In the last three
// fifths of the time no process is restarted, so that its memory has a slope: one end is under ipipd keep.
package soak
