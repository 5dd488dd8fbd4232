// Package broker does for a process what takes a privilege, once the process has given up its own: package
// privileged is its side. It takes every request for one of an attacker who has taken the process over, and does only
// what the configuration names, which it reads itself: the interfaces of its tunnels with their addresses and routes,
// their sockets, the ports of IKE. No packet touches it.
package broker
