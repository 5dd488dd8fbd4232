// Package conformance tests on the wire whether a tunnel conforms to the RFCs and to
// RouterOS's properties. It has only tests: the daemon as it is shipped, in network
// namespaces, with real packets.
package conformance
