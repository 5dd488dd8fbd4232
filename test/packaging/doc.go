// Package packaging tests the packages of packaging/: that the same tree gives the same bytes, what is in them, and
// how they are installed, upgraded and removed under systemd, which is process 1 of namespaces of its own. There is
// nothing in it but tests.
package packaging
