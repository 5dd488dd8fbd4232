// Package conformance reads off the wire whether a tunnel keeps the rules: of the
// RFCs, and of RouterOS's properties. It has only tests: the daemon as it is
// shipped, in network namespaces, with real packets.
package conformance
