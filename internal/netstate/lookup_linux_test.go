package netstate

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

var (
	here   = [4]byte{192, 0, 2, 1}
	router = [4]byte{192, 0, 2, 2}
	far    = [4]byte{198, 51, 100, 1}
)

// lab is a host and, behind a router, the tunnel's remote:
//
//	host eth0 192.0.2.1/24 ── 192.0.2.2 eth0 router eth1 198.51.100.2 ── 198.51.100.1/24 eth0 remote
type lab struct{ host, router, remote *netlab.NS }

func newLab(t *testing.T) lab {
	l := lab{netlab.New(t), netlab.New(t), netlab.New(t)}
	netlab.Veth(t, l.host, l.router, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	netlab.Veth(t, l.router, l.remote, netlab.End{Name: "eth1", Address: "198.51.100.2/24"}, netlab.End{Name: "eth0", Address: "198.51.100.1/24"})
	l.router.Sysctl("net.ipv4.ip_forward", "1")
	l.host.Run("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.2")
	l.remote.Run("ip", "route", "add", "192.0.2.0/24", "via", "198.51.100.2")
	return l
}

// ask returns the first Answer of a new Host in a namespace.
func ask(t testing.TB, ns *netlab.NS, q Query) *Answer {
	t.Helper()
	h := openHost(t, ns)
	defer h.Close()
	return follow(t, h, ns, q).Answer()
}

// lookup returns the Answer's Route for a Query with dst only.
func lookup(t *testing.T, ns *netlab.NS, dst [4]byte) Route {
	t.Helper()
	a := ask(t, ns, Query{Remote: dst})
	if a.Err != nil {
		t.Fatal(a.Err)
	}
	return a.Route
}

func index(t *testing.T, ns *netlab.NS, ifname string) (i int) {
	t.Helper()
	ns.Do(func() {
		var err error
		if i, err = fresh.DeviceIndex(ifname); err != nil {
			t.Fatal(err)
		}
	})
	return i
}

// mac is the Ethernet address of an interface.
func mac(t *testing.T, ns *netlab.NS, ifname string) (m [6]byte) {
	t.Helper()
	ns.Do(func() {
		l, err := fresh.getLink(0, ifname)
		if err != nil {
			t.Fatal(err)
		}
		m = l.mac
	})
	return m
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(netlab.Timeout()); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestLookup_gateway(t *testing.T) {
	l := newLab(t)
	got := lookup(t, l.host, far)
	if got.Source != here || got.Gateway != router || got.DeviceName != "eth0" || got.Device != index(t, l.host, "eth0") ||
		got.MTU != 1500 || got.PathMTU != 0 || got.Local || !got.Ethernet {
		t.Errorf("%+v", got)
	}
	if onLink := lookup(t, l.host, router); onLink.Gateway != ([4]byte{}) || !onLink.Ethernet || onLink.Source != here {
		t.Errorf("on the link: %+v", onLink)
	}
}

func TestHost_Refresh(t *testing.T) {
	l := newLab(t)
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far})
	eventually(t, "the next hop is resolved without Refresh", func() bool { return f.Answer().Route.Resolved })
	if r, want := f.Answer().Route, mac(t, l.router, "eth0"); r.DestinationMAC != want {
		t.Errorf("next hop %x, want %x", r.DestinationMAC, want)
	}
	// refresh calls Refresh a second later.
	refresh := func() {
		h.mu.Lock()
		for _, e := range h.neighbours {
			e.used = time.Time{}
		}
		h.mu.Unlock()
		if err := f.Follower.Refresh(); err != nil {
			t.Fatal(err)
		}
	}
	l.host.Run("ip", "neigh", "flush", "all")
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "stale")
	if r := lookup(t, l.host, far); !r.Resolved || r.DestinationMAC != [6]byte{2, 0, 0, 0, 0, 0x99} {
		t.Errorf("stale neighbour: %+v", r)
	}
	// The kernel confirms an entry that is in use again after five seconds (delay_first_probe_time).
	settle(t, h)
	refresh()
	if out := l.host.Run("ip", "neigh", "show", "192.0.2.2"); strings.Contains(out, "STALE") {
		t.Errorf("still stale: %s", out)
	}
	requests := h.requests.Load()
	if err := f.Follower.Refresh(); err != nil || h.requests.Load() != requests {
		t.Errorf("refreshed again at once: %v", err)
	}
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "dev", "eth0", "nud", "failed")
	eventually(t, "it has failed", func() bool { r := f.Answer().Route; return !r.Resolved && r.Ethernet })
	refresh()
	eventually(t, "it is resolved again", func() bool { return f.Answer().Route.Resolved })
}

