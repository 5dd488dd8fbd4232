package netstate

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/internal/fib"
	"ipipd/test/netlab"
)

// mirrorOf collects the routes that a RouteFollower calls changed with, by prefix.
type mirrorOf struct {
	*RouteFollower
	mu     sync.Mutex
	routes map[string][]string
	calls  int
	told   int // number of prefixes in all calls
	table  *fib.Table
}

func followRoutes(t *testing.T, h *Host, ns *netlab.NS, device string) *mirrorOf {
	t.Helper()
	m := &mirrorOf{routes: map[string][]string{}, table: new(fib.Table)}
	m.RouteFollower = h.FollowRoutes(index(t, ns, device), m.changed)
	t.Cleanup(m.Close)
	eventually(t, "the first call", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.calls > 0 })
	return m
}

func (m *mirrorOf) changed(changes []RouteChange) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	m.told += len(changes)
	e := m.table.Edit()
	for _, c := range changes {
		e.Set(c.Prefix, c.Routes)
		delete(m.routes, c.Prefix.String())
		for _, r := range c.Routes {
			m.routes[c.Prefix.String()] = append(m.routes[c.Prefix.String()], describeRoute(r))
		}
	}
	m.table, _, _ = e.Commit()
}

// all returns a copy of routes, sorted like kernelRoutes.
func (m *mirrorOf) all() map[string][]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string][]string{}
	for p, routes := range m.routes {
		all[p] = sortSpans(routes)
	}
	return all
}

// describeRoute formats a route, beginning with the key of its span: table, metric and TOS.
func describeRoute(r fib.Route) string {
	s := fmt.Sprintf("table %d metric %d tos %d:", r.Table, r.Metric, r.TOS)
	if r.Unreachable {
		s += " nowhere"
	}
	for _, h := range r.Hops {
		s += fmt.Sprintf(" %v", netip.AddrFrom4(h.Gateway))
		if len(r.Hops) > 1 { // ip shows no weight of a group's last next hop
			s += fmt.Sprintf("/%d", h.Weight)
		}
		if h.Unusable {
			s += "!"
		}
	}
	return s
}

// sortSpans sorts the spans of a prefix, and keeps the order within one.
func sortSpans(routes []string) []string {
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(a, b string) int {
		a, _, _ = strings.Cut(a, ":")
		b, _, _ = strings.Cut(b, ":")
		return strings.Compare(a, b)
	})
	return routes
}

// kernelRoutes returns the routes that the mirror of a device must have, from the output of ip(8).
func kernelRoutes(t *testing.T, ns *netlab.NS, device string) map[string][]string {
	t.Helper()
	type hop struct {
		Gateway, Dev string
		Weight       int
		Via          *struct{ Family, Host string }
	}
	var routes []struct {
		hop
		Type, Dst, Table, TOS string
		Metric                uint32
		Nexthops              []hop
	}
	if err := json.Unmarshal([]byte(ns.Run("ip", "-4", "-j", "-N", "route", "show", "table", "all")), &routes); err != nil {
		t.Fatal(err)
	}
	type dumped struct {
		prefix string
		fib.Route
	}
	var inOrder []dumped
	all, concerned := map[string][]string{}, map[uint32]bool{}
	for _, r := range routes {
		next := fib.Route{Metric: r.Metric, Table: 254}
		number := func(s string) uint32 {
			n, err := strconv.ParseUint(s, 0, 32)
			if err != nil {
				t.Fatal(err)
			}
			return uint32(n)
		}
		if r.Table != "" {
			next.Table = number(r.Table)
		}
		if r.TOS != "" {
			next.TOS = uint8(number(r.TOS))
		}
		if len(r.Nexthops) == 0 {
			r.Nexthops = []hop{r.hop}
			r.Nexthops[0].Weight = 1
		}
		switch r.Type {
		case "", "1":
			for _, h := range r.Nexthops {
				if h.Dev != device {
					continue
				}
				to := fib.Hop{Weight: uint16(h.Weight), Unusable: h.Via != nil}
				if h.Gateway != "" {
					to.Gateway = netip.MustParseAddr(h.Gateway).As4()
				}
				next.Hops = append(next.Hops, to)
			}
			if len(next.Hops) == 0 {
				continue
			}
		case "6", "7", "8":
			next.Unreachable = true
		default:
			continue
		}
		if r.Dst == "default" {
			r.Dst = "0.0.0.0/0"
		} else if !strings.Contains(r.Dst, "/") {
			r.Dst += "/32"
		}
		concerned[next.Table] = concerned[next.Table] || !next.Unreachable
		inOrder = append(inOrder, dumped{r.Dst, next})
	}
	for _, r := range inOrder {
		if concerned[r.Table] {
			all[r.prefix] = append(all[r.prefix], describeRoute(r.Route))
		}
	}
	for p := range all {
		all[p] = sortSpans(all[p])
	}
	return all
}

