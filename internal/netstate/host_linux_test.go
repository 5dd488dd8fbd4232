package netstate

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// openHost opens a Host in a namespace until the test ends.
func openHost(t testing.TB, ns *netlab.NS) (h *Host) {
	t.Helper()
	ns.Do(func() {
		var err error
		if h, err = Open(Options{Failed: func(err error) { t.Error(err) }}); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { h.Close() })
	return h
}

// counted is a Follower with the number of calls of changed.
type counted struct {
	*Follower
	calls atomic.Int64
}

func follow(t testing.TB, h *Host, ns *netlab.NS, q Query) *counted {
	t.Helper()
	c := new(counted)
	ns.Do(func() { c.Follower = h.Follow(q, func() { c.calls.Add(1) }) })
	t.Cleanup(c.Close)
	return c
}

// settle waits until the Host has handled all that the kernel has sent, and changed was
// called.
func settle(t testing.TB, h *Host) {
	t.Helper()
	// Another follower is marked last: the goroutine updates them in order.
	var told atomic.Bool
	last := &Follower{host: h, changed: func() { told.Store(true) }}
	last.answer.Store(&Answer{Err: errors.New("it asks nothing")})
	eventually(t, "the Host has nothing to do", func() bool {
		h.mu.Lock()
		if err := h.readLocked(); err != nil {
			t.Error(err)
		}
		busy := h.stale != 0 || h.lost
		last.changes++
		told.Store(false)
		h.markLocked(last, dirtyMemory)
		h.wakeLocked()
		h.mu.Unlock()
		eventually(t, "the Host's goroutine gets there", told.Load)
		h.mu.Lock()
		defer h.mu.Unlock()
		return !busy && len(h.queue) == 0
	})
	last.Close()
}

// try runs shell commands in a namespace. It skips the test if this system cannot.
func try(t *testing.T, ns *netlab.NS, commands string) {
	t.Helper()
	if out, err := ns.Try("sh", "-ec", commands); err != nil {
		t.Skipf("this system cannot %s: %s", commands, strings.TrimSpace(out))
	}
}

// tunnelLab is newLab with the tunnel's interface tun0, 10.255.0.1/30, and another interface
// that routes to the remote's network can use, eth5, 203.0.113.1/24.
func tunnelLab(t *testing.T) lab {
	t.Helper()
	l := newLab(t)
	netlab.Veth(t, l.host, l.router, netlab.End{Name: "eth5", Address: "203.0.113.1/24"}, netlab.End{Name: "eth5", Address: "203.0.113.2/24"})
	l.host.Run("sh", "-ec", "ip tuntap add tun0 mode tun; ip address add 10.255.0.1/30 dev tun0; ip link set tun0 up; ip route add 10.1.0.0/16 dev tun0")
	withoutCarrier(t, l.host, "tun0")
	return l
}

// withoutCarrier waits until the kernel, which notices it later, has set the operational state of
// an interface that was set up to DOWN.
func withoutCarrier(t *testing.T, ns *netlab.NS, ifname string) {
	t.Helper()
	eventually(t, ifname+" has no carrier", func() bool {
		return strings.Contains(ns.Run("ip", "link", "show", "dev", ifname), "state DOWN")
	})
}

var (
	other  = [4]byte{192, 0, 2, 3}
	eth5   = [4]byte{203, 0, 113, 1}
	isGone = func(a *Answer) bool { return errors.As(a.Err, new(*NoRouteError)) }
	isFine = func(a *Answer) bool { return a.Err == nil && a.HasLocal && a.Route.Source == here }
	via    = func(gateway [4]byte) func(*Answer) bool {
		return func(a *Answer) bool { return a.Route.Gateway == gateway }
	}
	bypass  = func(part string) func(*Answer) bool { return func(a *Answer) bool { return matches(a.Bypass, part) } }
	ingress = func(part string) func(*Answer) bool { return func(a *Answer) bool { return matches(a.Ingress, part) } }
	egress  = func(part string) func(*Answer) bool { return func(a *Answer) bool { return matches(a.Egress, part) } }
)

// matches reports whether reason has the part; "" matches "" only.
func matches(reason, part string) bool {
	return strings.Contains(reason, part) && (reason == "") == (part == "")
}

func neighbourIs(mac [6]byte, resolved, static bool) func(*Answer) bool {
	return func(a *Answer) bool {
		return a.Err == nil && a.Route.DestinationMAC == mac && a.Route.Resolved == resolved && a.Route.Static == static
	}
}

// step is a change, and what the Answer must be after it.
type step struct {
	commands string
	want     func(*Answer) bool
}

// A follower whose remote is not known yet is told of changes after which its DNS name may resolve.
func TestFollower_networkChanges(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{})
	known := follow(t, h, l.host, Query{Remote: far})
	for _, commands := range []string{"ip link set eth5 down", "ip link set eth5 up", "ip route add default via 192.0.2.2", "ip route del default", "ip rule add to 10.9.0.0/16 lookup 5"} {
		settle(t, h)
		before, calls := f.Answer().NetworkChanges, f.calls.Load()
		l.host.Run("sh", "-ec", commands)
		eventually(t, "it is told of "+commands, func() bool { return f.Answer().NetworkChanges > before && f.calls.Load() > calls })
	}
	if n := known.Answer().NetworkChanges; n != 0 {
		t.Errorf("the other one counts %d", n)
	}
}

