package netstate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// newTun makes a namespace with a TUN interface, tun0, which is down.
func newTun(t *testing.T) *netlab.NS {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	return ns
}

// addressesOf parses prefixes.
func addressesOf(texts ...string) (list []InterfaceAddress) {
	for _, text := range texts {
		list = append(list, InterfaceAddress{Prefix: netip.MustParsePrefix(text)})
	}
	return list
}

// routesOf parses its arguments: prefixes, each with a metric and a table or not.
func routesOf(texts ...string) (list []InterfaceRoute) {
	for _, text := range texts {
		var r InterfaceRoute
		prefix, rest, _ := strings.Cut(text, " ")
		r.Prefix = netip.MustParsePrefix(prefix)
		fmt.Sscanf(rest, "metric %d table %d", &r.Metric, &r.Table)
		list = append(list, r)
	}
	return list
}

// An interface is configured as the netlink library and `ip` do.
func TestHost_Configure(t *testing.T) {
	ns := netlab.New(t)
	devices := addLinks(t, ns, 2)
	h := openHost(t, ns)
	addresses := addressesOf("10.1.2.3/8", "10.1.2.3/24", "10.1.2.4/24", "10.1.2.5/30", "10.1.2.6/31", "10.1.2.7/32", "0.0.0.1/0")
	if err := h.Configure([]Interface{{Index: devices[0], Addresses: addresses}}); err != nil {
		t.Fatal(err)
	}
	ns.Do(func() {
		other, err := netlink.LinkByIndex(devices[1])
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addresses {
			if err := netlink.AddrAdd(other, &netlink.Addr{IPNet: &net.IPNet{IP: a.Prefix.Addr().AsSlice(), Mask: net.CIDRMask(a.Prefix.Bits(), 32)}}); err != nil {
				t.Error(err)
			}
		}
	})
	show := func(ifname string) string {
		return strings.ReplaceAll(ns.Run("sh", "-c", "ip -4 -o address show dev "+ifname+" | cut -d' ' -f2-"), ifname, "t")
	}
	if got, want := show("t0"), show("t1"); got != want {
		t.Errorf("addresses:\n%swant:\n%s", got, want)
	}
	if link := ns.Run("ip", "-d", "link", "show", "dev", "t0"); !strings.Contains(link, ",UP") || !strings.Contains(link, "addrgenmode none") {
		t.Errorf("link: %s", link)
	}
}

func TestHost_Configure_many(t *testing.T) {
	const n = 200
	ns := netlab.New(t)
	devices := addLinks(t, ns, n)
	h := openHost(t, ns)
	var interfaces []Interface
	for i, device := range devices {
		interfaces = append(interfaces, Interface{Index: device,
			Addresses: addressesOf(fmt.Sprintf("10.255.%d.1/30", i)), Routes: routesOf(fmt.Sprintf("10.%d.0.0/16", i), fmt.Sprintf("172.16.%d.0/24", i))})
	}
	before := h.requests.Load()
	for range 2 { // the second time is no error
		if err := h.Configure(interfaces); err != nil {
			t.Fatal(err)
		}
	}
	if made := h.requests.Load() - before; made > 10 { // for followers, of which there are none, or after lost messages
		t.Errorf("%d requests beside the batch", made)
	}
	addresses, routes, links := ns.Run("ip", "-4", "-o", "address"), ns.Run("ip", "route"), ns.Run("ip", "-o", "link", "show", "up")
	for i := range n {
		for text, in := range map[string]string{
			fmt.Sprintf(`: t%d +inet 10\.255\.%d\.1/30 brd 10\.255\.%[2]d\.3 `, i, i):   addresses,
			fmt.Sprintf(`(?m)^10\.%d\.0\.0/16 dev t%[1]d proto static scope link`, i):   routes,
			fmt.Sprintf(`(?m)^172\.16\.%d\.0/24 dev t%[1]d proto static scope link`, i): routes,
			fmt.Sprintf(`: t%d: `, i): links,
		} {
			if !regexp.MustCompile(text).MatchString(in) {
				t.Fatalf("no %s in\n%s", text, in)
			}
		}
	}
}