// fib returns the forwarding table that is made of the changes.
func (m *mirrorOf) fib() *fib.Table {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.table
}

// agree waits until the mirror has the kernel's routes.
func (m *mirrorOf) agree(t *testing.T, ns *netlab.NS, device, after string) {
	t.Helper()
	var got, want map[string][]string
	for end := time.Now().Add(netlab.Timeout()); ; time.Sleep(20 * time.Millisecond) {
		got, want = m.all(), kernelRoutes(t, ns, device)
		if maps.EqualFunc(got, want, slices.Equal) {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	for p := range want {
		if !slices.Equal(got[p], want[p]) {
			t.Errorf("%s is\n%s\nwant\n%s", p, strings.Join(got[p], "\n"), strings.Join(want[p], "\n"))
		}
	}
	for p := range got {
		if want[p] == nil {
			t.Errorf("%s is\n%s\nwant none", p, strings.Join(got[p], "\n"))
		}
	}
	t.Fatalf("the mirror is not what the kernel has, after\n%s", after)
}

// mirrorLab is a namespace with tun0, 10.255.0.1/24, and eth5, 203.0.113.1/24, which have a carrier: they
// are veths.
func mirrorLab(t *testing.T) *netlab.NS {
	ns, peer := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ns, peer, netlab.End{Name: "tun0", Address: "10.255.0.1/24"}, netlab.End{Name: "eth0", Address: "10.255.0.2/24"})
	netlab.Veth(t, ns, peer, netlab.End{Name: "eth5", Address: "203.0.113.1/24"}, netlab.End{Name: "eth5", Address: "203.0.113.2/24"})
	ns.Sysctl("net.ipv6.conf.tun0.disable_ipv6", "0")
	return ns
}

// The mirror follows changes of routes with a message and without one.
func TestRouteFollower_changes(t *testing.T) {
	const onlink = " dev tun0 onlink"
	for _, c := range []struct {
		name     string
		commands []string
	}{
		{"a route", []string{"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route del 10.1.0.0/16"}},
		{"a route in place of another", []string{"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route replace 10.1.0.0/16 via 198.51.100.2" + onlink, "route change 10.1.0.0/16 via 198.51.100.3" + onlink}},
		{"a route that moves to another interface, and back", []string{"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route replace 10.1.0.0/16 via 203.0.113.2", "route replace 10.1.0.0/16 via 198.51.100.2" + onlink}},
		{"appended and prepended", []string{
			"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route append 10.1.0.0/16 via 198.51.100.2" + onlink, "route prepend 10.1.0.0/16 via 198.51.100.3" + onlink,
			"route replace 10.1.0.0/16 via 198.51.100.4" + onlink, "route del 10.1.0.0/16 via 198.51.100.1", "route del 10.1.0.0/16", "route del 10.1.0.0/16",
		}},
		{"behind one of another interface", []string{
			"route add 10.1.0.0/16 via 203.0.113.2", "route append 10.1.0.0/16 via 198.51.100.1" + onlink, "route replace 10.1.0.0/16 via 203.0.113.3",
			"route append 10.1.0.0/16 via 198.51.100.2" + onlink, "route del 10.1.0.0/16 via 203.0.113.3", "route replace 10.1.0.0/16 via 203.0.113.4",
		}},
		{"before one of another interface", []string{
			"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route prepend 10.1.0.0/16 via 203.0.113.2", "route replace 10.1.0.0/16 via 203.0.113.3", "route replace 10.1.0.0/16 via 198.51.100.2" + onlink,
			"route del 10.1.0.0/16", "route replace 10.1.0.0/16 via 203.0.113.3",
		}},
		{"several tables, metrics and TOS", []string{
			"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route add 10.1.0.0/16 via 198.51.100.2" + onlink + " metric 5", "route add 10.1.0.0/16 via 198.51.100.3 table 70000" + onlink,
			"route add 10.1.0.0/16 tos 4 via 198.51.100.4" + onlink, "route add default via 198.51.100.5 table 44" + onlink, "route del 10.1.0.0/16", "route flush table 44",
		}},
		{"a blackhole of a table that has no other routes out of the interface, and then has", []string{
			"route add blackhole 10.1.0.0/16 table 44", "route add 10.0.0.0/8 via 198.51.100.1" + onlink, "route add 10.2.0.0/16 via 198.51.100.1 table 44" + onlink,
			"route add unreachable 10.3.0.0/16 table 44", "route replace 10.2.0.0/16 via 203.0.113.2 table 44", "route replace 10.2.0.0/16 via 198.51.100.1 table 44" + onlink, "route flush table 44",
		}},
		{"types", []string{
			"route add 10.9.0.0/16 via 198.51.100.1 table 44" + onlink, "route add 10.9.0.0/16 via 198.51.100.1" + onlink,
			"route add blackhole 10.1.0.0/16", "route add unreachable 10.2.0.0/16 table 44", "route add prohibit 10.3.0.0/16", "route add throw 10.4.0.0/16 table 44",
			"route replace 10.1.0.0/16 via 198.51.100.1" + onlink, "route replace blackhole 10.1.0.0/16", "route replace throw 10.1.0.0/16", "route del 10.2.0.0/16 table 44",
		}},
		{"ECMP", []string{
			"route add 10.1.0.0/16 nexthop via 198.51.100.1 weight 3" + onlink + " nexthop via 198.51.100.2" + onlink, "route replace 10.1.0.0/16 nexthop via 203.0.113.2 nexthop via 198.51.100.2 weight 256" + onlink,
			"route replace 10.1.0.0/16 nexthop via 203.0.113.2 nexthop via 203.0.113.3", "route replace 10.1.0.0/16 nexthop dev tun0 nexthop dev eth5",
		}},
		{"a gateway of IPv6", []string{"route add 10.1.0.0/16 via inet6 fe80::1 dev tun0"}},
		{"an interface that goes down, and up again", []string{
			"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "route add 10.2.0.0/16 nexthop via 203.0.113.2 nexthop via 198.51.100.2" + onlink, "link set tun0 down", "link set tun0 up", "route add 10.1.0.0/16 via 198.51.100.1" + onlink,
		}},
		{"another interface that goes down", []string{"route add 10.2.0.0/16 nexthop via 203.0.113.2 nexthop via 198.51.100.2" + onlink, "link set eth5 down", "link set tun0 down"}},
		{"each interface of ECMP", []string{"route add 10.2.0.0/16 nexthop via 203.0.113.2 nexthop via 198.51.100.2" + onlink, "link set tun0 down", "link set eth5 down"}},
		{"an interface that goes", []string{"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "link del tun0"}},
		{"its address", []string{"route add 10.1.0.0/16 via 198.51.100.1" + onlink, "address del 10.255.0.1/24 dev tun0"}},
		{"a preferred source", []string{
			"address add 192.0.2.77/32 dev lo", "route add 10.1.0.0/16 via 198.51.100.1 src 192.0.2.77" + onlink, "route add 10.2.0.0/16 via 198.51.100.1" + onlink, "address del 192.0.2.77/32 dev lo",
		}},
		{"next-hop objects", []string{
			"nexthop add id 1 via 198.51.100.1" + onlink, "route add 10.1.0.0/16 nhid 1", "route add 10.2.0.0/16 nhid 1", "nexthop replace id 1 via 198.51.100.2" + onlink, "nexthop replace id 1 via 203.0.113.2 dev eth5",
			"route add 10.3.0.0/16 nhid 1", "nexthop replace id 1 via 198.51.100.3" + onlink, "route del 10.1.0.0/16", "nexthop del id 1",
		}},
		{"groups of next-hop objects", []string{
			"nexthop add id 1 via 198.51.100.1" + onlink, "nexthop add id 2 via 198.51.100.2" + onlink, "nexthop add id 3 via 203.0.113.2 dev eth5", "nexthop add id 4 group 1,7/2/3", "route add 10.1.0.0/16 nhid 4",
			"nexthop del id 1", "nexthop replace id 2 via 203.0.113.3 dev eth5", "nexthop replace id 3 via 198.51.100.9" + onlink, "nexthop replace id 4 group 2/3,9", "nexthop del id 2", "nexthop del id 3",
		}},
		{"the interface of another next-hop object of the group goes down", []string{
			"nexthop add id 1 via 198.51.100.1" + onlink, "nexthop add id 3 via 203.0.113.2 dev eth5", "nexthop add id 4 group 1/3", "route add 10.1.0.0/16 nhid 4", "link set eth5 down", "nexthop add id 3 via 198.51.100.9" + onlink,
		}},
		{"a blackhole as a next-hop object", []string{
			"route add 10.9.0.0/16 via 198.51.100.1" + onlink, "nexthop add id 1 blackhole", "route add 10.1.0.0/16 nhid 1", "nexthop replace id 1 via 198.51.100.2" + onlink,
			"route del 10.9.0.0/16", "route add blackhole 10.3.0.0/16", "nexthop replace id 1 blackhole", "nexthop del id 1",
		}},
		{"the interface of a next-hop object goes down", []string{"nexthop add id 1 via 198.51.100.1" + onlink, "route add 10.1.0.0/16 nhid 1", "link set tun0 down"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ns := mirrorLab(t)
			h := openHost(t, ns)
			m := followRoutes(t, h, ns, "tun0")
			for i, command := range c.commands {
				ns.Run("ip", strings.Fields(command)...)
				m.agree(t, ns, "tun0", strings.Join(c.commands[:i+1], "\n"))
			}
			late := followRoutes(t, h, ns, "lo") // has no routes, and does not disturb the other follower
			late.agree(t, ns, "lo", "a second follower begins")
			m.agree(t, ns, "tun0", "a second follower begins")
		})
	}
}

// Messages that are older than the last dump do not bring back routes that were removed before it.
func TestRouteFollower_olderMessages(t *testing.T) {
	ns := mirrorLab(t)
	h := openHost(t, ns)
	m := followRoutes(t, h, ns, "tun0")
	h.mu.Lock()
	ns.Run("sh", "-ec", "ip route add 10.1.0.0/16 via 198.51.100.1 dev tun0 onlink; ip link set tun0 down")
	h.mirrors.stale = false
	if err := errors.Join(h.resyncLocked(), h.readMirrorsLocked()); err != nil { // as after messages were lost
		t.Error(err)
	}
	h.wakeLocked()
	h.mu.Unlock()
	m.agree(t, ns, "tun0", "what is in the test")
}

// After random changes of routes the mirror has what ip(8) shows, also of changes before it began, and after
// lost messages.
func TestRouteFollower_likeTheKernel(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			ns := mirrorLab(t)
			r := rand.New(rand.NewPCG(seed, 4))
			run := func(n int) string {
				var b strings.Builder
				for range n {
					fmt.Fprintln(&b, randomCommand(r))
				}
				script := b.String()
				// Many of the commands fail.
				_, _ = ns.Try("sh", "-c", "ip -batch - -force 2>/dev/null <<'END'\n"+script+"END\n")
				return script
			}
			before := run(200)
			h := openHost(t, ns)
			m := followRoutes(t, h, ns, "tun0")
			m.agree(t, ns, "tun0", before)
			for i := range 12 {
				if i%4 == 3 {
					h.mu.Lock()
					h.lost = true
					h.mu.Unlock()
				}
				script := run(1 + r.IntN(150))
				m.agree(t, ns, "tun0", script)
			}
		})
	}
}