// Each change is in the Answer, and changed is called for it, without another Query.
func TestHost_changes(t *testing.T) {
	const all = " protocol ip u32 match u32 0 0"
	mtuIs := func(mtu int) func(*Answer) bool { return func(a *Answer) bool { return a.Route.MTU == mtu } }
	byEth5 := func(a *Answer) bool { return a.Err == nil && a.Route.DeviceName == "eth5" }
	ethernet := func(want bool) func(*Answer) bool {
		return func(a *Answer) bool { return a.Err == nil && a.Route.Ethernet == want }
	}
	for _, c := range []struct {
		name    string
		query   Query
		prepare string
		steps   []step
	}{
		{"a more specific route", Query{}, "", []step{
			{"ip route add 198.51.100.1 via 192.0.2.3", via(other)},
			{"ip route del 198.51.100.1", via(router)},
		}},
		{"a default route and a more specific one", Query{}, "ip route del 198.51.100.0/24; ip route add default via 192.0.2.2", []step{
			{"ip route add 198.51.0.0/16 via 192.0.2.3", via(other)},
			{"ip route del 198.51.0.0/16", via(router)},
			{"ip route del default", isGone},
			{"ip route add default via 192.0.2.3", via(other)},
		}},
		{"types of routes", Query{}, "", []step{
			{"ip route add blackhole 198.51.100.1", isGone},
			{"ip route del blackhole 198.51.100.1", isFine},
			{"ip route add local 198.51.100.1 dev lo", func(a *Answer) bool { return a.Route.Local }},
		}},
		{"MTUs", Query{}, "", []step{
			{"ip route replace 198.51.100.0/24 via 192.0.2.2 mtu 1400", mtuIs(1400)},
			{"ip link set eth0 mtu 1300", mtuIs(1300)},
		}},
		{"another metric takes over without a message when a link goes down", Query{}, "ip route add 198.51.100.0/24 via 203.0.113.2 metric 100", []step{
			{"ip link set eth0 down", byEth5},
			{"ip link set eth0 up; ip route add 198.51.100.0/24 via 192.0.2.2", isFine},
			{"ip link del eth0", byEth5},
		}},
		{"a next hop that comes back to life without a message", Query{}, "ip route replace 198.51.100.0/24 nexthop via 192.0.2.2 weight 255 nexthop via 203.0.113.2", []step{
			{"ip link set eth0 down", byEth5},
			{"ip link set eth0 up", func(a *Answer) bool { return a.Err == nil && a.Route.DeviceName == "eth0" }},
		}},
		{"the carrier", Query{}, "sysctl -qw net.ipv4.conf.all.ignore_routes_with_linkdown=1; ip route add 198.51.100.0/24 via 203.0.113.2 metric 100", []step{
			{"ip link set eth0 carrier off 2>/dev/null || { ip link set eth0 down; }", byEth5},
		}},
		{"the address is taken away, and put back", Query{}, "", []step{
			{"ip address del 192.0.2.1/24 dev eth0", func(a *Answer) bool { return isGone(a) && !a.HasLocal }},
			{"ip address add 192.0.2.1/24 dev eth0; ip route add 198.51.100.0/24 via 192.0.2.2", isFine},
		}},
		{"a local address that is not the route's", Query{Local: [4]byte{203, 0, 113, 5}}, "", []step{
			{"ip address add 203.0.113.5/32 dev lo", func(a *Answer) bool { return a.HasLocal && a.Route.Source == [4]byte{203, 0, 113, 5} }},
			{"ip address del 203.0.113.5/32 dev lo", func(a *Answer) bool { return !a.HasLocal && a.Err == nil }},
			{"ip route add local 203.0.113.4/30 dev lo", func(a *Answer) bool { return a.HasLocal }},
			{"ip route del local 203.0.113.4/30 dev lo", func(a *Answer) bool { return !a.HasLocal }},
		}},
		{"the preferred source", Query{}, "ip address add 192.0.2.7/24 dev eth0", []step{
			{"ip route replace 198.51.100.0/24 via 192.0.2.2 src 192.0.2.7", func(a *Answer) bool { return a.Route.Source == [4]byte{192, 0, 2, 7} }},
			{"ip address del 192.0.2.7/24 dev eth0", isGone},
		}},
		{"a route that goes with its preferred source, of which no message tells", Query{Local: here}, "ip address add 192.0.2.77/32 dev lo; ip route replace 198.51.100.0/24 via 192.0.2.2 src 192.0.2.77", []step{
			{"ip address del 192.0.2.77/32 dev lo", isGone},
		}},
		{"a rule", Query{Mark: 7}, "ip route add 198.51.100.0/24 via 203.0.113.2 table 5", []step{
			{"ip rule add fwmark 7 lookup 5", func(a *Answer) bool { return byEth5(a) && a.ReturnDevice != a.Route.Device }},
			{"ip rule add to 198.51.100.1 lookup 5", func(a *Answer) bool { return byEth5(a) && a.ReturnDevice == a.Route.Device }},
			{"ip rule add ipproto 4 table 100", bypass("a routing rule selects by the protocol")},
			{"ip rule del ipproto 4 table 100; ip rule del fwmark 7 lookup 5; ip rule del to 198.51.100.1 lookup 5", func(a *Answer) bool { return isFine(a) && a.Bypass == "" }},
		}},
		{"a next-hop object", Query{}, "ip nexthop add id 1 via 192.0.2.2 dev eth0; ip route replace 198.51.100.0/24 nhid 1", []step{
			{"ip nexthop replace id 1 via 192.0.2.3 dev eth0", via(other)},
			{"ip nexthop del id 1", isGone},
		}},
		{"the link", Query{}, "", []step{
			{"ip link set eth0 arp off", ethernet(false)},
			{"ip link set eth0 arp on", ethernet(true)},
			{"ip link set eth0 address 02:00:00:00:00:07", func(a *Answer) bool { return a.Route.SourceMAC == [6]byte{2, 0, 0, 0, 0, 7} }},
			{"ip link set eth0 name wan", func(a *Answer) bool { return a.Route.DeviceName == "wan" }},
		}},
		{"a bridge", Query{}, "ip link add br0 type bridge; ip link set br0 up", []step{
			{"ip link set eth0 master br0", ethernet(false)},
			{"ip link set eth0 nomaster", ethernet(true)},
		}},
		{"a VRF", Query{UnderlayDevice: "eth0"}, "ip link add red type vrf table 77; ip link set red up", []step{
			{"ip link set eth0 master red; ip route replace 198.51.100.0/24 via 192.0.2.2 table 77", func(a *Answer) bool { return a.Err == nil && a.Route.VRF }},
			{"ip link set eth0 nomaster; ip route replace 198.51.100.0/24 via 192.0.2.2", func(a *Answer) bool { return a.Err == nil && !a.Route.VRF }},
		}},
		{"the underlay device by name", Query{UnderlayDevice: "eth0"}, "", []step{
			{"ip link set eth0 name wan", func(a *Answer) bool { return errors.As(a.Err, new(*NoDeviceError)) }},
			{"ip link set eth5 name eth0; ip route add 198.51.100.0/24 via 203.0.113.2 metric 5", func(a *Answer) bool { return a.Err == nil && a.Route.Source == eth5 }},
			{"ip link del eth0", func(a *Answer) bool { return errors.As(a.Err, new(*NoDeviceError)) && a.HasLocal == false }},
			{"ip tuntap add eth0 mode tap", func(a *Answer) bool { return isGone(a) && a.Device != 0 }},
		}},
		{"the underlay device by an alternative name", Query{UnderlayDevice: "a-name-longer-than-others"}, "ip link property add dev eth0 altname a-name-longer-than-others", []step{
			{"ip link property del dev eth0 altname a-name-longer-than-others", func(a *Answer) bool { return errors.As(a.Err, new(*NoDeviceError)) }},
			{"ip link property add dev eth0 altname a-name-longer-than-others", isFine},
		}},
		{"the neighbour", Query{}, "ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:98 dev eth0 nud stale", []step{
			{"ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:99 dev eth0 nud permanent", neighbourIs([6]byte{2, 0, 0, 0, 0, 0x99}, true, true)},
			{"ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:98 dev eth0 nud reachable", neighbourIs([6]byte{2, 0, 0, 0, 0, 0x98}, true, false)},
			{"ip neigh replace 192.0.2.2 dev eth0 nud failed", neighbourIs([6]byte{}, false, false)},
			{"ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:99 dev eth0 nud permanent", neighbourIs([6]byte{2, 0, 0, 0, 0, 0x99}, true, true)},
			{"ip neigh del 192.0.2.2 dev eth0", neighbourIs([6]byte{}, false, false)},
		}},
		{"nftables", Query{}, "", []step{
			{"nft add table ip t; nft 'add chain ip t c { type filter hook output priority 0 ; }'; nft add rule ip t c counter", bypass("nftables has rules in chain c of table t")},
			{"nft flush chain ip t c", bypass("")},
			{"nft add rule ip t c counter", bypass("nftables")},
			{"nft delete table ip t", bypass("")},
		}},
		{"IPsec", Query{}, "", []step{
			{"ip xfrm policy add src 192.0.2.1 dst 198.51.100.1 proto 4 dir out action block", bypass("an IPsec policy applies: 192.0.2.1/32 → 198.51.100.1/32, dir out")},
			{"ip xfrm policy del src 192.0.2.1 dst 198.51.100.1 proto 4 dir out", bypass("")},
			{"ip xfrm policy add src 198.51.100.1 dst 192.0.2.1 dir in action block", bypass("an IPsec policy applies")},
			{"ip xfrm policy flush", bypass("")},
		}},
		{"the default of IPsec", Query{}, "", []step{
			{"ip xfrm policy setdefault out block", bypass("the default IPsec policy blocks")},
			{"ip xfrm policy setdefault out accept", bypass("")},
		}},
		{"tc on the underlay device", Query{}, "tc qdisc add dev eth0 clsact", []step{
			{"tc filter add dev eth0 egress pref 1" + all, bypass("tc has filters on the egress of the underlay device")},
			{"tc filter del dev eth0 egress pref 1", bypass("")},
			{"tc filter add dev eth0 ingress" + all, ingress("tc has filters on the ingress")},
			{"tc qdisc del dev eth0 clsact", ingress("")},
		}},
		{"a shared block of tc", Query{}, "tc qdisc add dev eth0 ingress_block 9 clsact", []step{
			{"tc filter add block 9 pref 1" + all, ingress("tc has filters on the ingress")},
			{"tc filter del block 9 pref 1", ingress("")},
		}},
		{"tc on the interface", Query{}, "", []step{
			{"tc qdisc add dev tun0 root pfifo", egress("queueing discipline pfifo")},
			{"tc qdisc replace dev tun0 root noqueue", egress("")},
			{"tc qdisc add dev tun0 clsact; tc filter add dev tun0 egress" + all, func(a *Answer) bool { return a.Clsact && !a.Attached && a.Egress == "" }},
			{"tc qdisc del dev tun0 clsact", func(a *Answer) bool { return !a.Clsact && a.Egress == "" }},
		}},
		{"promiscuous mode of the interface", Query{}, "", []step{
			{"ip link set tun0 promisc on", egress("promiscuous")},
			{"ip link set tun0 promisc off", egress("")},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := tunnelLab(t)
			if c.name == "the neighbour" { // its ARP reply would resolve it again before this test looks
				l.router.Sysctl("net.ipv4.conf.all.arp_ignore", "8")
			}
			try(t, l.host, c.prepare)
			h := openHost(t, l.host)
			c.query.Remote, c.query.Interface = far, index(t, l.host, "tun0")
			f := follow(t, h, l.host, c.query)
			for _, step := range c.steps {
				settle(t, h)
				before := f.calls.Load()
				if step.want(f.Answer()) {
					t.Fatalf("before %s it is so already: %+v", step.commands, f.Answer())
				}
				try(t, l.host, step.commands)
				eventually(t, "the Answer after "+step.commands, func() bool { return step.want(f.Answer()) || t.Failed() })
				eventually(t, "changed is called", func() bool { return f.calls.Load() > before })
			}
			// The Host's memory agrees with what a new Host reads.
			settle(t, h)
			fresh := follow(t, openHost(t, l.host), l.host, c.query)
			eventually(t, "memory and kernel agree", func() bool {
				a, b := *f.Answer(), *fresh.Answer()
				a.InterfaceChanges, a.InterfaceDowns, b.InterfaceChanges, b.InterfaceDowns = 0, 0, 0, 0
				if a.Err != nil && c.query.Local == [4]byte{} {
					b.HasLocal = a.HasLocal // the fresh follower has never had a source
				}
				return a.equal(&b)
			})
		})
	}
}

