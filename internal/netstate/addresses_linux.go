package netstate

import (
	"maps"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// AddressFollower follows the addresses at which this host receives packets. The Host's mu guards it.
type AddressFollower struct {
	host    *Host
	changed func([][4]byte)
	told    map[[4]byte]bool // what changed was last called with; nil before the first call
}

// addressFollowers are the AddressFollowers of a Host. stale: the addresses are to be read again, at the time
// due. The Host's mu guards it.
type addressFollowers struct {
	all   map[*AddressFollower]bool
	stale bool
	due   time.Time
}

// addressGap is the least time between two reads of the addresses caused by messages.
const addressGap = 50 * time.Millisecond

// FollowAddresses follows the IPv4 unicast addresses, but for those of loopback (127.0.0.0/8), of interfaces
// in no VRF: packets to these are for this host. changed is called from the Host's goroutine with all of them,
// first as they are and then whenever they have changed; it owns the slice, and must not block.
func (h *Host) FollowAddresses(changed func([][4]byte)) *AddressFollower {
	a := &AddressFollower{host: h, changed: changed}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addresses.all[a] = true
	h.addresses.stale, h.addresses.due = true, time.Time{}
	h.wakeLocked()
	return a
}

// Close ends the AddressFollower. A last call of changed may still come.
func (a *AddressFollower) Close() {
	a.host.mu.Lock()
	defer a.host.mu.Unlock()
	delete(a.host.addresses.all, a)
}

// markAddressesLocked marks the addresses as to be read again from the kernel, if anybody follows them.
func (h *Host) markAddressesLocked() {
	h.addresses.stale = len(h.addresses.all) > 0
}

// updateAddresses reads the addresses if that is due, and tells of a change. The caller does not hold mu.
func (h *Host) updateAddresses() {
	h.mu.Lock()
	now := time.Now()
	if !h.addresses.stale || now.Before(h.addresses.due) {
		h.mu.Unlock()
		return
	}
	h.addresses.stale = false
	next, err := h.readAddressesLocked()
	h.addresses.stale = h.addresses.stale || err != nil // it is tried again
	h.addresses.due = now.Add(max(addressGap, 11*time.Since(now)))
	var tell []*AddressFollower
	for a := range h.addresses.all {
		if err == nil && (a.told == nil || !maps.Equal(a.told, next)) {
			a.told = next
			tell = append(tell, a)
		}
	}
	h.mu.Unlock()
	for _, a := range tell {
		a.changed(slices.Collect(maps.Keys(next)))
	}
}

// readAddressesLocked reads the addresses from the kernel. mu is held over the request: a message handled later is
// about what was read, or newer.
func (h *Host) readAddressesLocked() (all map[[4]byte]bool, err error) {
	all = map[[4]byte]bool{}
	req := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfAddrmsg(unix.AF_INET))
	err = h.readAll(req, unix.RTM_NEWADDR, func(b []byte) {
		a, ok := parseAddress(b)
		// A link that is not known yet makes the addresses stale when its message comes.
		if l, known := h.links[a.device]; ok && known && l.slaveKind != "vrf" && l.vrfTable == 0 && a.local[0] != 127 {
			all[a.local] = true
		}
	})
	return all, err
}
