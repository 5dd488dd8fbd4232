package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// rx_tunnels has an entry for the outer addresses of each Link that is enabled. Where a Link has many
// remotes, it also has a disabled entry for each other tunnel (Reserve): else that Link would receive the
// packets of a tunnel that is carried in userspace.

// putRxTunnel enters the Link in rx_tunnels, in place of its earlier entry.
func (l *Link) putRxTunnel(t *Tunnel) error {
	f, key, old := l.f, t.rxKey(), l.tunnel.rxKey()
	if owner := f.owners[key]; owner != nil && owner != l {
		return f.explainMap("", unix.EEXIST)
	}
	if err := f.objects.RxTunnels.Put(key, t.rxTunnel(l.slot, f.tableOf(t))); err != nil {
		return f.explainMap("the receive entry of the tunnel", err)
	}
	if key != old {
		l.deleteRxTunnel()
		f.owners[key] = l
		l.tunnel.Local, l.tunnel.Remote = t.Local, t.Remote
	}
	return nil
}

// deleteRxTunnel removes the Link's entry from rx_tunnels, if it has one.
func (l *Link) deleteRxTunnel() {
	f, key := l.f, l.tunnel.rxKey()
	if f.owners[key] != l {
		return
	}
	delete(f.owners, key)
	if f.reserved[key] {
		if f.objects.RxTunnels.Put(key, rxTunnel{}) == nil { // it replaces an entry, and so fails for lack of memory only
			return
		}
	}
	_ = f.objects.RxTunnels.Delete(key)
}

// Reserve makes packets between these addresses go to userspace while no Link has them: they are other tunnels',
// which take precedence over a Link with many remotes. If it fails, Links with many remotes are disabled. Remote
// may be AnyRemote.
func (f *FastPath) Reserve(pairs []Pair) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil || f.left {
		return
	}
	next := make(map[rxKey]bool, len(pairs))
	f.reserveErr = nil
	for _, p := range pairs {
		key := rxKey{Source: p.Remote, Destination: p.Local}
		next[key] = true
		if f.owners[key] != nil || f.reserved[key] {
			continue
		}
		if err := f.objects.RxTunnels.Update(key, rxTunnel{}, ebpf.UpdateAny); err != nil {
			delete(next, key)
			f.reserveErr = f.explainMap("the receive entry of another tunnel", err)
		}
	}
	for key := range f.reserved {
		if !next[key] && f.owners[key] == nil {
			_ = f.objects.RxTunnels.Delete(key)
		}
	}
	f.reserved = next
	if f.reserveErr != nil {
		f.disableMany(func(*Link) bool { return true })
	}
}

// SetLocalAddresses replaces the addresses of this host, unicast and in network byte order: the outer destinations of a
// Link with many remotes and no Local. If the map has no room for all, packets to the others go to userspace, and it fails.
func (f *FastPath) SetLocalAddresses(addresses [][4]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return ErrClosed
	}
	next := make(map[[4]byte]bool, len(addresses))
	for _, a := range addresses {
		next[a] = true
	}
	for a := range f.local {
		if !next[a] {
			_ = f.objects.LocalAddresses.Delete(a)
			delete(f.local, a)
		}
	}
	for a := range next {
		if f.local[a] {
			continue
		}
		if err := f.objects.LocalAddresses.Put(a, uint32(1)); errors.Is(err, unix.E2BIG) {
			return &Unavailable{Why: fmt.Sprintf("this host has %d addresses, more than the %d that the fast path takes", len(next), f.objects.LocalAddresses.MaxEntries())}
		} else if err != nil {
			return f.explainMap("an address of this host", err)
		}
		f.local[a] = true
	}
	return nil
}

// disableMany disables Links with many remotes.
func (f *FastPath) disableMany(which func(*Link) bool) {
	for l := range f.links {
		if l.tunnel.Many && which(l) {
			l.disableLocked()
		}
	}
}