// Without a route, the source that an earlier Query's route preferred is not used for the next Query.
func TestFollowerSet_source(t *testing.T) {
	l := newLab(t)
	h := openHost(t, l.host)
	nowhere := [4]byte{203, 0, 113, 99}
	l.host.Run("ip", "route", "flush", "root", "0.0.0.0/0")
	f := follow(t, h, l.host, Query{Remote: far, Local: nowhere})
	if a := f.Answer(); !isGone(a) || a.HasLocal {
		t.Fatalf("%+v", a)
	}
	if a := f.Set(Query{Remote: far}); !isGone(a) || !a.HasLocal {
		t.Errorf("%+v", a)
	}
}

// A change that does not concern a follower causes no request and no call of changed.
func TestHost_unrelatedChanges(t *testing.T) {
	l := tunnelLab(t)
	l.host.Run("sh", "-ec", "ip tuntap add tun1 mode tun; ip address add 10.255.1.1/30 dev tun1; ip link set tun1 up; ip tuntap add d0 mode tap; ip link set d0 up")
	withoutCarrier(t, l.host, "tun1")
	withoutCarrier(t, l.host, "d0")
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	if out, err := l.host.Try("sh", "-ec", "nft add table ip t; nft 'add set ip t s { type ipv4_addr; }'"); err != nil {
		t.Logf("no nftables: %s", out)
	}
	l.host.Run("ip", "neigh", "replace", "203.0.113.2", "lladdr", "02:00:00:00:00:99", "dev", "eth5", "nud", "permanent")
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far, Interface: index(t, l.host, "tun0")})
	// The other tunnel's remote is on a network of its own.
	neighbouring := follow(t, h, l.host, Query{Remote: [4]byte{203, 0, 113, 2}, Interface: index(t, l.host, "tun1")})
	for _, command := range []string{
		"ip route add 10.9.0.0/16 via 192.0.2.2",
		"ip route change 10.9.0.0/16 via 192.0.2.3",
		"ip route del 10.9.0.0/16",
		"ip route add 10.9.0.0/16 dev tun1",
		"ip address add 10.8.0.1/24 dev d0",
		"ip address del 10.8.0.1/24 dev d0",
		"ip neigh replace 192.0.2.9 lladdr 02:00:00:00:00:09 dev eth0",
		"ip neigh del 192.0.2.9 dev eth0",
		"ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:98 dev d0",
		"ip link set eth0 alias uplink",
		"ip link set eth0 txqueuelen 77",
		"ip link set eth0 promisc on",
		"ip link set eth0 promisc off",
		"ip tuntap add d1 mode tap",
		"ip link set d1 mtu 1400",
		"ip link set d1 name d2",
		"ip link del d2",
		"ip link set tun1 mtu 1300",
		"ip link set tun1 down",
		"ip link set tun1 up",
		"ip address del 10.255.1.1/30 dev tun1",
		"ip link set tun1 promisc on",
		"tc qdisc add dev tun1 root pfifo",
		"tc qdisc add dev d0 clsact",
		"tc filter add dev d0 egress protocol ip u32 match u32 0 0",
		"nft 'add element ip t s { 10.0.0.1 }'",
		"nft 'delete element ip t s { 10.0.0.1 }'",
		"ip link set tun1 name tun9",
	} {
		settle(t, h)
		h.mu.Lock()
		seen := h.seen
		h.mu.Unlock()
		calls, requests := f.calls.Load(), h.requests.Load()
		out, err := l.host.Try("sh", "-ec", command)
		if err != nil {
			t.Logf("%s: not tested, as it fails here: %s", command, strings.TrimSpace(out))
			continue
		}
		eventually(t, "a message of "+command, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.seen > seen })
		settle(t, h)
		if n := h.requests.Load() - requests; n != 0 {
			t.Errorf("%s: %d requests", command, n)
		}
		if n := f.calls.Load() - calls; n != 0 {
			t.Errorf("%s: changed is called %d times", command, n)
		}
	}
	if neighbouring.calls.Load() == 0 {
		t.Error("the other follower is not told of anything: this tests nothing")
	}
}

