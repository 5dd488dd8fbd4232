// Package interop tests ipipd against independent IP-in-IP implementations: the Linux kernel's
// ipip tunnel, in a guest (user-mode Linux), and socat.
//
// The tests need root and the packages that `make interop` installs: iproute2, iputils-ping,
// iperf3, socat, ethtool, kmod and user-mode-linux. A test that lacks one is skipped and says
// so. All traffic stays in the tests' network namespaces.
package interop