// The error names the interface and the address or route.
func TestHost_Configure_error(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(ns *netlab.NS, interfaces []Interface)
		want  string
		is    error
	}{
		"a route that leads elsewhere": {func(ns *netlab.NS, _ []Interface) {
			ns.Run("sh", "-ec", "ip tuntap add other mode tun; ip link set other up; ip route add 10.13.0.0/16 dev other")
		}, "add route 10.13.0.0/16 to t3: there is one that leads elsewhere (see `ip route show 10.13.0.0/16`): remove it first: file exists", unix.EEXIST},
		"a route of another in the list": {func(_ *netlab.NS, interfaces []Interface) {
			interfaces[3].Routes = append(interfaces[3].Routes, interfaces[2].Routes[1])
		}, "add route 10.12.0.0/16 to t3: there is one that leads elsewhere (see `ip route show 10.12.0.0/16`): remove it first: file exists", unix.EEXIST},
		"an address": {func(ns *netlab.NS, _ []Interface) {
			ns.Run("ip", "address", "add", "10.255.3.2/30", "scope", "link", "dev", "t3") // an address of another scope in the subnet
		}, "add address 10.255.3.1/30 to t3: invalid argument", unix.EINVAL},
		"a missing interface": {func(ns *netlab.NS, _ []Interface) { ns.Run("ip", "link", "del", "t3") }, "no interface with index %d in this network namespace: no such device", unix.ENODEV},
	} {
		t.Run(name, func(t *testing.T) {
			ns := netlab.New(t)
			h := openHost(t, ns)
			var interfaces []Interface
			for i, device := range addLinks(t, ns, 6) {
				interfaces = append(interfaces, Interface{Index: device, Addresses: addressesOf(fmt.Sprintf("10.255.%d.1/30", i)),
					Routes: routesOf(fmt.Sprintf("10.255.%d.0/30", i), fmt.Sprintf("10.1%d.0.0/16", i), fmt.Sprintf("10.1%d.0.0/16", i))})
			}
			c.spoil(ns, interfaces)
			interfaces[5].Routes = append(interfaces[5].Routes, interfaces[4].Routes[1]) // a second failure, which is not reported
			if strings.Contains(c.want, "%d") {
				c.want = fmt.Sprintf(c.want, interfaces[3].Index)
			}
			err := h.Configure(interfaces)
			var failed *InterfaceError
			if !errors.As(err, &failed) || failed.Index != interfaces[3].Index || err.Error() != c.want || !errors.Is(err, c.is) {
				t.Errorf("%v\nwant %s", err, c.want)
			}
		})
	}
}

// The routing table is that of the VRF in memory, unless messages were lost. Not each kernel has
// VRFs, but each has tables.
func TestHost_routeTable(t *testing.T) {
	ns := newTun(t)
	ns.Run("ip", "link", "set", "tun0", "up")
	withoutCarrier(t, ns, "tun0")
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	enslave := func() { // in the Host's memory only: a message about the interface undoes it
		const master = 1234
		settle(t, h)
		h.mu.Lock()
		defer h.mu.Unlock()
		port := h.links[device]
		port.master = master
		h.links[device], h.links[master] = port, link{index: master, name: "red", vrfTable: 1077}
	}
	for range 2 { // the second time the route exists
		enslave()
		if err := h.Configure([]Interface{{Index: device, Routes: routesOf("10.1.0.0/16")}}); err != nil {
			t.Error(err)
		}
	}
	if out, main := ns.Run("ip", "route", "show", "table", "1077"), ns.Run("ip", "route"); !strings.Contains(out, "10.1.0.0/16 dev tun0") || main != "" {
		t.Errorf("table 1077: %smain: %s", out, main)
	}
	enslave()
	if err := h.RemoveRoutes(device, routesOf("10.1.0.0/16")); err != nil {
		t.Error(err)
	}
	if out, _ := ns.Try("ip", "route", "show", "table", "1077"); strings.Contains(out, "10.1.0.0/16") {
		t.Errorf("table 1077: %s", out)
	}

	enslave()
	h.mu.Lock()
	h.lost, h.lastResync = true, time.Now().Add(time.Hour) // messages were lost, and there was no resync yet
	h.mu.Unlock()
	if added, err := h.AddRoutes(device, routesOf("10.1.0.0/16")); len(added) != 1 || err != nil {
		t.Error(added, err)
	}
	if out := ns.Run("ip", "route"); !strings.Contains(out, "10.1.0.0/16 dev tun0") {
		t.Errorf("main table: %s", out)
	}
}

