// Package handover gives descriptors to whoever outlives the process, and takes them back at
// the next start: to the kernel they are never closed, so that a TUN interface, its routes, the
// packets queued and what eBPF carries outlive a restart, an upgrade or a crash.
//
// Manager is the side of the process; the other one is systemd's descriptor store (sd_notify(3),
// FDSTORE=1), or a Keeper. Both give back what they have by sd_listen_fds(3), with names, of which
// several descriptors can have the same one, in no order. A Keeper speaks over a socket pair, which
// it gives its child as a descriptor named after [KeeperName], and not by NOTIFY_SOCKET: there is no
// path to write to, nobody else can reach it, whatever the namespaces, and it ends with the child.
package handover

import "slices"

// Kept are the descriptors that outlived the process before, by name.
type Kept map[string][]int

// Take returns the descriptors of a name, which are the caller's from now on.
func (k Kept) Take(name string) []int {
	fds := k[name]
	delete(k, name)
	return fds
}

// Names returns the names, sorted.
func (k Kept) Names() (names []string) {
	for name := range k {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
