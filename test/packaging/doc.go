// Package packaging tests the packages and the image of packaging/: that the same tree gives the same bytes, what is in
// them, and how they are installed, upgraded and removed under systemd, which is process 1 of namespaces of its own; the
// image in namespaces as its examples start it; the scripts for other service managers. There is nothing in it but tests.
package packaging
