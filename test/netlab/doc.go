// Package netlab is what tests need to try the tunnel on something: network
// namespaces joined by wires, where root may make them.
package netlab
