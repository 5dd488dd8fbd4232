// Package examples tests the configurations of packaging/examples with the daemons that they are for: each
// test copies the folder of its example and runs the files in it, in network namespaces. TestPages runs the pages of
// docs that have a laboratory: type page says how they are written.
//
// The tests need root and the packages that `make test` installs. One that lacks a program is skipped and says
// so.
package examples