// randomCommand returns a command of ip -batch. Prefixes, gateways and IDs are few, so that commands affect the same routes.
func randomCommand(r *rand.Rand) string {
	pick := func(s ...string) string { return s[r.IntN(len(s))] }
	prefix := pick("10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.2.0.0/16", "default", "10.3.0.0/16")
	more := pick("", "", "", " metric 7", " table 44", " table 44 metric 7", " tos 4", " table 70000", " proto bird", " src 10.255.0.1", " src 203.0.113.1", " mtu 1400")
	tun := func() string { return fmt.Sprintf("via 198.51.100.%d dev tun0 onlink", 1+r.IntN(4)) }
	eth := func() string { return fmt.Sprintf("via 203.0.113.%d dev eth5", 2+r.IntN(3)) }
	hop := func() string {
		if r.IntN(3) == 0 {
			return eth()
		}
		return tun()
	}
	id := 1 + r.IntN(3)
	group := 11 + r.IntN(2)
	switch n := r.IntN(100); {
	case n < 12:
		return "route add " + prefix + " " + hop() + more
	case n < 22:
		return "route append " + prefix + " " + hop() + more
	case n < 30:
		return "route prepend " + prefix + " " + hop() + more
	case n < 42:
		return "route replace " + prefix + " " + hop() + more
	case n < 45:
		return "route change " + prefix + " " + hop() + more
	case n < 55:
		return "route del " + prefix + pick("", " metric 7", " table 44", " table 44 metric 7", " tos 4", " dev tun0", " dev eth5", " table 70000")
	case n < 62:
		return "route " + pick("add", "replace", "append") + " " + prefix + more + " nexthop " + hop() + " weight " + strconv.Itoa(1+r.IntN(3)) + " nexthop " + hop()
	case n < 66:
		return "route " + pick("add", "replace", "append", "del") + " " + pick("blackhole", "unreachable", "throw") + " " + prefix + pick("", " metric 7", " table 44")
	case n < 72:
		return "route " + pick("add", "replace", "append") + " " + prefix + pick("", " metric 7", " table 44") + fmt.Sprintf(" nhid %d", id)
	case n < 76:
		return "route " + pick("add", "replace", "append") + " " + prefix + pick("", " metric 7", " table 44") + fmt.Sprintf(" nhid %d", group)
	case n < 83:
		return fmt.Sprintf("nexthop %s id %d %s", pick("add", "replace"), id, hop())
	case n < 85:
		return fmt.Sprintf("nexthop del id %d", pick2(r, id, group))
	case n < 92:
		return fmt.Sprintf("nexthop %s id %d group %s", pick("add", "replace"), group, pick("1", "1,2/2", "1/2,5/3", "2/3", "3,9"))
	case n < 94:
		return "route " + pick("add", "replace") + " " + prefix + " dev " + pick("tun0", "eth5") + pick("", " metric 7", " table 44")
	case n < 96:
		return "link set tun0 " + pick("down", "up", "up")
	case n < 97:
		return "link set eth5 " + pick("down", "up", "up")
	case n < 98:
		return "address " + pick("add", "del") + " 10.255.0.1/24 dev tun0"
	case n < 99:
		return "address " + pick("add", "del") + " 203.0.113.1/24 dev eth5"
	}
	return "route flush table 44"
}