func TestHost_Refresh_static(t *testing.T) {
	l := newLab(t)
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	h := openHost(t, l.host)
	f := follow(t, h, l.host, Query{Remote: far})
	if err := f.Follower.Refresh(); err != nil {
		t.Fatal(err)
	}
	if out := l.host.Run("ip", "neigh", "show", "192.0.2.2"); !f.Answer().Route.Static || !strings.Contains(out, "PERMANENT") {
		t.Errorf("%+v: what the operator has set is now %s", f.Answer().Route, out)
	}
}

func TestLookup_sourceMAC(t *testing.T) {
	l := newLab(t)
	l.host.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	if r, want := lookup(t, l.host, far), mac(t, l.host, "eth0"); r.SourceMAC != want || !r.Resolved {
		t.Errorf("%+v, want source %x", r, want)
	}
}

func TestLookup_mtu(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		device, route string
		want          int
	}{
		{"1500", "", 1500},
		{"1500", "1400", 1400},
		{"9000", "1400", 1400},
		{"1300", "", 1300},
		{"1300", "1400", 1300}, // a metric above the device's MTU does not raise it
	} {
		l.host.Run("ip", "link", "set", "eth0", "mtu", c.device)
		args := []string{"route", "replace", "198.51.100.0/24", "via", "192.0.2.2"}
		if c.route != "" {
			args = append(args, "mtu", c.route)
		}
		l.host.Run("ip", args...)
		if r := lookup(t, l.host, far); r.MTU != c.want || r.PathMTU != 0 {
			t.Errorf("device %s, route %q: %d and path %d, want %d and 0", c.device, c.route, r.MTU, r.PathMTU, c.want)
		}
	}
}

func TestLookup_pathMTU(t *testing.T) {
	l := newLab(t)
	l.router.Run("ip", "link", "set", "eth1", "mtu", "1400")
	var c net.Conn
	l.host.Do(func() {
		var err error
		if c, err = net.Dial("udp4", "198.51.100.1:9"); err != nil {
			t.Fatal(err)
		}
	})
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, mtu := range []string{"", "1450"} {
		want := 1500
		if mtu != "" {
			l.host.Run("ip", "route", "replace", "198.51.100.0/24", "via", "192.0.2.2", "mtu", mtu)
			want = 1450
		}
		var r Route
		eventually(t, "the kernel learns the path MTU", func() bool {
			c.Write(make([]byte, want-28))
			r = lookup(t, l.host, far)
			return r.PathMTU != 0
		})
		if r.MTU != want || r.PathMTU != 1400 {
			t.Errorf("MTU %d, path MTU %d: want %d, 1400", r.MTU, r.PathMTU, want)
		}
	}
}

func TestLookup_markSourceDevice(t *testing.T) {
	l := newLab(t)
	netlab.Veth(t, l.host, l.router, netlab.End{Name: "eth5", Address: "203.0.113.1/24", MTU: 1400}, netlab.End{Name: "eth5", Address: "203.0.113.2/24"})
	l.host.Run("ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.2", "table", "5")
	l.host.Run("ip", "rule", "add", "fwmark", "7", "lookup", "5")
	l.host.Run("ip", "rule", "add", "from", "203.0.113.1", "lookup", "5")
	eth5 := [4]byte{203, 0, 113, 1}
	for _, c := range []struct {
		name   string
		src    [4]byte
		mark   uint32
		device string
		want   Route
	}{
		{"nothing", [4]byte{}, 0, "", Route{Source: here, DeviceName: "eth0", MTU: 1500}},
		{"mark", [4]byte{}, 7, "", Route{Source: eth5, DeviceName: "eth5", MTU: 1400}},
		{"source", eth5, 0, "", Route{Source: eth5, DeviceName: "eth5", MTU: 1400}},
		{"device", [4]byte{}, 0, "eth5", Route{Source: eth5, DeviceName: "eth5", MTU: 1400}},
		{"foreign source", [4]byte{203, 0, 113, 77}, 0, "", Route{Source: [4]byte{203, 0, 113, 77}, DeviceName: "eth0", MTU: 1500}},
	} {
		a := ask(t, l.host, Query{Remote: far, Local: c.src, Mark: c.mark, UnderlayDevice: c.device})
		if r, err := a.Route, a.Err; err != nil || r.Source != c.want.Source || r.DeviceName != c.want.DeviceName || r.MTU != c.want.MTU || !r.Ethernet {
			t.Errorf("%s: %+v, %v: want %+v", c.name, r, err, c.want)
		}
	}
}