// Changes of the tunnel's own interface are counted in InterfaceChanges and InterfaceDowns.
func TestHost_interface(t *testing.T) {
	l := tunnelLab(t)
	l.host.Run("ip", "tuntap", "add", "tun1", "mode", "tun")
	h := openHost(t, l.host)
	q := Query{Remote: far}
	f := follow(t, h, l.host, q)
	q.Interface, q.Routes = index(t, l.host, "tun0"), []InterfaceRoute{{Prefix: netip.MustParsePrefix("10.1.2.3/16")}}
	if a := f.Set(q); a.Egress != "" || a.InterfaceChanges != 0 {
		t.Errorf("%+v", a)
	}
	for _, c := range []struct {
		command string
		down    bool
	}{
		{"ip address add 10.255.7.1/32 dev tun0", false},
		{"ip address flush dev tun0", false},
		{"ip route add 10.2.0.0/16 dev tun0", false},
		{"ip route del 10.2.0.0/16 dev tun0", false},
		{"ip link set tun0 mtu 1300", false},
		{"ip link set tun0 down; ip link set tun0 up", true},
		{"ip route add 10.1.0.0/16 dev eth5", false}, // the prefix of a configured route
		{"ip route del 10.1.0.0/16 dev eth5", false}, // and its removal
		{"ip link set tun0 name vpn0", false},
		{"ip link set vpn0 netns " + l.router.Path(), true},
		{"nsenter --net=" + l.router.Path() + " ip link set vpn0 netns " + l.host.Path(), false}, // perhaps with another index
		{"ip link del vpn0", true},
	} {
		if name := "vpn0"; strings.HasPrefix(c.command, "ip link del") {
			q.Interface = index(t, l.host, name)
			f.Set(q)
		}
		settle(t, h)
		before, calls := f.Answer(), f.calls.Load()
		try(t, l.host, c.command)
		eventually(t, c.command, func() bool {
			a := f.Answer()
			return a.InterfaceChanges > before.InterfaceChanges && (a.InterfaceDowns > before.InterfaceDowns || !c.down) && f.calls.Load() > calls
		})
		settle(t, h)
		if a := f.Answer(); !c.down && !strings.HasPrefix(c.command, "nsenter") && a.InterfaceDowns != before.InterfaceDowns {
			t.Errorf("%s: the interface is said to have been down", c.command)
		}
	}
	settle(t, h)
	before := f.Answer().InterfaceChanges
	l.host.Run("ip", "link", "set", "tun1", "up")
	settle(t, h)
	if f.Answer().InterfaceChanges != before {
		t.Error("a change of another interface is counted")
	}
}

