// Package routesets has sets of routes out of an interface with many remotes, and where each inner
// packet is to go by them. One table drives every way of carrying packets, and Linux's own tunl0.
package routesets

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"ipipd/internal/drop"
)

// Set is a set of routes. Where it has several tables, Rules make the kernel look them up in the order
// that ipipd has: the numbers ascending, the main table last.
type Set struct {
	Name   string
	Routes []Route
	Rules  []string // of ip rule add
	Want   []Lookup
}

// Route is a route. Its prefix is unique to its table and metric.
type Route struct {
	Type   string // "", or unreachable, blackhole, prohibit, throw
	Prefix string
	Hops   []Hop // several are ECMP
	Metric uint32
	Table  uint32 // 0 is main
}

// Hop is a next hop. The zero Via is none: the remote is the inner destination.
type Hop struct {
	Via    string
	Weight int // 0 is 1
}

// Lookup is what happens to an inner packet.
type Lookup struct {
	Destination string
	// Remotes are those that may get it, the same one for all packets of a flow. None: it is dropped.
	Remotes []string
	// Drop is the reason if ipipd drops it. With Kernel the kernel drops it before it reaches the interface.
	Drop   drop.Reason
	Kernel bool
}

// Args returns the arguments of ip route add for a route out of an interface.
func (r Route) Args(device string) []string {
	args := []string{r.Prefix}
	if r.Type != "" {
		args = []string{r.Type, r.Prefix}
	}
	if r.Metric != 0 {
		args = append(args, "metric", strconv.Itoa(int(r.Metric)))
	}
	if r.Table != 0 {
		args = append(args, "table", strconv.Itoa(int(r.Table)))
	}
	if r.Type != "" {
		return args
	}
	for _, h := range r.Hops {
		if len(r.Hops) > 1 {
			args = append(args, "nexthop")
		}
		if h.Via != "" {
			args = append(args, "via", h.Via)
		}
		args = append(args, "dev", device)
		if h.Via != "" {
			args = append(args, "onlink")
		}
		if len(r.Hops) > 1 && h.Weight > 1 {
			args = append(args, "weight", strconv.Itoa(h.Weight))
		}
	}
	return args
}

// Script returns the shell commands that add the routes and rules of a set.
func (s *Set) Script(device string) string {
	var b strings.Builder
	for _, r := range s.Routes {
		fmt.Fprintln(&b, "ip route add", strings.Join(r.Args(device), " "))
	}
	for _, r := range s.Rules {
		fmt.Fprintln(&b, "ip rule add", r)
	}
	return b.String()
}

// Address returns the address of remote n, from a network that the underlay reaches.
func Address(n int) string {
	return netip.AddrFrom4([4]byte{198, 51, 100, byte(n)}).String()
}

func via(n int) []Hop { return []Hop{{Via: Address(n)}} }

func to(destination string, remotes ...int) Lookup {
	l := Lookup{Destination: destination}
	for _, n := range remotes {
		l.Remotes = append(l.Remotes, Address(n))
	}
	return l
}

func dropped(destination string, why drop.Reason) Lookup {
	return Lookup{Destination: destination, Drop: why}
}

func byKernel(destination string) Lookup {
	return Lookup{Destination: destination, Drop: drop.NoRemote, Kernel: true}
}