func TestLookup_ethernet(t *testing.T) {
	l := newLab(t)
	l.host.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	l.host.Run("ip", "link", "set", "tun0", "up")
	l.host.Try("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0") // for the IPv6 next hop, where there is IPv6
	for _, c := range []struct {
		name  string
		route []string
		want  bool
	}{
		{"gateway", []string{"via", "192.0.2.2"}, true},
		{"on the link", []string{"dev", "eth0"}, true},
		{"two next hops", []string{"nexthop", "via", "192.0.2.2", "nexthop", "via", "192.0.2.3"}, false},
		{"a TUN", []string{"dev", "tun0"}, false},
		{"loopback", []string{"dev", "lo"}, false},
		{"IPv6 next hop", []string{"via", "inet6", "fe80::1", "dev", "eth0"}, false},
		{"encapsulation on the route", []string{"encap", "ip", "id", "1", "dst", "192.0.2.2", "via", "192.0.2.2"}, false},
		{"segment routing on the route", []string{"encap", "seg6", "mode", "encap", "segs", "fc00::1", "dev", "eth0"}, false},
	} {
		if out, err := l.host.Try("ip", append([]string{"route", "replace", "198.51.100.0/24"}, c.route...)...); err != nil {
			t.Logf("%s: not tested, as the kernel cannot: %s", c.name, strings.TrimSpace(out))
			continue
		}
		if r := lookup(t, l.host, far); r.Ethernet != c.want {
			t.Errorf("%s: %+v, want Ethernet %v", c.name, r, c.want)
		}
	}
	l.host.Run("ip", "route", "replace", "198.51.100.0/24", "via", "192.0.2.2")
	l.host.Run("ip", "link", "set", "eth0", "arp", "off")
	if r := lookup(t, l.host, far); r.Ethernet {
		t.Errorf("without ARP: %+v", r)
	}
}

func TestLookup_nexthopObject(t *testing.T) {
	l := newLab(t)
	if out, err := l.host.Try("ip", "nexthop", "add", "id", "1", "via", "192.0.2.2", "dev", "eth0"); err != nil {
		t.Skip("the kernel has no next-hop objects: " + strings.TrimSpace(out))
	}
	l.host.Run("ip", "nexthop", "add", "id", "2", "via", "192.0.2.3", "dev", "eth0")
	l.host.Run("ip", "nexthop", "add", "id", "3", "group", "1/2")
	for _, compat := range []string{"1", "0"} {
		if out, err := l.host.Try("sysctl", "-qw", "net.ipv4.nexthop_compat_mode="+compat); err != nil {
			t.Logf("nexthop_compat_mode: %s", out)
		}
		l.host.Run("ip", "route", "replace", "198.51.100.0/24", "nhid", "1")
		if r := lookup(t, l.host, far); r.Gateway != router {
			t.Errorf("compat %s: single: %+v", compat, r)
		}
		l.host.Run("ip", "route", "replace", "198.51.100.0/24", "nhid", "3")
		if r := lookup(t, l.host, far); r.Ethernet {
			t.Errorf("compat %s: group: %+v", compat, r)
		}
	}
}

func TestLookup_local(t *testing.T) {
	l := newLab(t)
	r := lookup(t, l.host, here)
	if !r.Local || r.Ethernet || r.MTU < 1500 {
		t.Errorf("%+v", r)
	}
	for _, c := range []struct {
		address string
		want    bool
	}{{"192.0.2.1", true}, {"127.0.0.1", true}, {"192.0.2.2", false}, {"192.0.2.255", false}, {"203.0.113.5", false}, {"0.0.0.0", false}} {
		expectLocal(t, l.host, c.address, c.want)
	}
}