// A follower routed through another tunnel's interface sees its changes, although a change
// of a tunnel's interface does not concern all followers.
func TestHost_nestedTunnel(t *testing.T) {
	l := tunnelLab(t)
	try(t, l.host, "ip tuntap add tun1 mode tun; ip link set tun1 up; ip route add 198.51.100.1 dev tun1")
	h := openHost(t, l.host)
	outer := follow(t, h, l.host, Query{Remote: router, Interface: index(t, l.host, "tun1")})
	inner := follow(t, h, l.host, Query{Remote: far, Interface: index(t, l.host, "tun0")})
	by := func(device string) func() bool {
		return func() bool { return inner.Answer().Route.DeviceName == device }
	}
	eventually(t, "it leads through tun1", by("tun1"))
	l.host.Run("ip", "link", "set", "tun1", "mtu", "1234")
	eventually(t, "its MTU", func() bool { return inner.Answer().Route.MTU == 1234 })
	l.host.Run("ip", "link", "set", "tun1", "down")
	eventually(t, "it leads elsewhere", by("eth0"))
	if a := outer.Answer(); a.InterfaceDowns == 0 {
		t.Errorf("%+v", a)
	}
}

func TestHost_Recheck(t *testing.T) {
	l := newLab(t)
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far})
	recheck := func() { l.host.Do(h.Recheck); settle(t, h) }
	recheck()
	if f.calls.Load() != 0 || f.Answer().Bypass != "" {
		t.Errorf("%d calls, %+v", f.calls.Load(), f.Answer())
	}
	try(t, l.host, "iptables-legacy -A OUTPUT -p 4 -j DROP")
	recheck()
	eventually(t, "legacy iptables is seen", func() bool { return matches(f.Answer().Bypass, "legacy iptables has tables here: filter") })
}