func pick2(r *rand.Rand, a, b int) int {
	if r.IntN(2) == 0 {
		return a
	}
	return b
}

// changed is called with the prefixes that have changed only, and a Host without followers keeps nothing.
func TestRouteFollower_cost(t *testing.T) {
	ns := mirrorLab(t)
	var b strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&b, "route add 10.%d.%d.0/24 via 198.51.100.%d dev tun0 onlink\n", i/250, i%250, 1+i%200)
	}
	ns.Run("sh", "-ec", "ip -batch - <<'END'\n"+b.String()+"END\n")
	h := openHost(t, ns)
	m := followRoutes(t, h, ns, "tun0")
	m.agree(t, ns, "tun0", "2000 routes")
	read := func() time.Time { h.mu.Lock(); defer h.mu.Unlock(); return h.mirrors.due }
	lastRead := read()
	m.mu.Lock()
	before := m.told
	m.mu.Unlock()
	for i := range 10 {
		ns.Run("ip", "route", "replace", fmt.Sprintf("10.1.%d.0/24", i), "via", "198.51.100.250", "dev", "tun0", "onlink")
	}
	m.agree(t, ns, "tun0", "ten changes")
	m.mu.Lock()
	told := m.told - before
	m.mu.Unlock()
	if told != 10 {
		t.Errorf("ten changes: told of %d prefixes", told)
	}
	if read() != lastRead {
		t.Error("all routes were read again for changes that messages tell of")
	}
	m.Close()
	ns.Run("ip", "nexthop", "add", "id", "1", "dev", "tun0")
	settle(t, h)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.mirrors.followers) != 0 || h.mirrors.nexthops != nil {
		t.Errorf("without followers there is %+v", h.mirrors)
	}
}
