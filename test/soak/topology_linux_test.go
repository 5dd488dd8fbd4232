//go:build linux && soak

package soak

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
)

// The two ends.
const (
	endA = iota
	endB
)

// flow has the addresses between which packets go over one tunnel, by end.
type flow struct {
	inner, outer [2]netip.Addr
	tunnel       [2]string // its name at each end
}

// property is a property of a tunnel in a configuration.
type property struct{ name, value string }

// tunnel is a tunnel of an end's configuration, with its properties in order.
type tunnel struct {
	name       string
	properties []property
	fastPath   bool // the fast path has to be active when all is calm
	secret     bool
}

const secretText = "a secret of more than twenty bytes"

// shapes are the tunnels with one remote: each end has all of them.
var shapes = []struct {
	fastPath, secret bool
	properties       string
}{
	{properties: "allow-fast-path: no"},
	{fastPath: true},
	{fastPath: true, properties: "ttl: inherit, dscp: inherit"},
	{properties: "allow-fast-path: no, dont-fragment: inherit, tun-queues: 2"},
	{secret: true, properties: "ipsec-exchange: main"},
	{secret: true, properties: "ipsec-exchange: ike2, ipsec-pfs-group: ecp256"},
	{secret: true, properties: "ipsec-exchange: auto, ipsec-phase2: aes128-sha256"},
	{fastPath: true, properties: "keepalive-probe: empty"},
}

// hubs are the tunnels of end a with many remotes: end b has a tunnel for each remote.
var hubs = []struct {
	fastPath, secret bool
	remotes          int
}{{fastPath: true, remotes: 3}, {secret: true, remotes: 2}}

const ipsecText = "ipsec-secret: " + secretText + ", ipsec-dpd: \"2s,2\", ipsec-lifetime: \"10m,1m\""

// topology returns the tunnels of both ends, and what goes over them.
func topology() (tunnels [2][]tunnel, flows []flow) {
	outer := func(end, n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + 100*end + n)}) }
	inner := func(n, host int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, byte(n), byte(host)}) }
	add := func(end int, fastPath, secret bool, name, text string) {
		if secret {
			text += ", " + ipsecText
		}
		t := tunnel{name: name, fastPath: fastPath, secret: secret}
		for part := range splitFlow(text) {
			name, value, _ := strings.Cut(part, ": ")
			t.properties = append(t.properties, property{name, value})
		}
		tunnels[end] = append(tunnels[end], t)
	}
	for i, s := range shapes {
		name := fmt.Sprintf("t%d", i)
		for end := range 2 {
			text := fmt.Sprintf("local-address: %v, remote-address: %v, address: %v/30, keepalive: \"1s,5\"", outer(end, i), outer(1-end, i), inner(i, 1+end))
			if s.properties != "" {
				text += ", " + s.properties
			}
			add(end, s.fastPath, s.secret, name, text)
		}
		flows = append(flows, flow{[2]netip.Addr{inner(i, 1), inner(i, 2)}, [2]netip.Addr{outer(endA, i), outer(endB, i)}, [2]string{name, name}})
	}
	remote := len(shapes)
	for h, hub := range hubs {
		i := len(shapes) + h
		name := fmt.Sprintf("t%d", i)
		var peers, near []string
		for r := range hub.remotes {
			at := outer(endB, remote)
			// An address of the hub for each: one host cannot have two routes to one address.
			hubInner, far, farName := inner(i, 101+r), inner(i, 1+r), fmt.Sprintf("%s-%d", name, r)
			remote++
			near = append(near, fmt.Sprintf("%v/32", hubInner))
			peers = append(peers, fmt.Sprintf("%v/32=%v", far, at))
			text := fmt.Sprintf("local-address: %v, remote-address: %v, address: %v/32, route: %v/32, keepalive: \"1s,5\"", at, outer(endA, i), far, hubInner)
			if hub.secret {
				text += ", ipsec-exchange: ike2"
			}
			add(endB, hub.fastPath, hub.secret, farName, text)
			flows = append(flows, flow{[2]netip.Addr{hubInner, far}, [2]netip.Addr{outer(endA, i), at}, [2]string{name, farName}})
		}
		text := fmt.Sprintf("local-address: %v, remote-address: any, address: [%s], peers: [%s]", outer(endA, i), strings.Join(near, ", "), strings.Join(peers, ", "))
		if hub.secret {
			text += ", ipsec-exchange: ike2"
		}
		add(endA, hub.fastPath, hub.secret, name, text)
	}
	return tunnels, flows
}

// splitFlow splits the text of a flow mapping at commas that are in neither quotes nor brackets.
func splitFlow(text string) func(func(string) bool) {
	return func(yield func(string) bool) {
		quoted, depth, begin := false, 0, 0
		for i, c := range text + "," {
			switch {
			case c == '"':
				quoted = !quoted
			case c == '[':
				depth++
			case c == ']':
				depth--
			case c == ',' && !quoted && depth == 0:
				if !yield(strings.TrimSpace(text[begin:i])) {
					return
				}
				begin = i + 1
			}
		}
	}
}

// yaml returns the tunnel as in a configuration. Of several values of a property the last one holds.
func (t tunnel) yaml(more ...property) string {
	values, order := map[string]string{}, []string{}
	for _, p := range append(t.properties[:len(t.properties):len(t.properties)], more...) {
		if _, ok := values[p.name]; !ok {
			order = append(order, p.name)
		}
		values[p.name] = p.value
	}
	text := "- {name: " + t.name
	for _, name := range order {
		text += ", " + name + ": " + values[name]
	}
	return text + "}\n"
}

// changes are what a reload or set may do to any tunnel. None of them keeps a tunnel from being put
// back by the next reload.
var changes = []property{
	{"dscp", "46"}, {"dscp", "inherit"}, {"ttl", "64"}, {"ttl", "inherit"}, {"comment", "changed"}, {"mtu", "1300"}, {"mtu", "576"},
	{"keepalive", "off"}, {"keepalive", "\"2s,3\""}, {"allow-fast-path", "no"}, {"allow-fast-path", "yes"}, {"clamp-tcp-mss", "no"},
	{"dont-fragment", "inherit"}, {"tun-queues", "3"}, {"fwmark", "7"}, {"underlay-device", "eth0"}, {"disabled", "yes"}, {"rps", "all"},
	{"route", "10.99.0.0/16"},
}

// secretChanges are for a tunnel with a secret.
var secretChanges = []property{
	{"ipsec-secret", "another secret of more than twenty bytes"}, {"ipsec-exchange", "main"}, {"ipsec-exchange", "ike2"},
	{"ipsec-lifetime", "\"10m,20s\""}, {"ipsec-pfs-group", "modp1024"},
}

// changeOf returns a random change for a tunnel.
func changeOf(t tunnel, random *rand.Rand) property {
	if n := random.IntN(len(changes) + len(secretChanges)); t.secret && n < len(secretChanges) {
		return secretChanges[n]
	}
	return changes[random.IntN(len(changes))]
}