// No message tells of a redirect, or of its end: a route by a next hop that is gone is looked up again.
func TestHost_nextHopGone(t *testing.T) {
	l := newLab(t)
	l.router.Sysctl("net.ipv4.conf.all.arp_ignore", "8") // its ARP reply would resolve it again before this test looks
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far})
	settle(t, h)
	want := f.Answer().Route.MTU
	f.updating.Lock()
	f.found.MTU = 1111 // an outdated look-up
	f.updating.Unlock()
	l.host.Run("ip", "neigh", "del", "192.0.2.2", "dev", "eth0")
	eventually(t, "the next hop is gone", func() bool { return !f.Answer().Route.Resolved })
	settle(t, h)
	if mtu := f.Answer().Route.MTU; mtu != want {
		t.Errorf("the MTU is %d, want %d", mtu, want)
	}
}

// Recheck reads the parts of the policy again that could not be read.
func TestHost_RecheckUnknown(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	settle(t, h)
	h.mu.Lock()
	good := h.policy
	h.mu.Unlock()
	broken := new(requester)
	broken.sockets = map[int]*requestSocket{unix.NETLINK_ROUTE: {fd: -1}, unix.NETLINK_NETFILTER: {fd: -1}, unix.NETLINK_XFRM: {fd: -1}}
	unknown := broken.readPolicy(policy{}, partNftables|partXfrm|partRules)
	if !strings.Contains(unknown.rules, "cannot tell") || !strings.Contains(unknown.chainsUnknown, "cannot tell") || !strings.Contains(unknown.xfrmUnknown, "cannot tell") {
		t.Fatalf("%+v", unknown)
	}
	h.mu.Lock()
	h.policy = &unknown
	h.mu.Unlock()
	l.host.Do(h.Recheck)
	h.mu.Lock()
	defer h.mu.Unlock()
	if !reflect.DeepEqual(h.policy, good) {
		t.Errorf("%+v, want %+v", h.policy, good)
	}
}

// While nobody reads, more messages come than the socket's buffer holds, so that the
// kernel drops some: the Host reads everything again.
func TestHost_lostMessages(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far, Interface: index(t, l.host, "tun0")})
	settle(t, h)
	resynced, before := h.lastResync, f.Answer()
	h.mu.Lock()
	for _, fd := range h.events {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); fd >= 0 && err != nil {
			t.Error(err)
		}
	}
	addRoutes(t, l.host, 500)
	l.host.Run("sh", "-ec", "ip link set eth0 mtu 1400; ip link set tun0 promisc on; ip link set tun0 down; ip link set eth5 name wan")
	h.mu.Unlock()
	eventually(t, "what was dropped", func() bool {
		a := f.Answer()
		return a.Route.MTU == 1400 && matches(a.Egress, "promiscuous") && a.InterfaceChanges > before.InterfaceChanges && a.InterfaceDowns > before.InterfaceDowns
	})
	settle(t, h)
	h.mu.Lock()
	if h.lastResync == resynced {
		t.Error("the socket did not overflow: this tests nothing")
	}
	h.mu.Unlock()
	if i, err := h.linkNamed("wan"); err != nil || i != index(t, l.host, "wan") {
		t.Error(i, err)
	}
	l.host.Run("ip", "link", "set", "eth0", "mtu", "1300")
	eventually(t, "a change after that", func() bool { return f.Answer().Route.MTU == 1300 })
}

// The kernel drops messages until all that are queued have been read, and says so once (ENOBUFS):
// the Host must read its state again only after the last queued message, however many there are.
func TestHost_lostBehindMany(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far})
	settle(t, h)
	h.mu.Lock()
	resynced := h.lastResync
	churn := func() { // two messages for each route
		addRoutes(t, l.host, readAtOnce)
		l.host.Run("ip", "route", "flush", "root", "10.0.0.0/8")
	}
	churn()
	l.host.Run("ip", "link", "set", "eth0", "mtu", "1400")
	churn() // until the socket overflows
	l.host.Run("ip", "link", "set", "eth0", "mtu", "1300")
	h.mu.Unlock()
	eventually(t, "everything is read again", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.lastResync != resynced
	})
	settle(t, h)
	if mtu := f.Answer().Route.MTU; mtu != 1300 {
		t.Errorf("the MTU is %d, want 1300", mtu)
	}
}

// addRoutes adds n routes without a pause.
func addRoutes(t testing.TB, ns *netlab.NS, n int) {
	t.Helper()
	file := t.TempDir() + "/batch"
	var batch strings.Builder
	for i := range n {
		fmt.Fprintf(&batch, "route add 10.%d.%d.0/24 dev eth0\n", i/256, i%256)
	}
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	ns.Run("ip", "-batch", file)
}

// A storm of changes that concern no follower causes no request.
func TestHost_storm(t *testing.T) {
	l := tunnelLab(t)
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far, Interface: index(t, l.host, "tun0")})
	settle(t, h)
	h.mu.Lock()
	seen := h.seen
	h.mu.Unlock()
	calls, requests := f.calls.Load(), h.requests.Load()
	const changes = 5000
	addRoutes(t, l.host, changes)
	settle(t, h)
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := h.seen - seen; n < changes {
		t.Errorf("%d messages, want %d", n, changes)
	}
	if f.calls.Load() != calls || h.requests.Load() != requests {
		t.Errorf("%d calls, %d requests", f.calls.Load()-calls, h.requests.Load()-requests)
	}
}