func TestHostAddAddresses(t *testing.T) {
	ns := newTun(t)
	device := index(t, ns, "tun0")
	h := openHost(t, ns)
	ns.Do(func() {
		for _, want := range [][]InterfaceAddress{addressesOf("10.255.0.1/30"), nil} { // the second time is no error
			if added, err := fresh.AddAddresses(device, addressesOf("10.255.0.1/30")); err != nil || !slices.Equal(added, want) {
				t.Fatal(added, err)
			}
		}
		if _, err := fresh.AddAddresses(device, addressesOf("10.255.1.1/32")); err != nil {
			t.Fatal(err)
		}
		if err := fresh.SetUp(device); err != nil {
			t.Fatal(err)
		}
		routes := routesOf("10.1.0.0/16", "10.2.3.4/16", "10.3.0.1/32", "10.255.0.0/30", "0.0.0.0/0", "10.1.0.0/16")
		added, err := h.AddRoutes(device, routes)
		if want := routesOf("10.1.0.0/16", "10.2.3.4/16", "10.3.0.1/32", "0.0.0.0/0"); err != nil || !slices.Equal(added, want) {
			t.Error(added, err)
		}
		if err := h.Configure([]Interface{{Index: device, Routes: routes}}); err != nil { // the routes exist: no error
			t.Error(err)
		}
	})
	addresses, routes := ns.Run("ip", "address", "show", "tun0"), ns.Run("ip", "route")
	for _, want := range []string{"inet 10.255.0.1/30", "inet 10.255.1.1/32"} {
		if !strings.Contains(addresses, want) {
			t.Errorf("no %q in\n%s", want, addresses)
		}
	}
	for _, want := range []string{"10.1.0.0/16 dev tun0", "10.2.0.0/16 dev tun0", "10.3.0.1 dev tun0", "default dev tun0", "10.255.0.0/30 dev tun0"} {
		if !strings.Contains(routes, want) {
			t.Errorf("no %q in\n%s", want, routes)
		}
	}
}

// AddRoutes keeps an existing route that leads elsewhere, without an error.
func TestHost_AddRoutes_elsewhere(t *testing.T) {
	ns := newTun(t)
	ns.Run("sh", "-ec", "ip tuntap add tun1 mode tun; ip link set tun0 up; ip link set tun1 up; ip route add 10.1.0.0/16 dev tun1")
	h := openHost(t, ns)
	added, err := h.AddRoutes(index(t, ns, "tun0"), routesOf("10.1.0.0/16", "10.2.0.0/16"))
	if !slices.Equal(added, routesOf("10.2.0.0/16")) || err != nil {
		t.Error(added, err)
	}
	if out := ns.Run("ip", "route", "show", "10.1.0.0/16"); !strings.Contains(out, "tun1") || strings.Contains(out, "tun0") {
		t.Errorf("routes: %s", out)
	}
}

// A route belongs in the table of the interface's VRF.
func TestHost_AddRoutes(t *testing.T) {
	t.Run("vrf", func(t *testing.T) {
		ns := newTun(t)
		if out, err := ns.Try("ip", "link", "add", "red", "type", "vrf", "table", "77"); err != nil {
			t.Skip("the kernel has no VRF: " + strings.TrimSpace(out))
		}
		ns.Run("ip", "link", "set", "tun0", "up", "master", "red")
		ns.Run("ip", "link", "add", "other", "up", "type", "dummy")
		ns.Run("ip", "route", "add", "10.2.0.0/16", "dev", "other") // in the main table
		device := index(t, ns, "tun0")
		h := openHost(t, ns)
		if added, err := h.AddRoutes(device, routesOf("10.1.0.0/16")); len(added) != 1 || err != nil {
			t.Error(added, err)
		}
		if err := h.Configure([]Interface{{Index: device, Routes: routesOf("10.1.0.0/16", "10.2.0.0/16")}}); err != nil {
			t.Error(err)
		}
		if out := ns.Run("ip", "route", "show", "table", "77"); !strings.Contains(out, "10.1.0.0/16 dev tun0") {
			t.Errorf("table 77: %s", out)
		}
		if out := ns.Run("ip", "route"); strings.Contains(out, "10.1.0.0/16") {
			t.Errorf("main table: %s", out)
		}
	})
}

// After a failure the other addresses are added, and the failure is returned.
func TestHost_AddAddresses_failure(t *testing.T) {
	ns := newTun(t)
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	added, err := h.AddRoutes(device, routesOf("10.1.0.0/16"))
	if len(added) != 0 || !errors.Is(err, unix.ENETDOWN) || err.Error() != "add route 10.1.0.0/16 to tun0: network is down" {
		t.Error(added, err)
	}
	ns.Run("ip", "address", "add", "10.2.0.1/30", "scope", "link", "dev", "tun0")
	one, err := h.AddAddresses(device, addressesOf("10.2.0.2/30", "10.1.0.1/32"))
	if !slices.Equal(one, addressesOf("10.1.0.1/32")) || err == nil || err.Error() != "add address 10.2.0.2/30 to tun0: invalid argument" {
		t.Error(one, err)
	}
}

