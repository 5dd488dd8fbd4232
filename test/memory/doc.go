// Package memory has the two doors of a tunnel with nothing behind them but
// memory: a Device whose host is the test, and a pair of Sockets with a wire
// between them that can lose, double, swap and damage packets. With them two
// tunnels run against each other without root, under the race detector, as often
// as one likes.
//
// They keep what the interfaces promise, above all what Close unblocks. In a
// steady state they do not allocate, so that a tunnel's allocations can be
// counted through them. It is not a part of package netlab, because the doors'
// own tests use that.
package memory