// Each of many followers causes a few requests, and a change only those for the followers it concerns.
func TestFollower_thousand(t *testing.T) {
	const n = 1000
	l := tunnelLab(t)
	l.host.Run("ip", "route", "add", "10.64.0.0/10", "via", "192.0.2.2")
	h := openHost(t, l.host)
	before := h.requests.Load()
	followers := make([]*counted, n)
	var start sync.WaitGroup
	for worker := range 4 {
		start.Go(func() {
			for i := worker; i < n; i += 4 {
				followers[i] = follow(t, h, l.host, Query{Remote: [4]byte{10, 64, byte(i >> 8), byte(i)}, Local: here})
			}
		})
	}
	start.Wait()
	if made := h.requests.Load() - before; made > 5*n {
		t.Errorf("%d requests for %d followers", made, n)
	}
	l.host.Run("ip", "route", "replace", "10.64.0.0/10", "via", "192.0.2.3")
	l.host.Run("ip", "route", "add", "10.64.3.0/24", "via", "203.0.113.2")
	for i, f := range followers {
		want := other
		if i>>8 == 3 {
			want = [4]byte{203, 0, 113, 2}
		}
		eventually(t, "each one's route", func() bool { return f.Answer().Route.Gateway == want })
	}
	settle(t, h)
	before = h.requests.Load()
	l.host.Run("ip", "route", "add", "10.64.0.7", "via", "203.0.113.2")
	eventually(t, "one's route", func() bool { return followers[7].Answer().Route.DeviceName == "eth5" })
	settle(t, h)
	if made := h.requests.Load() - before; made > 5 {
		t.Errorf("%d requests for the change of one of %d", made, n)
	}
}

// Followers come, go and ask anew while the network changes and the Host is closed.
func TestHost_busy(t *testing.T) {
	l := tunnelLab(t)
	for range 3 {
		h := openHost(t, l.host)
		stop := make(chan struct{})
		var busy sync.WaitGroup
		for worker := range 4 {
			busy.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					q := Query{Remote: [4]byte{198, 51, 100, byte(worker)}}
					f := h.Follow(q, func() {})
					q.Local = here
					f.Set(q)
					f.Refresh()
					h.Recheck()
					if f.Answer() == nil {
						t.Error("no Answer")
					}
					f.Close()
				}
			})
		}
		l.host.Run("sh", "-ec", "for i in 1 2 3 4 5; do ip link set eth5 down; ip link set eth5 up; ip route add 198.51.100.0/28 via 192.0.2.3; ip route del 198.51.100.0/28; ip neigh flush all; done")
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		close(stop)
		busy.Wait()
		if h.index.sets != nil && len(h.index.sets)+len(h.index.addresses)+len(h.followers)+len(h.neighbours) > 0 {
			t.Errorf("the followers have left %v, %v, %v, %v", h.index.sets, h.index.addresses, h.followers, h.neighbours)
		}
	}
}

// An event socket that fails is reported, and queries are answered all the same.
func TestHost_failed(t *testing.T) {
	l := newLab(t)
	failed := make(chan error, 2)
	var h *Host
	l.host.Do(func() {
		var err error
		if h, err = Open(Options{Failed: func(err error) { failed <- err }}); err != nil {
			t.Fatal(err)
		}
	})
	defer h.Close()
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	h.mu.Lock()
	if err := unix.Dup3(ends[1], h.events[0], unix.O_CLOEXEC); err != nil { // a pipe's write end: read fails with EBADF
		t.Fatal(err)
	}
	h.wakeLocked()
	h.mu.Unlock()
	unix.Close(ends[1])
	if err := <-failed; !strings.Contains(err.Error(), "no longer seen") || !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
	if f := follow(t, h, l.host, Query{Remote: far}); f.Answer().Route.Gateway != router {
		t.Errorf("%+v", f.Answer())
	}
}

func TestHost_Close(t *testing.T) {
	l := newLab(t)
	before := goleak.IgnoreCurrent()
	fds := openFiles(t)
	for range 3 {
		var h *Host
		l.host.Do(func() {
			var err error
			if h, err = Open(Options{Failed: func(err error) { t.Error(err) }}); err != nil {
				t.Fatal(err)
			}
		})
		f := h.Follow(Query{Remote: far}, func() {})
		h.Close()
		h.Close()
		if f.Answer().Route.Device == 0 {
			t.Error("the last Answer is gone")
		}
		if a := f.Set(Query{Remote: router}); !errors.Is(a.Err, os.ErrClosed) {
			t.Errorf("after Close: %+v", a)
		}
		if err := h.SetUp(1); err == nil {
			t.Error("SetUp works after Close")
		}
	}
	goleak.VerifyNone(t, before)
	if now := openFiles(t); now > fds {
		t.Errorf("%d files open, %d before", now, fds)
	}
}