// The other addresses of a subnet stay when its primary one is removed, an operator's, too.
func TestHost_RemoveAddresses_primary(t *testing.T) {
	ns := netlab.New(t)
	device := addLinks(t, ns, 1)[0]
	h := openHost(t, ns)
	ns.Sysctl("net.ipv4.conf.all.promote_secondaries", "0")
	ns.Sysctl("net.ipv4.conf.t0.promote_secondaries", "0")
	for _, a := range []string{"10.1.0.1/24", "10.1.0.2/24", "10.1.0.3/24"} {
		ns.Run("ip", "address", "add", a, "dev", "t0")
	}
	if err := h.RemoveAddresses(device, addressesOf("10.1.0.1/24", "10.1.0.2/24")); err != nil {
		t.Fatal(err)
	}
	if got := ns.Run("ip", "-4", "-o", "address", "show", "dev", "t0"); strings.Count(got, "inet ") != 1 || !strings.Contains(got, "10.1.0.3/24") {
		t.Errorf("left:\n%s", got)
	}
}

func TestHost_RemoveAddresses(t *testing.T) {
	ns := newTun(t)
	ns.Run("sh", "-ec", "for a in 10.1.0.1/32 10.1.0.1/30 10.2.0.1/32; do ip address add $a dev tun0; done")
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	for range 2 { // the second time the address is gone
		if err := h.RemoveAddresses(device, addressesOf("10.3.0.1/32", "10.1.0.1/32", "10.2.0.1/31")); err != nil {
			t.Error(err)
		}
	}
	if out := ns.Run("ip", "-o", "-4", "address", "show", "dev", "tun0"); strings.Contains(out, "10.1.0.1/32") || !strings.Contains(out, "10.1.0.1/30") || !strings.Contains(out, "10.2.0.1/32") {
		t.Errorf("addresses: %s", out)
	}
	if err := h.RemoveAddresses(1234, addressesOf("10.1.0.1/30")); err != nil {
		t.Error(err)
	}
}

// RemoveRoutes removes only routes as AddRoutes adds them.
func TestHost_RemoveRoutes(t *testing.T) {
	ns := newTun(t)
	ns.Run("sh", "-ec", "ip link set tun0 up; ip tuntap add tun1 mode tun; ip link set tun1 up")
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	for _, c := range []struct{ name, others string }{
		{"another metric", "10.1.0.0/16 dev tun0 proto static scope link metric 100"},
		{"another protocol", "10.1.0.0/16 dev tun0 proto bird scope link metric 100"},
		{"another scope", "10.1.0.0/16 dev tun0 proto static scope global metric 100"},
		{"another interface", "10.1.0.0/16 dev tun1 proto static scope link metric 100"},
		{"another TOS", "10.1.0.0/16 dev tun0 proto static scope link tos 0x10"},
		{"another table", "10.1.0.0/16 dev tun0 proto static scope link table 77"},
		{"another prefix", "10.1.0.0/17 dev tun0 proto static scope link"},
		{"a blackhole", "blackhole 10.1.0.0/16 proto static metric 100"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns.Run("sh", "-c", "ip route flush table all proto static; ip route flush proto bird")
			ns.Run("sh", "-ec", "ip route add "+c.others)
			if added, err := h.AddRoutes(device, routesOf("10.1.0.0/16", "10.2.0.0/16", "0.0.0.0/0")); len(added) != 3 || err != nil {
				t.Fatal(added, err)
			}
			for range 2 { // the second time our routes are gone
				if err := h.RemoveRoutes(device, routesOf("10.1.0.0/16", "0.0.0.0/0")); err != nil {
					t.Error(err)
				}
				out := ns.Run("sh", "-c", "ip route show table main; ip route show table 77 2>/dev/null || true")
				if strings.Count(out, "\n") != 2 || !strings.Contains(out, "10.2.0.0/16 dev tun0") || !strings.Contains(out, "10.1.0.0/1") {
					t.Errorf("routes: %s", out)
				}
			}
		})
	}
	// Somebody else's routes of the same metric, in place of ours.
	ns.Run("ip", "route", "add", "10.3.0.0/16", "dev", "tun0", "proto", "bird")
	ns.Run("ip", "route", "add", "10.4.0.0/16", "dev", "tun1", "proto", "static")
	if err := h.RemoveRoutes(device, routesOf("10.3.0.0/16", "10.4.0.0/16")); err != nil {
		t.Error(err)
	}
	if out := ns.Run("ip", "route"); !strings.Contains(out, "10.3.0.0/16 dev tun0") || !strings.Contains(out, "10.4.0.0/16 dev tun1") {
		t.Errorf("routes: %s", out)
	}
	if err := h.RemoveRoutes(1234, routesOf("10.1.0.0/16")); err != nil {
		t.Error(err)
	}
}

