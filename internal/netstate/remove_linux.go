package netstate

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// removeAtOnce limits the interfaces of a group: the kernel holds the RTNL while it removes
// them, some 0.5 s for 1,000.
const removeAtOnce = 1000

// Remove removes interfaces, by interface groups: the kernel then waits once for all of a
// group until no processor uses them (synchronize_net), and not some 20 ms for each. One
// that is gone already is no error. After an error some, or all, are left.
func (h *Host) Remove(devices []int) error {
	if privileged.Brokered() { // groups are anybody's: the parent removes interfaces by their index only
		remove := make([]*nl.NetlinkRequest, len(devices))
		for i, device := range devices {
			remove[i] = linkRequest(unix.RTM_DELLINK, device, 0)
		}
		return h.batch.executeIfThere(remove)
	}
	// Random groups, which exist for an instant only; never 0, the default group.
	groups := uint32(len(devices)+removeAtOnce-1) / removeAtOnce
	if err := h.removeAsGroups(devices, 1+rand.Uint32N(math.MaxInt32-groups), groups); err != nil {
		return fmt.Errorf("remove %d interfaces: %w", len(devices), permission(err))
	}
	return nil
}

// removeAsGroups spreads interfaces over that many groups, numbered from first, and removes the
// groups, unless one has other interfaces as well.
func (h *Host) removeAsGroups(devices []int, first, groups uint32) error {
	ours := map[int]bool{}
	set, remove := make([]*nl.NetlinkRequest, len(devices)), make([]*nl.NetlinkRequest, groups)
	for i, device := range devices {
		ours[device] = true
		set[i] = groupRequest(unix.RTM_NEWLINK, device, first+uint32(i)%groups)
	}
	for i := range remove {
		remove[i] = groupRequest(unix.RTM_DELLINK, 0, first+uint32(i))
	}
	if err := h.batch.executeIfThere(set); err != nil {
		return err
	}
	all, err := h.getLinkMessages(0, "")
	if err != nil {
		return err
	}
	for _, m := range all {
		if device, group := parseGroup(m); group-first < groups && !ours[device] {
			return fmt.Errorf("interface %d is in group %d as well: %w", device, group, unix.EEXIST)
		}
	}
	return h.batch.executeIfThere(remove)
}

// executeIfThere is executeAll for requests whose interface may be gone; it returns the first other error.
func (s *requestSocket) executeIfThere(requests []*nl.NetlinkRequest) error {
	for _, failure := range s.executeAll(requests, -1) {
		if failure != nil && failure != unix.ENODEV {
			return failure
		}
	}
	return nil
}

// groupRequest returns the request that sets an interface's group (RTM_NEWLINK), or removes all of a group (RTM_DELLINK).
func groupRequest(kind, device int, group uint32) *nl.NetlinkRequest {
	return linkRequest(kind, device, 0, nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
}

// parseGroup reads the index and the group of an RTM_NEWLINK that starts at its ifinfomsg.
func parseGroup(b []byte) (device int, group uint32) {
	if len(b) < unix.SizeofIfInfomsg {
		return 0, 0
	}
	_ = eachAttr(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) error {
		if kind == unix.IFLA_GROUP {
			group = u32(value)
		}
		return nil
	})
	return int(binary.NativeEndian.Uint32(b[4:])), group
}