// openFiles is the number of this process's open files.
func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Tunnels that start and end cause no look-up for each other.
func TestHost_startOfMany(t *testing.T) {
	const n = 100
	l := tunnelLab(t)
	h := openHost(t, l.host)
	followers := make([]*counted, n)
	start := func(i int) (tun *os.File) {
		name := fmt.Sprintf("vpn%d", i)
		q := Query{Remote: [4]byte{198, 51, 100, byte(i)}, Local: here}
		f := follow(t, h, l.host, q)
		followers[i] = f
		l.host.Do(func() {
			var err error
			if tun, err = openTun(name); err != nil {
				t.Fatal(err)
			}
			if q.Interface, err = h.DeviceIndex(name); err != nil {
				t.Fatal(err)
			}
		})
		f.Set(q)
		if err := h.Configure([]Interface{{Index: q.Interface, Addresses: addressesOf(fmt.Sprintf("10.255.%d.1/30", i)), Routes: routesOf(fmt.Sprintf("10.%d.0.0/16", 64+i))}}); err != nil {
			t.Fatal(err)
		}
		return tun
	}
	tuns := make([]*os.File, n)
	tuns[0] = start(0)
	settle(t, h)
	eventually(t, "the neighbour is resolved", func() bool { return followers[0].Answer().Route.Resolved })
	before := h.requests.Load()
	for i := 1; i < n; i++ {
		tuns[i] = start(i)
	}
	settle(t, h)
	calls := followers[0].calls.Load()
	if made := h.requests.Load() - before; made > 8*n {
		t.Errorf("%d requests while %d tunnels start", made, n)
	}
	before = h.requests.Load()
	for _, tun := range tuns[1:] {
		tun.Close()
	}
	eventually(t, "the interfaces are gone", func() bool {
		settle(t, h)
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.tunnelInterfaces) == 1
	})
	settle(t, h)
	if made := h.requests.Load() - before; made > 2*n {
		t.Errorf("%d requests while %d tunnels end", made, n)
	}
	if followers[0].calls.Load() != calls {
		t.Errorf("a tunnel that is there is told %d times of others that end", followers[0].calls.Load()-calls)
	}
	tuns[0].Close()
}

// openTun makes a TUN interface that is removed when its file is closed.
func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	return os.NewFile(uintptr(fd), name), unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
}

// A configured route that is the present route to the remote is a loop, too.
func TestAnswer_loopThere(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	const there = "198.51.100.0/31" // far is in it
	l.host.Run("ip", "route", "add", there, "dev", "tun0", "metric", "7")
	for _, c := range []struct {
		routes []InterfaceRoute
		want   string
	}{
		{routesOf(there + " metric 7"), there + " metric 7"},
		{routesOf("10.9.0.0/16", there+" metric 6"), there + " metric 6"},
		{routesOf("198.51.100.1/32 metric 9"), "198.51.100.1/32 metric 9"},
		{routesOf(there+" metric 8", there+" metric 7 table 100"), ""},
		{nil, ""}, // the route is somebody else's
	} {
		a := follow(t, h, l.host, Query{Remote: far, Interface: index(t, l.host, "tun0"), Routes: c.routes}).Answer()
		got := ""
		if a.Loop != (InterfaceRoute{}) {
			got = a.Loop.String()
		}
		if a.Err != nil || a.Route.DeviceName != "tun0" || got != c.want {
			t.Errorf("%v: %q %v by %s, want %q", c.routes, got, a.Err, a.Route.DeviceName, c.want)
		}
	}
}

// A configured route that takes precedence over the present route to the remote makes a loop.
func TestAnswer_loop(t *testing.T) {
	l := tunnelLab(t)
	h := openHost(t, l.host)
	remote := netip.AddrFrom4(far).String()
	const via = "via 192.0.2.2"
	l.host.Run("ip", "route", "delete", "198.51.100.0/24", "via", "192.0.2.2")
	host := remote + "/32"
	for _, c := range []struct {
		name, present string // the route to the remote
		routes        []InterfaceRoute
		query         Query
		want          string
	}{
		{"default, of a lower metric", "default metric 100", routesOf("10.9.0.0/16", "0.0.0.0/0 metric 99"), Query{}, "0.0.0.0/0 metric 99"},
		{"default, without a metric", "default metric 100", routesOf("0.0.0.0/0"), Query{}, "0.0.0.0/0"},
		{"default, of the same metric", "default metric 100", routesOf("0.0.0.0/0 metric 100"), Query{}, ""},
		{"default, of a higher metric", "default metric 100", routesOf("0.0.0.0/0 metric 200"), Query{}, ""},
		{"default, in another table", "default metric 100", routesOf("0.0.0.0/0 metric 0 table 100"), Query{}, ""},
		{"halves of default", "default", routesOf("0.0.0.0/1 metric 200", "128.0.0.0/1 metric 200"), Query{}, "128.0.0.0/1 metric 200"},
		{"the host itself", "default", routesOf(host), Query{}, host},
		{"a host route", host + " metric 7", routesOf("0.0.0.0/0", "128.0.0.0/1"), Query{}, ""},
		{"underlay-device", "default metric 100", routesOf("0.0.0.0/0"), Query{UnderlayDevice: "eth0"}, ""},
		{"by the mark", "default metric 100", routesOf("0.0.0.0/0"), Query{Mark: 9}, ""},
		{"in the table of the mark", "default metric 100", routesOf("0.0.0.0/0 metric 0 table 1009"), Query{Mark: 9}, "0.0.0.0/0 table 1009"},
	} {
		for _, existing := range []string{"", "tun0"} {
			t.Run(c.name+existing, func(t *testing.T) {
				l.host.Run("sh", "-c", "ip route del "+remote+"; ip route flush exact 0/0; ip route flush table 1009; ip rule del fwmark 9; true")
				l.host.Run("sh", "-ec", "ip route add "+c.present+" "+via+"; ip route add default metric 5 "+via+" table 1009; ip rule add fwmark 9 table 1009")
				q := c.query
				q.Remote, q.Routes = far, c.routes
				if existing != "" {
					q.Interface = index(t, l.host, existing)
				}
				a := follow(t, h, l.host, q).Answer()
				got := ""
				if a.Loop != (InterfaceRoute{}) {
					got = a.Loop.String()
				}
				if a.Err != nil || got != c.want {
					t.Errorf("%q %v, want %q", got, a.Err, c.want)
				}
			})
		}
	}
}