// ReplaceRoutes leaves no moment without a route.
func TestHost_ReplaceRoutes(t *testing.T) {
	ns := newTun(t)
	ns.Run("sh", "-ec", "ip link set tun0 up; ip tuntap add tun1 mode tun; ip link set tun1 up")
	h := openHost(t, ns)
	from, to := index(t, ns, "tun0"), index(t, ns, "tun1")
	if added, err := h.AddRoutes(from, routesOf("10.1.0.0/16")); len(added) != 1 || err != nil {
		t.Fatal(added, err)
	}
	ns.Run("ip", "route", "add", "10.1.0.0/16", "dev", "tun0", "metric", "100")
	asked := []Interface{{Index: from, Routes: routesOf("10.1.0.0/16", "10.2.0.0/16")}, {Index: to, Routes: routesOf("10.1.0.0/16")}, {Index: 1234, Routes: routesOf("10.1.0.0/16")}}
	if existing, err := h.ExistingRoutes(asked); err != nil || len(existing) != 1 || !existing[asked[0].Routes[0]] {
		t.Error(existing, err)
	}
	if existing, err := h.ExistingRoutes(asked[1:]); err != nil || len(existing) != 0 {
		t.Error(existing, err)
	}
	monitor := -1
	ns.Do(func() {
		var err error
		group := eventGroup{protocol: unix.NETLINK_ROUTE, groups: []uint{unix.RTNLGRP_IPV4_ROUTE}}
		if monitor, err = group.subscribe(); err != nil {
			t.Fatal(err)
		}
	})
	defer unix.Close(monitor)
	if err := h.ReplaceRoutes(to, routesOf("10.1.0.0/16", "10.2.0.0/16")); err != nil {
		t.Fatal(err)
	}
	type seen struct {
		kind  uint16
		flags uint16
	}
	var messages []seen
	for buffer := make([]byte, maxMessage); ; {
		n, err := unix.Read(monitor, buffer) // the kernel has sent the messages before the acknowledgement
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := eachMessage(buffer[:n], func(m message) {
			messages = append(messages, seen{m.kind, m.flags & (unix.NLM_F_REPLACE | unix.NLM_F_CREATE)})
		}); err != nil {
			t.Fatal(err)
		}
	}
	if want := []seen{{unix.RTM_NEWROUTE, unix.NLM_F_REPLACE}, {unix.RTM_NEWROUTE, unix.NLM_F_CREATE}}; !slices.Equal(messages, want) {
		t.Errorf("messages %+v, want %+v", messages, want)
	}
	out := ns.Run("ip", "route")
	for _, want := range []string{"10.1.0.0/16 dev tun1 proto static scope link", "10.1.0.0/16 dev tun0 scope link metric 100", "10.2.0.0/16 dev tun1"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	if strings.Count(out, "\n") != 3 {
		t.Errorf("routes: %s", out)
	}
}

// Addresses that differ only in the peer are distinct, each with a host route to its peer.
func TestInterfaceAddress_peer(t *testing.T) {
	ns := newTun(t)
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	one := []InterfaceAddress{{netip.MustParsePrefix("10.255.0.1/32"), netip.MustParseAddr("10.255.0.2")}}
	two := []InterfaceAddress{{netip.MustParsePrefix("10.255.0.1/32"), netip.MustParseAddr("10.255.0.3")}}
	if err := h.Configure([]Interface{{Index: device, Addresses: one}}); err != nil {
		t.Fatal(err)
	}
	if added, err := h.AddAddresses(device, slices.Concat(one, two)); !slices.Equal(added, two) || err != nil {
		t.Error(added, err)
	}
	check := func(present bool, peer string) {
		t.Helper()
		address, route := ns.Run("ip", "-o", "-4", "address", "show", "dev", "tun0"), ns.Run("ip", "route", "show", peer)
		if strings.Contains(address, "inet 10.255.0.1 peer "+peer+"/32 ") != present || strings.Contains(route, peer+" dev tun0 proto kernel") != present {
			t.Errorf("%s, present %v:\n%s%s", peer, present, address, route)
		}
	}
	check(true, "10.255.0.2")
	check(true, "10.255.0.3")
	for range 2 {
		if err := h.RemoveAddresses(device, one); err != nil {
			t.Error(err)
		}
	}
	check(false, "10.255.0.2")
	check(true, "10.255.0.3")
}

// A route is identified by prefix, metric and table, when it is added, found and removed.
func TestInterfaceRoute(t *testing.T) {
	ns := newTun(t)
	ns.Run("sh", "-ec", "ip link set tun0 up; ip tuntap add tun1 mode tun; ip link set tun1 up; ip route add 10.1.0.0/16 dev tun1 metric 300")
	h := openHost(t, ns)
	from, to := index(t, ns, "tun0"), index(t, ns, "tun1")
	all := routesOf("10.1.0.0/16", "10.1.0.0/16 metric 200", "10.1.0.0/16 metric 0 table 100", "10.1.0.0/16 metric 200 table 1000")
	show := func() string {
		return strings.ReplaceAll(ns.Run("sh", "-c", "for t in main 100 1000; do ip route show table $t 2>/dev/null; done"), "linkdown", "")
	}
	want := func(what string, lines ...string) {
		t.Helper()
		if got := show(); strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(strings.Join(lines, " ")), " ") {
			t.Errorf("%s:\n%swant:\n%s", what, got, strings.Join(lines, "\n"))
		}
	}
	const ours, other = "10.1.0.0/16 dev tun0 proto static scope link", "10.1.0.0/16 dev tun1 scope link metric 300"
	withoutCarrier(t, ns, "tun0")
	withoutCarrier(t, ns, "tun1")
	if err := h.Configure([]Interface{{Index: from, Routes: all}}); err != nil {
		t.Fatal(err)
	}
	want("added", ours, ours+" metric 200", other, ours, ours+" metric 200")
	if added, err := h.AddRoutes(from, all); len(added) != 0 || err != nil {
		t.Error(added, err)
	}
	if err := h.Configure([]Interface{{Index: from, Routes: all}}); err != nil {
		t.Error(err)
	}
	if err := h.RemoveRoutes(from, routesOf("10.1.0.0/16", "10.1.0.0/16 metric 300", "10.1.0.0/16 metric 200 table 1000")); err != nil {
		t.Error(err)
	}
	want("removed", ours+" metric 200", other, ours)
	if added, err := h.AddRoutes(from, all); !slices.Equal(added, []InterfaceRoute{all[0], all[3]}) || err != nil {
		t.Error(added, err)
	}
	if err := h.ReplaceRoutes(to, all[1:3]); err != nil {
		t.Error(err)
	}
	theirs := strings.ReplaceAll(ours, "tun0", "tun1")
	want("replaced", ours, theirs+" metric 200", other, theirs, ours+" metric 200")
	err := h.Configure([]Interface{{Index: from, Routes: all[2:]}})
	if want := "add route 10.1.0.0/16 table 100 to tun0: there is one that leads elsewhere (see `ip route show 10.1.0.0/16 table 100`): remove it first: file exists"; err == nil || err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
}

// An alternative name may be any text, and only one interface can have it.
func TestInterface_altName(t *testing.T) {
	const name = "a tunnel to: Riga, räkna 100% \"med\" det"
	ns := netlab.New(t)
	devices := addLinks(t, ns, 2)
	h := openHost(t, ns)
	if err := h.Configure([]Interface{{Index: devices[0], AltName: name}}); err != nil {
		t.Fatal(err)
	}
	ns.Do(func() {
		if got, err := fresh.DeviceIndex(name); got != devices[0] || err != nil {
			t.Error(got, err)
		}
	})
	// The next process takes over the interface with its name.
	if err := h.Configure([]Interface{{Index: devices[0], AltName: name, Adopted: true}}); err != nil {
		t.Errorf("the interface has its name: %v", err)
	}
	if err := h.Configure([]Interface{{Index: devices[1], AltName: name, Adopted: true}}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("another interface has the name: %v", err)
	}
	err := h.Configure([]Interface{{Index: devices[1], AltName: name, Routes: routesOf("10.1.0.0/16")}})
	want := `add the alternative name "a tunnel to: Riga, räkna 100% \"med\" det", which no other interface may have, to t1: file exists`
	if !errors.Is(err, unix.EEXIST) || err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
}