// Sets are all sets.
var Sets = []Set{
	{
		Name: "no routes",
		Want: []Lookup{byKernel("10.1.2.3")},
	}, {
		Name:   "one prefix, one remote",
		Routes: []Route{{Prefix: "10.1.0.0/16", Hops: via(1)}},
		Want:   []Lookup{to("10.1.0.0", 1), to("10.1.255.255", 1), byKernel("10.0.255.255"), byKernel("10.2.0.0")},
	}, {
		Name:   "a host route",
		Routes: []Route{{Prefix: "10.1.2.3/32", Hops: via(1)}},
		Want:   []Lookup{to("10.1.2.3", 1), byKernel("10.1.2.2"), byKernel("10.1.2.4")},
	}, {
		Name:   "a default route",
		Routes: []Route{{Prefix: "0.0.0.0/0", Hops: via(1)}},
		Want:   []Lookup{to("10.1.2.3", 1), to("223.255.255.254", 1), to("1.0.0.1", 1)},
	}, {
		Name: "the longest of overlapping prefixes",
		Routes: []Route{
			{Prefix: "10.0.0.0/8", Hops: via(1)}, {Prefix: "10.1.0.0/16", Hops: via(2)},
			{Prefix: "10.1.2.0/24", Hops: via(3)}, {Prefix: "10.1.2.3/32", Hops: via(4)}, {Prefix: "10.1.2.128/25", Hops: via(5)},
		},
		Want: []Lookup{
			to("10.2.0.1", 1), to("10.1.3.1", 2), to("10.1.2.4", 3), to("10.1.2.3", 4), to("10.1.2.129", 5), to("10.1.2.127", 3), byKernel("11.0.0.1"),
		},
	}, {
		Name:   "two halves without the whole",
		Routes: []Route{{Prefix: "10.0.0.0/9", Hops: via(1)}, {Prefix: "10.128.0.0/9", Hops: via(2)}},
		Want:   []Lookup{to("10.127.255.255", 1), to("10.128.0.0", 2), byKernel("9.255.255.255"), byKernel("11.0.0.0")},
	}, {
		Name: "the lowest metric of one prefix",
		Routes: []Route{
			{Prefix: "10.1.0.0/16", Hops: via(1), Metric: 200}, {Prefix: "10.1.0.0/16", Hops: via(2), Metric: 100}, {Prefix: "10.1.0.0/16", Hops: via(3), Metric: 300},
		},
		Want: []Lookup{to("10.1.2.3", 2)},
	}, {
		Name:   "a longer prefix before a lower metric",
		Routes: []Route{{Prefix: "10.1.0.0/16", Hops: via(1)}, {Prefix: "10.1.2.0/24", Hops: via(2), Metric: 1000}},
		Want:   []Lookup{to("10.1.2.3", 2), to("10.1.3.3", 1)},
	}, {
		Name: "another table, which comes before main",
		Routes: []Route{
			{Prefix: "10.1.0.0/16", Hops: via(1)}, {Prefix: "10.1.0.0/16", Hops: via(2), Table: 44}, {Prefix: "10.2.0.0/16", Hops: via(3), Table: 44}, {Prefix: "10.3.0.0/16", Hops: via(4)},
		},
		Rules: []string{"pref 100 lookup 44"},
		Want:  []Lookup{to("10.1.2.3", 2), to("10.2.2.3", 3), to("10.3.2.3", 4)},
	}, {
		Name: "several tables, one of a number of 32 bits",
		Routes: []Route{
			{Prefix: "10.1.0.0/16", Hops: via(1), Table: 70000}, {Prefix: "10.1.0.0/16", Hops: via(2), Table: 300}, {Prefix: "10.2.0.0/16", Hops: via(3), Table: 70000},
		},
		Rules: []string{"pref 100 lookup 300", "pref 101 lookup 70000"},
		Want:  []Lookup{to("10.1.2.3", 2), to("10.2.2.3", 3), byKernel("10.3.2.3")},
	}, {
		Name:   "as AMPRNet: a default route in a table of its own",
		Routes: []Route{{Prefix: "0.0.0.0/0", Hops: via(1), Table: 44}, {Prefix: "44.1.0.0/24", Hops: via(2), Table: 44}, {Prefix: "44.2.0.0/16", Hops: via(3), Table: 44}},
		Rules:  []string{"pref 44 lookup 44"},
		Want:   []Lookup{to("44.1.0.9", 2), to("44.2.3.4", 3), to("44.3.0.1", 1), to("192.0.2.9", 1)},
	}, {
		Name:   "ECMP",
		Routes: []Route{{Prefix: "10.1.0.0/16", Hops: []Hop{{Via: Address(1)}, {Via: Address(2)}, {Via: Address(3), Weight: 5}}}, {Prefix: "10.1.2.0/24", Hops: via(4)}},
		Want:   []Lookup{to("10.1.1.1", 1, 2, 3), to("10.1.9.1", 1, 2, 3), to("10.1.2.1", 4)},
	}, {
		Name:   "no gateway: the inner destination is the remote",
		Routes: []Route{{Prefix: "198.51.100.0/24", Hops: []Hop{{}}}},
		Want:   []Lookup{to("198.51.100.1", 1), to("198.51.100.2", 2)},
	}, {
		Name:   "no gateway, and a gateway for a part",
		Routes: []Route{{Prefix: "198.51.100.0/24", Hops: []Hop{{}}}, {Prefix: "198.51.100.4/30", Hops: via(3)}},
		Want:   []Lookup{to("198.51.100.1", 1), to("198.51.100.5", 3)},
	}, {
		Name: "types that lead nowhere",
		Routes: []Route{
			{Prefix: "10.0.0.0/8", Hops: via(1)},
			{Type: "blackhole", Prefix: "10.1.0.0/16"}, {Type: "unreachable", Prefix: "10.2.0.0/16"}, {Type: "prohibit", Prefix: "10.3.0.0/16"},
			{Prefix: "10.1.2.0/24", Hops: via(2)},
		},
		Want: []Lookup{to("10.4.0.1", 1), byKernel("10.1.0.1"), byKernel("10.2.0.1"), byKernel("10.3.0.1"), to("10.1.2.3", 2)},
	}, {
		Name:   "a route before one of a higher metric that leads nowhere",
		Routes: []Route{{Type: "unreachable", Prefix: "0.0.0.0/0", Metric: 4278198272}, {Prefix: "0.0.0.0/0", Hops: via(1)}},
		Want:   []Lookup{to("10.1.2.3", 1)},
	}, {
		Name: "a blackhole of a table that no packet for the interface is looked up in",
		Routes: []Route{
			{Prefix: "10.0.0.0/8", Hops: via(1)}, {Type: "blackhole", Prefix: "10.1.0.0/16", Table: 77}, {Type: "unreachable", Prefix: "0.0.0.0/0", Metric: 4278198272, Table: 78},
		},
		Want: []Lookup{to("10.1.2.3", 1), to("10.2.0.1", 1), byKernel("11.0.0.1")},
	}, {
		Name:   "throw: the next table",
		Routes: []Route{{Type: "throw", Prefix: "10.1.0.0/16", Table: 44}, {Prefix: "10.1.0.0/16", Hops: via(1)}, {Prefix: "10.0.0.0/8", Hops: via(2), Table: 44}},
		Rules:  []string{"pref 100 lookup 44"},
		Want:   []Lookup{to("10.1.2.3", 1), to("10.2.2.3", 2)},
	}, {
		Name:   "multicast by a gateway",
		Routes: []Route{{Prefix: "224.0.0.0/4", Hops: via(1)}},
		Want:   []Lookup{to("224.0.0.5", 1)},
	}, {
		Name:   "multicast without a gateway",
		Routes: []Route{{Prefix: "224.0.0.0/4", Hops: []Hop{{}}}},
		Want:   []Lookup{dropped("224.0.0.5", drop.RemoteNotUsable)},
	},
}
