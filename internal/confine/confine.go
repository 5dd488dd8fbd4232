// Package confine drops the privileges that a process with a running tunnel does not need,
// to limit what an attacker gains who takes it over by a packet.
//
// It affects all threads of the process, current and future, and cannot be undone. Files
// and sockets that need more must be open before.
package confine
