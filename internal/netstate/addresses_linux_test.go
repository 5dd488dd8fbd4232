package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"ipipd/test/netlab"
)

// toldAddresses has the addresses that an AddressFollower last called changed with.
type toldAddresses struct {
	*AddressFollower
	mu    sync.Mutex
	last  []string
	calls int
}

func followAddresses(t *testing.T, h *Host) *toldAddresses {
	a := new(toldAddresses)
	a.AddressFollower = h.FollowAddresses(func(all [][4]byte) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.calls++
		a.last = nil
		for _, one := range all {
			a.last = append(a.last, netip.AddrFrom4(one).String())
		}
		slices.Sort(a.last)
	})
	t.Cleanup(a.Close)
	return a
}

func (a *toldAddresses) await(t *testing.T, what string, want ...string) {
	t.Helper()
	got := ""
	eventually(t, what, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		got = fmt.Sprint(a.last)
		return a.calls > 0 && got == fmt.Sprint(want)
	})
}

// The addresses of all interfaces are followed, except those of VRFs and 127.0.0.0/8, whatever changes them.
func TestHostFollowAddresses(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "link", "add", "u0", "type", "veth", "peer", "name", "u1")
	h := openHost(t, ns)
	a := followAddresses(t, h)
	a.await(t, "there is none")
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "u0")
	ns.Run("ip", "address", "add", "203.0.113.5/32", "dev", "lo")
	_, _ = ns.Try("ip", "address", "add", "2001:db8::1/64", "dev", "u0") // where there is IPv6
	ns.Run("ip", "address", "add", "10.0.0.1", "peer", "10.0.0.2/32", "dev", "u1")
	a.await(t, "some are added", "10.0.0.1", "192.0.2.1", "203.0.113.5")
	ns.Run("ip", "link", "set", "u0", "up") // it loses none
	ns.Run("ip", "link", "set", "u0", "down")
	// One of two interfaces that have the same address loses it.
	ns.Run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
	ns.Run("ip", "address", "del", "192.0.2.1/24", "dev", "u0")
	ns.Run("ip", "address", "del", "203.0.113.5/32", "dev", "lo")
	a.await(t, "one is removed", "10.0.0.1", "192.0.2.1")
	late := followAddresses(t, h)
	late.await(t, "another follower has the same", "10.0.0.1", "192.0.2.1")
	ns.Run("ip", "link", "del", "u0")
	a.await(t, "an interface goes", "192.0.2.1")
	a.Close()
	calls := func() int { a.mu.Lock(); defer a.mu.Unlock(); return a.calls }
	before := calls()
	ns.Run("ip", "address", "add", "192.0.2.3/32", "dev", "lo")
	late.await(t, "the other one goes on", "192.0.2.1", "192.0.2.3")
	if calls() != before {
		t.Error("a closed one is told")
	}
}

// Addresses of a VRF and its ports are not followed: other interfaces do not receive packets for them.
func TestHostFollowAddresses_vrf(t *testing.T) {
	ns := netlab.New(t)
	try(t, ns, "ip link add red type vrf table 100; ip link set red up; ip link add u0 type veth peer name u1; ip address add 192.0.2.1/24 dev u0; ip address add 192.0.2.9/32 dev red")
	a := followAddresses(t, openHost(t, ns))
	a.await(t, "none of the VRF itself", "192.0.2.1")
	ns.Run("ip", "link", "set", "u0", "master", "red")
	a.await(t, "none of its interface")
	ns.Run("ip", "link", "set", "u0", "nomaster")
	a.await(t, "it is back", "192.0.2.1")
}

// Thousands of changes of addresses cause few calls of changed.
func TestHostFollowAddresses_storm(t *testing.T) {
	ns := netlab.New(t)
	h := openHost(t, ns)
	a := followAddresses(t, h)
	a.await(t, "there is none")
	var add, remove strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&add, "address add 10.1.%d.%d/32 dev lo\n", i>>8, i&0xff)
		fmt.Fprintf(&remove, "address del 10.1.%d.%d/32 dev lo\n", i>>8, i&0xff)
	}
	ip := func(batch string) { ns.Run("sh", "-ec", "ip -batch - <<'END'\n"+batch+"END") }
	ip(add.String())
	count := func() int { a.mu.Lock(); defer a.mu.Unlock(); return len(a.last) }
	eventually(t, "all are there", func() bool { return count() == 3000 })
	ip(remove.String())
	eventually(t, "all are gone", func() bool { return count() == 0 })
	if a.mu.Lock(); a.calls > 1000 {
		t.Errorf("%d calls", a.calls)
	}
	a.mu.Unlock()
}
