// Package interop has the tests of ipipd against IP-in-IP endpoints that were not
// written here: the ipip tunnel of the Linux kernel, in a guest that runs as a
// process (user-mode Linux), and socat. Nothing imports it.
//
// They need root and what `make interop` installs: iproute2, iputils-ping,
// iperf3, socat, ethtool, kmod and user-mode-linux. A test that misses something
// says what, and is skipped. All traffic stays in network namespaces that the
// tests make.
package interop