// expectLocal checks isLocal of an address, and Answer.HasLocal of a tunnel from it.
func expectLocal(t *testing.T, ns *netlab.NS, address string, want bool) {
	t.Helper()
	local := netip.MustParseAddr(address).As4()
	ns.Do(func() {
		if got, err := fresh.isLocal(local); err != nil || got != want {
			t.Errorf("%s is local: %v, %v", address, got, err)
		}
	})
	if a := ask(t, ns, Query{Remote: far, Local: local}); local != [4]byte{} && a.HasLocal != want {
		t.Errorf("%s is local: %+v", address, a)
	}
}

func TestFollower_hasLocal(t *testing.T) {
	l := newLab(t)
	expect := func(address string, want bool) { t.Helper(); expectLocal(t, l.host, address, want) }
	l.host.Run("ip", "address", "add", "203.0.113.5/32", "dev", "lo")
	expect("203.0.113.5", true) // on another interface than the underlay
	expect("203.0.113.6", false)
	l.host.Run("ip", "route", "add", "local", "203.0.113.0/28", "dev", "lo") // AnyIP
	expect("203.0.113.6", true)
	expect("203.0.113.16", false)
	l.host.Run("ip", "route", "add", "default", "via", "192.0.2.2")
	expect("203.0.113.16", false)
	l.host.Run("ip", "link", "set", "eth0", "down")
	expect("192.0.2.1", true) // also with its interface down
	l.host.Run("ip", "address", "delete", "192.0.2.1/24", "dev", "eth0")
	expect("192.0.2.1", false)
	if out, err := l.host.Try("ip", "link", "add", "red", "type", "vrf", "table", "77"); err != nil {
		t.Log("no VRF: " + out)
		return
	}
	l.host.Run("ip", "link", "set", "red", "up")
	l.host.Run("ip", "link", "set", "eth0", "up", "master", "red")
	l.host.Run("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
	expect("192.0.2.9", true)
	expect("192.0.2.1", false)
}

func TestNoRoute(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		kind, dst, want string
		err             error
	}{
		{"", "203.0.113.1", "no route to 203.0.113.1: ip route add 203.0.113.1 via GATEWAY, or set --underlay-device", unix.ENETUNREACH},
		{"blackhole", "203.0.113.1", "no route to 203.0.113.1: its route is of the type blackhole: ip route get 203.0.113.1 shows it: remove it, or set --underlay-device", unix.EINVAL},
		{"unreachable", "203.0.113.1", "its route is of the type unreachable", unix.EHOSTUNREACH},
		{"prohibit", "203.0.113.1", "its route is of the type prohibit", unix.EACCES},
		{"throw", "203.0.113.1", "no route to 203.0.113.1: ip route add ", unix.ENETUNREACH},
		{"", "192.0.2.255", "no route to 192.0.2.255: it is a broadcast or multicast address: a tunnel needs the address of one host", ErrNotUnicast},
		{"", "255.255.255.255", "a tunnel needs the address of one host", ErrNotUnicast},
	} {
		if c.kind != "" {
			l.host.Run("ip", "route", "replace", c.kind, "203.0.113.0/24")
		}
		for _, src := range [][4]byte{{}, here} {
			a := ask(t, l.host, Query{Remote: netip.MustParseAddr(c.dst).As4(), Local: src})
			r, err := a.Route, a.Err
			var none *NoRouteError
			if !errors.As(err, &none) || !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s %s from %v: %+v, %v: want %s", c.kind, c.dst, src, r, err, c.want)
			}
		}
		if c.kind != "" {
			l.host.Run("ip", "route", "del", c.kind, "203.0.113.0/24")
		}
	}
}

func TestNoRoute_device(t *testing.T) {
	l := newLab(t)
	eth0 := index(t, l.host, "eth0")
	l.host.Run("ip", "link", "set", "eth0", "down")
	h := openHost(t, l.host)
	for _, step := range []string{"down", "gone"} {
		l.host.Do(func() {
			r, _, err := h.lookup(far, [4]byte{}, 0, eth0, h.link)
			if !errors.As(err, new(*NoRouteError)) || !strings.Contains(err.Error(), step) {
				t.Errorf("%s: %+v, %v", step, r, err)
			}
		})
		if step == "down" {
			l.host.Run("ip", "link", "del", "eth0")
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	ns, other := netlab.New(b), netlab.New(b)
	netlab.Veth(b, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
	h := openHost(b, ns)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := h.lookup(router, [4]byte{}, 0, 0, h.link); err != nil {
			b.Fatal(err)
		}
	}
}
